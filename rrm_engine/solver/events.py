"""How a run tells what happens in it."""

from collections.abc import Callable
from typing import Any

Emit = Callable[[dict[str, Any]], None]


class Events:
    """The caller's callback for the events of a run, if there is one. An error in it is the caller's, not a job's."""

    def __init__(self, tell: Emit | None) -> None:
        self.wanted = tell is not None
        self.error: Exception | None = None
        self._tell = tell

    def __call__(self, event: dict[str, Any]) -> None:
        """Hand an event over. What that raises is kept, and from then on nothing is handed over."""
        if self._tell is None or self.error is not None:
            return
        try:
            self._tell(event)
        except Exception as error:
            self.error = error
            raise

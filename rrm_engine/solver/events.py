"""Hands the events of a run to the caller."""

from collections.abc import Callable
from typing import Any

Emit = Callable[[dict[str, Any]], None]


class Events:
    """The caller's callback for the events of a run, if there is one. An error in it is raised to the caller and fails
    no job.
    """

    def __init__(self, tell: Emit | None) -> None:
        self.wanted = tell is not None
        self.error: Exception | None = None
        self._tell = tell

    def __call__(self, event: dict[str, Any]) -> None:
        """Hand an event over. After an error in the callback, which is kept in ``error``, nothing is handed over any
        more.
        """
        if self._tell is None or self.error is not None:
            return
        try:
            self._tell(event)
        except Exception as error:
            self.error = error
            raise

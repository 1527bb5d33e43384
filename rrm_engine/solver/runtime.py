"""What the jobs of a run have in common."""

from dataclasses import dataclass
from typing import Literal

from rrm_engine.errors import RrmError
from rrm_engine.graph.types import Limits
from rrm_engine.protocol.style import Style
from rrm_engine.solver.backend import Backend


@dataclass(frozen=True, slots=True)
class Runtime:
    """Backend, style and limits of all jobs of a run. Raises RrmError for what the backend cannot do.

    A job that has written ``max_row_tokens``, or run for ``max_row_seconds``, ends with the answer it has so far.
    """

    backend: Backend
    style: Style
    limits: Limits
    child_context: Literal["task", "parent"] = "task"
    max_row_tokens: int | None = None
    max_row_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.child_context == "parent" and not self.backend.capabilities.forks:
            raise RrmError("--child-context parent: this backend cannot start a child from its parent's context")

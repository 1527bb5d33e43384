"""Named parts of a step, announced to a profiler: what runs and for which sequences."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rrm_engine.engine.scheduler import Work
    from rrm_engine.engine.sequence import Sequence

_NOTHING = nullcontext()


class HasSequence(Protocol):
    @property
    def sequence(self) -> "Sequence": ...


class Ranges:
    """Receives the announcements, as in ``with ranges("sample", order): ...``. This one ignores them.

    A subclass must read ``of`` when the range opens, because sequences may pause or end within it.
    """

    def __call__(self, name: str, of: "Iterable[HasSequence | Sequence | str]" = ()) -> AbstractContextManager[Any]:
        """A part of a step and what it works for: sequences, work items, or keys of sequences."""
        return _NOTHING

    def forward(self, work: "Iterable[Work]") -> AbstractContextManager[Any]:
        """The packed forward of ``work``."""
        return _NOTHING

    def reclaims(self, victim: "Sequence", needy: "Sequence") -> None:
        """``victim`` is about to give up its KV, recomputed or swapped in later, because ``needy`` needs blocks."""

    def step(self, number: int) -> AbstractContextManager[Any]:
        """The whole of step ``number``, the handling of its tokens included. In a pipeline, later steps are launched in
        it too.
        """
        return _NOTHING

"""Named ranges of a step, for a profiler that wants to know what runs and for which sequences."""

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
    """What the engine announces its work to, ``with ranges("sample", order): ...``. This one does nothing with it.

    Sequences may pause or end within a range, so ``of`` is read as the range opens; it is not read if nothing listens.
    """

    def __call__(self, name: str, of: "Iterable[HasSequence | Sequence | str]" = ()) -> AbstractContextManager[Any]:
        """A part of a step and what it works for: sequences, what has one, or keys of sequences."""
        return _NOTHING

    def forward(self, work: "Iterable[Work]") -> AbstractContextManager[Any]:
        """The packed forward of ``work``."""
        return _NOTHING

    def reclaims(self, victim: "Sequence", needy: "Sequence") -> None:
        """``victim`` is about to give up its KV, to be recomputed or brought back: ``needy`` needs the blocks."""

    def step(self, number: int) -> AbstractContextManager[Any]:
        """The whole of step ``number``, with what is done about its tokens; in a pipeline the launch of later ones."""
        return _NOTHING

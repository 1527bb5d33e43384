"""A step that has been launched and whose tokens have not been handed out."""

from dataclasses import dataclass, field

import torch

from rrm_engine.device.transfer import Readback
from rrm_engine.engine.scheduler import SchedulerOutput, Work
from rrm_engine.engine.sequence import Matcher, Sequence


@dataclass(slots=True)
class Flight:
    """A launched step. ``logits`` ``[rows, vocabulary]`` are there until the ``tokens`` of ``order`` are drawn."""

    number: int
    began: float
    plan: SchedulerOutput
    order: list[Work]
    logits: torch.Tensor | None
    tokens: Readback | None = None
    kept: dict[Sequence, torch.Tensor] = field(default_factory=dict)

    @property
    def waits_for_tokens(self) -> bool:
        """Whether a grammar in it has not been told yet what an earlier step in flight samples."""
        return any(work.sequence.matcher and self.number in work.sequence.flights[1:] for work in self.order)

    def matchers(self) -> list[Matcher | None]:
        """Of each row that samples its sequence's grammar, told of what is drafted before the row's token; none of
        those that do not wait for it any more.
        """
        matchers: list[Matcher | None] = []
        last: dict[Sequence, Matcher | None] = {}
        for work in self.order:
            sequence = work.sequence
            matcher = last.get(sequence, sequence.matcher if self.number in sequence.flights else None)
            if work.drafted is not None and matcher is not None:
                matcher = matcher.copy()
                matcher.accept(work.drafted)
            last[sequence] = matcher
            matchers.append(matcher)
        return matchers

"""A step in flight: launched, its tokens not read yet."""

from dataclasses import dataclass, field

import torch

from rrm_engine.device.transfer import Readback
from rrm_engine.engine.scheduler import SchedulerOutput, Work
from rrm_engine.engine.sequence import Matcher, Sequence


@dataclass(slots=True)
class Flight:
    """A launched step. ``order`` are its work items that sample, one a row; ``logits`` ``[rows, vocabulary]`` are kept
    until their ``tokens`` have been drawn. ``kept``: logits that a probe asked for.
    """

    number: int
    began: float
    plan: SchedulerOutput
    order: list[Work]
    logits: torch.Tensor | None
    tokens: Readback | None = None
    kept: dict[Sequence, torch.Tensor] = field(default_factory=dict)

    @property
    def waits_for_tokens(self) -> bool:
        """Whether one of its grammars still has to be told the token of an earlier step in flight."""
        return any(work.sequence.matcher and self.number in work.sequence.flights[1:] for work in self.order)

    def matchers(self) -> list[Matcher | None]:
        """For each row its sequence's grammar, advanced by the drafted tokens up to that row. None for sequences that
        have no grammar, or were paused or ended since the launch.
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

"""How the phases of a run decode."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.sequence import Matcher
from rrm_engine.protocol.events import PLAIN_SHAPE, PlanShape
from rrm_engine.protocol.thinking import Thought
from rrm_engine.runs.events import Grammar as Constraint
from rrm_engine.solver.backend import Grammar

MatcherFactory = Callable[[int, bool], Matcher]  # takes a Grammar


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """How one phase decodes. ``matcher`` makes the grammar's state if the phase is constrained; ``thought`` is the
    thinking allowed before it.
    """

    budget: int
    thinking: bool
    sampling: SamplingParams
    matcher: MatcherFactory | None = None
    thought: Thought | None = None
    shape: PlanShape = PLAIN_SHAPE

    def match(self, grammar: Grammar | None) -> Matcher | None:
        return None if self.matcher is None or grammar is None else self.matcher(*grammar)

    def recorded(self, grammar: Grammar | None) -> dict[str, Any]:
        """How the phase decodes, recorded in the trace (see `Started`) so that its tokens can be sampled again."""
        constrained = None
        if self.matcher is not None and grammar is not None:
            constrained = Constraint(*grammar, self.thought, **asdict(self.shape))
        return {"sampling": self.sampling.settings(), "grammar": constrained, "budget": self.budget}

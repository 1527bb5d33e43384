"""How the phases of a run are asked for."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from rrm_engine.backends.http.wire import Ask
from rrm_engine.protocol.events import PLAIN_SHAPE, PlanShape
from rrm_engine.runs.events import Grammar as Constraint
from rrm_engine.solver.backend import Grammar


@dataclass(frozen=True, slots=True)
class Plan:
    """How one phase is asked for: ``sampling`` in the API's own settings, ``extra`` in those that servers add;
    ``grammar`` makes the Lark text that the server holds it to, whose plans have ``shape``.
    ``seeded``: the server takes a seed.
    """

    budget: int
    thinking: bool
    sampling: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    grammar: Callable[[int, bool], str] | None = None
    seeded: bool = True
    shape: PlanShape = PLAIN_SHAPE

    def ask(self, prompt: Any, budget: int, grammar: Grammar | None, seed: int) -> Ask:
        text = None if self.grammar is None or grammar is None else self.grammar(*grammar)
        extra = self.extra | ({"seed": seed} if self.seeded else {})  # the Responses API has no name for it
        return Ask(prompt, budget, self.sampling, extra, text)

    def recorded(self, grammar: Grammar | None) -> dict[str, Any]:
        """The phase's settings, for the trace."""
        held = None if self.grammar is None or grammar is None else Constraint(*grammar, **asdict(self.shape))
        return {"sampling": {**self.sampling, **self.extra}, "grammar": held, "budget": self.budget}

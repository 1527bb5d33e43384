"""How the phases of a run are asked for."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rrm_engine.backends.http.wire import Ask
from rrm_engine.protocol.events import MAX_TASK_CHARS
from rrm_engine.runs.events import Grammar as Constraint
from rrm_engine.solver.backend import Grammar


@dataclass(frozen=True, slots=True)
class Plan:
    """How one phase is asked for: ``sampling`` in the API's own settings, ``extra`` in those that servers add;
    ``grammar`` makes the Lark text that the server holds it to, in which a child's task may have ``max_task_chars``.
    ``seeded``: the server takes a seed.
    """

    budget: int
    thinking: bool
    sampling: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    grammar: Callable[[int, bool], str] | None = None
    seeded: bool = True
    max_task_chars: int = MAX_TASK_CHARS

    def ask(self, prompt: Any, budget: int, grammar: Grammar | None, seed: int) -> Ask:
        text = None if self.grammar is None or grammar is None else self.grammar(*grammar)
        extra = self.extra | ({"seed": seed} if self.seeded else {})  # the Responses API has no name for it
        return Ask(prompt, budget, self.sampling, extra, text)

    def recorded(self, grammar: Grammar | None) -> dict[str, Any]:
        """The phase's settings, for the trace."""
        held = None if self.grammar is None or grammar is None else Constraint(*grammar, None, self.max_task_chars)
        return {"sampling": {**self.sampling, **self.extra}, "grammar": held, "budget": self.budget}

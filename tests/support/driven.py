"""Recursive runs whose shape no weights decide: in every phase a grammar fixes each line, its free words apart.

A tiny random model writes the words and digits in between, as many as there must be, and bytes are its tokens. So a
graph always has the same nodes and each of them as many tokens as ever, while what they write depends on all they read.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from lab import STYLE
from oracle import chat_model, chat_tokenizer

from rrm_engine.backends.local import Solver
from rrm_engine.backends.plans import PhasePlan
from rrm_engine.config import RunConfig
from rrm_engine.engine.sequence import Matcher
from rrm_engine.graph.types import Phase
from rrm_engine.loading.prepare import LoadedModel, prepare_model
from rrm_engine.protocol.grammar import EventGrammars
from rrm_engine.solver.backend import Grammar

TASK = "Add 2 and 3."
NODES = ["root", *("root.a", "root.a.a", "root.a.b"), *("root.b", "root.b.a", "root.b.b")]
PLAN = r"""
start: child_a child_b "{\"type\":\"await\"}\n"
child_a: "{\"type\":\"child\",\"id\":\"a\",\"task\":\"" WORDS "\"}\n"
child_b: "{\"type\":\"child\",\"id\":\"b\",\"task\":\"" WORDS "\"}\n"
WORDS: /[a-z0-9 ]{12}/
"""
ANSWER = r"""
start: "{\"type\":\"atomic\",\"answer\":\"" WORDS " FINAL: " NUMBER "\"}"
WORDS: /[a-z0-9 ]{20}/
NUMBER: /[1-9][0-9]{3}/
"""
PHASES = {Phase.GRAPH: PLAN, Phase.SOLVER: ANSWER, Phase.CONTINUATION: ANSWER}
PLAN_TOKENS, ANSWER_TOKENS = 112, 61
TOKENS = 3 * PLAN_TOKENS + 7 * ANSWER_TOKENS
SETTINGS: dict[str, Any] = {"temperature": 0.0, "max_depth": 2, "max_sequence_tokens": 512, "kv_blocks": 1000}


class Held(PhasePlan):
    """A phase that is held to its grammar also where it would write freely, as solvers that are no forks do."""

    def match(self, grammar: Grammar | None) -> Matcher | None:
        return super().match(grammar or (0, False))


class Driven:
    """The model and the style that all runs share; the style is written to ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.style = folder / "driven.toml"
        self.style.write_text(STYLE)
        tokenizer = chat_tokenizer()
        self.model: LoadedModel = prepare_model(copy.deepcopy(chat_model(tokenizer)), tokenizer, "tiny")

    def solver(self, **changes: Any) -> Solver:
        """One that solves TASK through the nodes in NODES; plans and answers are cut where a budget is too small."""
        settings = {"planner_max_tokens": 120, "solver_max_tokens": 80, "continuation_max_tokens": 80, **SETTINGS}
        solver = Solver(self.model, RunConfig(prompt_style=str(self.style), **{**settings, **changes}), [TASK])
        grammars = EventGrammars(self.model.tokenizer, eos_ids=self.model.eos_ids)
        plans = dict(solver.backend.writing.plans)
        for phase, grammar in PHASES.items():
            plan = plans[phase]
            plans[phase] = Held(
                plan.budget, plan.thinking, plan.sampling, lambda *state, grammar=grammar: grammars.matcher(grammar)
            )
        solver.backend.writing = replace(solver.backend.writing, plans=plans)
        return solver

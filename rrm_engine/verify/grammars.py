"""The grammars that a recorded run was constrained by, made again."""

from collections.abc import Iterable
from functools import cached_property
from typing import Any

from rrm_engine.graph.types import Phase
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.protocol.grammar import EventGrammars, EventMatcher, ThinkingMatcher, phase_grammar
from rrm_engine.runs.events import Grammar


class RecordedGrammars:
    """Of a run whose nodes might have ``max_width`` children, for its model's tokenizer and end-of-sequence ids."""

    def __init__(self, max_width: int, tokenizer: Any, eos_ids: Iterable[int]) -> None:
        self._max_width = max_width
        self._tokenizer = tokenizer
        self._eos_ids = frozenset(eos_ids)

    def matcher(self, phase: Phase, grammar: Grammar | None) -> EventMatcher | ThinkingMatcher | None:
        """The state at the beginning of a phase; None where nothing constrained it."""
        if grammar is None:
            return None
        asked = grammar.children, grammar.may_split
        rules = phase_grammar(self._max_width, phase, self._marks, grammar.shape, *asked)
        return self.compiled.matcher(rules, grammar.thought)

    @cached_property
    def compiled(self) -> EventGrammars:
        """Raises RrmError where no grammar can be written for the tokenizer."""
        return EventGrammars(self._tokenizer, eos_ids=self._eos_ids)

    @cached_property
    def _marks(self) -> Any:
        return ChatFormat(self._tokenizer, self._eos_ids).marks

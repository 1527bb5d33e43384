"""Grammars under which any instruct model writes a valid graph, and their matchers (llguidance).

A matcher is told only what the model writes itself in one phase: it starts fresh at a prompt and at every
resume, and behind ``</think>`` where the phase begins with thinking. It never sees appended turns.
"""

from collections.abc import Iterable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rrm_engine.errors import RrmError

PHASES: Final = ("graph", "continuation")

# Inside a string only \" \\ and \n are possible: LaTeX must then be written as valid JSON, \\frac for \frac.
_CHAR: Final = r'([^"\\\x00-\x1f\x7f]|\\["\\n])'
_VISIBLE: Final = r'[^"\\\x00-\x20\x7f]'
# What an answer may begin with, so that stripping markup leaves something.
_ANSWER_START: Final = r"([0-9A-Za-z(+\-]|\\\\[A-Za-z])"
_ANSWER_CHAR: Final = r'([^"\\\x00-\x1f\x7f]|\\["\\])'
# A line of working never opens an object or a thinking block, so that no event is read out of it.
_WORK_CHAR: Final = r"([^{<\x00-\x1f\x7f]|\{[^{<\"'“”„‘’\s\x00-\x1f]|<[^{<t\x00-\x1f])"  # noqa: RUF001

# Token sets that llguidance precomputes masks for; each lies inside what the regexes above repeat.
_SLICES: Final = [r'[^{<"\\\x00-\x1f\x7f]{1,30}', r'[^"\\\x00-\x1f\x7f]{1,30}']


def event_grammar(
    max_children: int,
    *,
    may_split: bool,
    first: int = 1,
    phase: str = "graph",
    max_task_chars: int = 1200,
    max_answer_chars: int = 1200,
    max_work_lines: int = 40,
) -> str:
    """The Lark grammar of what a node may write in ``phase``; a solver phase needs none.

    graph         2 to ``max_children`` children with ids c<first>, c<first + 1>, ... that depend only on earlier
                  ones, then an await of all of them; or ``{"type":"atomic"}``, which is all there is if the
                  node may not split or ``max_children`` is below 2
    continuation  up to ``max_work_lines`` lines of working, then ``{"type":"atomic","answer":"... FINAL: ..."}``
                  and perhaps a ``done``; or, if the node may split again, children and an await as above

    ``first`` keeps the ids of a second round apart from the first's. Raises ValueError for another phase and
    for a ``first`` or a limit below 1.
    """
    if phase not in PHASES:
        raise ValueError(f"there is no grammar for the phase {phase!r}, only for {', '.join(PHASES)}")
    if min(first, max_task_chars, max_answer_chars, max_work_lines) < 1:
        raise ValueError("first and the limits of a grammar must be at least 1")
    splits = may_split and max_children >= 2
    rules = []
    if phase == "graph":
        body = '"{\\"type\\":\\"atomic\\"}"'
    else:
        body = "answer"
        rules += [
            'answer: "{\\"type\\":\\"atomic\\",\\"answer\\":" ANSWER "}" ("\\n{\\"type\\":\\"done\\"}")?',
            f'ANSWER: /"({_CHAR}{{0,{max_answer_chars}}}( |\\\\n))?FINAL: {_ANSWER_START}{_ANSWER_CHAR}{{0,120}}"/',
            f"WORK: /{_WORK_CHAR}{{0,300}}\\n/",
        ]
    if splits:
        body = f"{body} | child_0"
        rules += _children(max_children, first)
        rules += [f'TASK: /"{_VISIBLE}{_CHAR}{{0,{max_task_chars - 1}}}"/', f'RULE: /"{_CHAR}{{0,400}}"/']
    lead = "/\\n{0,2}/" if phase == "graph" else f"WORK{{0,{max_work_lines}}}"
    return "\n".join([f"start: {lead} body", f"body: {body}", *rules]) + "\n"


def _children(count: int, first: int) -> list[str]:
    ids = [f'"c{first + i}"' for i in range(count)]
    rules = []
    for i, name in enumerate(ids):
        head, foot = _literal('{"type":"child","id":' + name + ',"task":'), _literal(',"depends_on":[')
        rules.append(f'child_{i}: {head} TASK {foot} deps_{i} "]}}\\n" next_{i}')
        follow = [f"child_{i + 1}"] if i + 1 < count else []
        if i:
            awaits = _literal('{"type":"await","children":[' + ",".join(ids[: i + 1]) + '],"rule":')
            follow.append(awaits + ' RULE "}"')
        rules.append(f"next_{i}: {' | '.join(follow)}")
        # Subsets of the earlier ids, in ascending order: rest_<i>_<j> is what may follow the id before j.
        subsets = ['""', *(f"{_literal(ids[j])} rest_{i}_{j + 1}" for j in range(i))]
        rules.append(f"deps_{i}: {' | '.join(subsets)}")
        rules += [f"rest_{i}_{j}: ({_literal(',' + ids[j])})? rest_{i}_{j + 1}" for j in range(1, i)]
        if i:
            rules.append(f'rest_{i}_{i}: ""')
    return rules


def _literal(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


class EventGrammars:
    """Compiles grammars for one tokenizer and keeps them.

    ``eos_ids`` are allowed at the end beside the tokenizer's own EOS; ``vocab_size`` is that of the model's
    logits where it is larger than the tokenizer's. Masks cost tens of microseconds, and less once a grammar's
    states have been visited, which all of its matchers share.

    Raises ImportError without llguidance, and ValueError for a tokenizer that is not a fast one or has no EOS.
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int | None = None, eos_ids: Iterable[int] = ()) -> None:
        from llguidance.hf import from_tokenizer

        own = tokenizer.eos_token_id
        eos = sorted({*eos_ids, *([own] if own is not None else [])})
        if not eos:
            raise RrmError("a grammar needs an end-of-sequence token, and this tokenizer names none")
        self.eos_ids = frozenset(eos)
        self._tokenizer = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos, slices=_SLICES)
        self._compiled: dict[str, Any] = {}

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.vocab_size)

    def matcher(self, grammar: str) -> "EventMatcher":
        """A matcher at the beginning of ``grammar`` (Lark). Raises RrmError if it cannot be compiled."""
        from llguidance import LLMatcher

        first = self._compiled.get(grammar)
        if first is None:
            first = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
            first.compute_bitmask()  # the first mask is the slowest; its work is shared by the copies
            if first.is_error():
                raise RrmError(f"the grammar cannot be compiled: {first.get_error()}")
            self._compiled[grammar] = first
        return EventMatcher(first.deep_copy(), self.vocab_size, self.eos_ids)


class EventMatcher:
    """Where one sequence stands in its grammar."""

    def __init__(self, state: Any, vocab_size: int, eos_ids: frozenset[int]) -> None:
        self._state = state
        self._vocab_size = vocab_size
        self._words = (vocab_size + 31) // 32
        self._eos_ids = eos_ids

    @property
    def done(self) -> bool:
        """Whether only EOS may follow."""
        return bool(self._state.is_stopped())

    @property
    def accepting(self) -> bool:
        """Whether EOS may follow."""
        return bool(self._state.is_accepting())

    def mask(self) -> NDArray[np.int32]:
        """Bitmask of the tokens that may come next; bit i of word w is token 32 w + i. Read-only."""
        return np.frombuffer(self._state.compute_bitmask(), dtype=np.int32)[: self._words]

    def fill_mask(self, row: Any) -> None:
        """Write `mask` into ``row``: int32, contiguous, on the CPU; a torch tensor or a numpy array.

        Words beyond the vocabulary are cleared. Raises ValueError if ``row`` is too short or of another type.
        """
        if "int32" not in str(row.dtype) or row.ndim != 1 or row.shape[0] < self._words:
            raise ValueError(f"a mask row must be a vector of at least {self._words} int32")
        target = row if isinstance(row, np.ndarray) else row.numpy()
        target[: self._words] = self.mask()
        target[self._words :] = 0

    def accept(self, token_id: int) -> None:
        """Take a token that the model wrote. Raises ValueError, and stays where it was, if it is not allowed."""
        if token_id in self._eos_ids and self.accepting:
            return
        if self._state.try_consume_tokens([token_id]) != 1:
            raise ValueError(f"token {token_id} is not allowed by the grammar here")

    def forced(self) -> list[int]:
        """The tokens that must come next, whatever is sampled; [] where there is a choice."""
        return list(self._state.compute_ff_tokens())

    def copy(self) -> "EventMatcher":
        """An independent matcher at the same place, for a fork."""
        return EventMatcher(self._state.deep_copy(), self._vocab_size, self._eos_ids)

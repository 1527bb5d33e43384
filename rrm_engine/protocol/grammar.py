"""Grammars under which any instruct model writes a valid graph, and their matchers (llguidance).

A matcher is told only what the model writes itself in one phase: it starts fresh at a prompt and at every resume.
It never sees appended turns. Where a phase begins with thinking, the grammar holds from the end of that on.
"""

import re
from collections.abc import Iterable
from copy import copy
from functools import cached_property
from typing import Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from rrm_engine.errors import RrmError
from rrm_engine.protocol.encode import TextEncoder
from rrm_engine.protocol.escapes import QUOTES
from rrm_engine.protocol.events import COUNT_LINE, PLAIN_SHAPE, PlanShape
from rrm_engine.protocol.thinking import DEFAULT, Marks, Thought

PHASES: Final = ("graph", "continuation", "solver")

# Inside a string only \" \\ and \n are possible: LaTeX must then be written as valid JSON, \\frac for \frac.
_CHAR: Final = r'([^"\\\x00-\x1f\x7f]|\\["\\n])'
_VISIBLE: Final = r'[^"\\\x00-\x20\x7f]'
_RULE_START: Final = r'[^"\\\x00-\x20\x7f.]'  # "..." says nothing
# What may stand before FINAL. Without "<": a model that copies "FINAL: <answer>" would not come to an answer.
_LEAD_CHAR: Final = r'([^"\\<\x00-\x1f\x7f]|\\["\\n])'
# What an answer may begin with, so that stripping markup leaves something.
_ANSWER_START: Final = r"([0-9A-Za-z(+\-]|\\\\[A-Za-z])"
_ANSWER_CHAR: Final = r'([^"\\\x00-\x1f\x7f]|\\["\\])'

# Token sets that llguidance precomputes masks for; each lies inside what some of the regexes here repeat.
_SLICES: Final = [r"[^{]{1,60}", r'[^{<"\\\x00-\x1f\x7f]{1,30}', r'[^"\\\x00-\x1f\x7f]{1,30}']


def phase_grammar(width: int, phase: str, marks: Marks, shape: PlanShape, children: int, may_split: bool) -> str:
    """The grammar of a node's next phase: it has had ``children`` and may have ``width`` more, if it may split.

    The rest is as `event_grammar` says, and so are errors.
    """
    return event_grammar(width, may_split=may_split, first=children + 1, phase=phase, marks=marks, shape=shape)


def event_grammar(
    max_children: int,
    *,
    may_split: bool,
    first: int = 1,
    phase: str = "graph",
    marks: Marks = DEFAULT,
    shape: PlanShape = PLAIN_SHAPE,
    max_answer_chars: int = 300,
    max_work_lines: int = 40,
) -> str:
    """The Lark grammar of what a node may write in ``phase``.

    graph         2 to ``max_children`` children with ids c<first>, c<first + 1>, ... that depend only on earlier
                  ones, then an await of all of them; or ``{"type":"atomic"}``, which is all there is if the
                  node may not split or ``max_children`` is below 2. A plan that counts its parts begins with a line
                  ``Parts: 3`` and has as many children, or ``Parts: 1`` in front of the atomic event
    continuation  up to ``max_work_lines`` lines of working, then ``{"type":"atomic","answer":"... FINAL: ..."}``
                  and perhaps a ``done``; or, if the node may split again, children and an await as above
    solver        any text without an object: for nodes that have read events and are not to write any

    ``first`` keeps the ids of a second round apart from the first's; ``marks`` are what the model's thinking stands
    between. Raises ValueError for another phase and
    for a ``first`` or a limit below 1.
    """
    if phase not in PHASES:
        raise ValueError(f"there is no grammar for the phase {phase!r}, only for {', '.join(PHASES)}")
    if min(first, shape.max_task_chars, max_answer_chars, max_work_lines) < 1:
        raise ValueError("first and the limits of a grammar must be at least 1")
    if phase == "solver":
        return f"start: /{_without_objects()}/\n"
    splits = may_split and max_children >= 2
    rules = []
    if phase == "graph":
        body = '"{\\"type\\":\\"atomic\\"}"'
    else:
        body = "answer"
        rules += [
            'answer: "{\\"type\\":\\"atomic\\",\\"answer\\":" ANSWER "}" ("\\n{\\"type\\":\\"done\\"}")?',
            f'ANSWER: /"({_LEAD_CHAR}{{0,{max_answer_chars}}}( |\\\\n))?'
            f'FINAL: {_ANSWER_START}{_ANSWER_CHAR}{{0,120}}"/',
            f"WORK: /{_work_char(marks)}{{0,300}}\\n/",
        ]
    if splits:
        counts = range(2, max_children + 1)
        if shape.counts_parts and phase == "graph":
            body = " | ".join([f'"1\\n" {body}', *(f'"{count}\\n" child_0_of_{count}' for count in counts)])
            body = f"{_literal(COUNT_LINE)} ({body})"
            rules += [rule for count in counts for rule in _children(count, first, f"_of_{count}", exact=True)]
        else:
            body = f"{body} | child_0"
            rules += _children(max_children, first)
        rules += _dependencies(max_children, first)
        rules.append(f'TASK: /"{_VISIBLE}{_CHAR}{{0,{shape.max_task_chars - 1}}}"/')
        rules.append(f'RULE: /"{_RULE_START}{_CHAR}{{0,399}}"/')
    lead = "/\\n{0,2}/" if phase == "graph" else f"WORK{{0,{max_work_lines}}}"
    return "\n".join([f"start: {lead} body", f"body: {body}", *rules]) + "\n"


def _work_char(marks: Marks) -> str:
    """A line of working never opens an object or a thinking block, so that no event is read out of it."""
    begin, then = re.escape(marks.open[0]), re.escape(marks.open[1])
    quoted = r"\"'“”„‘’\s"  # noqa: RUF001
    return rf"([^{{{begin}\x00-\x1f\x7f]|\{{[^{{{begin}{quoted}\x00-\x1f]|{begin}[^{{{begin}{then}\x00-\x1f])"


def _without_objects() -> str:
    """Text in which no brace is followed by a quoted key, as the parser of events wants it."""
    return rf"([^{{]|\{{[\s{{]*[^{{\s{QUOTES}])*"


def _children(count: int, first: int, suffix: str = "", *, exact: bool = False) -> list[str]:
    """Rules for 2 to ``count`` children, or ``exact``ly as many, and their await; each rule's name has the suffix."""
    ids = _ids(count, first)
    rules = []
    for i, name in enumerate(ids):
        head, foot = _literal('{"type":"child","id":' + name + ',"task":'), _literal(',"depends_on":[')
        rules.append(f'child_{i}{suffix}: {head} TASK {foot} deps_{i} "]}}\\n" next_{i}{suffix}')
        follow = [f"child_{i + 1}{suffix}"] if i + 1 < count else []
        if i and not (exact and follow):
            awaits = _literal('{"type":"await","children":[' + ",".join(ids[: i + 1]) + '],"rule":')
            follow.append(awaits + ' RULE "}"')
        rules.append(f"next_{i}{suffix}: {' | '.join(follow)}")
    return rules


def _dependencies(count: int, first: int) -> list[str]:
    """Subsets of the ids before a child's, in ascending order: rest_<i>_<j> is what may follow the id before j."""
    ids = _ids(count, first)
    rules = []
    for i in range(count):
        subsets = ['""', *(f"{_literal(ids[j])} rest_{i}_{j + 1}" for j in range(i))]
        rules.append(f"deps_{i}: {' | '.join(subsets)}")
        rules += [f"rest_{i}_{j}: ({_literal(',' + ids[j])})? rest_{i}_{j + 1}" for j in range(1, i)]
        if i:
            rules.append(f'rest_{i}_{i}: ""')
    return rules


def _ids(count: int, first: int) -> list[str]:
    return [f'"c{first + i}"' for i in range(count)]


def _literal(text: str) -> str:
    return '"' + text.replace('"', '\\"') + '"'


class EventGrammars:
    """Compiles grammars for one tokenizer and keeps them.

    ``eos_ids`` are allowed at the end beside the tokenizer's own EOS; ``vocab_size`` is that of the model's
    logits where it is larger than the tokenizer's. Masks cost tens of microseconds, and less once a grammar's
    states have been visited, which all of its matchers share.

    Raises ImportError without llguidance, and RrmError for a tokenizer that has no EOS or is of a kind that it does not
    know: byte-level ones and SentencePiece's with byte fallback work, Unigram and WordPiece do not.
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int | None = None, eos_ids: Iterable[int] = ()) -> None:
        from llguidance.hf import from_tokenizer

        own = tokenizer.eos_token_id
        eos = sorted({*eos_ids, *([own] if own is not None else [])})
        if not eos:
            raise RrmError(
                "a grammar needs an end-of-sequence token, and neither the tokenizer nor the model names one: name one "
                "in tokenizer_config.json (eos_token), or give --constrain off"
            )
        self.eos_ids = frozenset(eos)
        try:
            self._tokenizer = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos, slices=_SLICES)
        except ValueError as error:  # of a kind that it does not know: its message is the Rust value
            raise RrmError("the tokenizer is of a kind that no grammar can be written for: --constrain off") from error
        self._compiled: dict[str, Any] = {}
        self._core = tokenizer.backend_tokenizer
        self.encode = TextEncoder(tokenizer)
        self._blocks: dict[Marks, ThinkingBlock] = {}

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.vocab_size)

    @overload
    def matcher(self, grammar: str) -> "EventMatcher": ...

    @overload
    def matcher(self, grammar: str, thought: Thought | None) -> "EventMatcher | ThinkingMatcher": ...

    def matcher(self, grammar: str, thought: Thought | None = None) -> "EventMatcher | ThinkingMatcher":
        """A matcher at the beginning of ``grammar`` (Lark), or of the thinking in front of it.

        Raises ValueError if it cannot be compiled.
        """
        from llguidance import LLMatcher

        first = self._compiled.get(grammar)
        if first is None:
            first = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
            first.compute_bitmask()  # the first mask is the slowest; its work is shared by the copies
            if first.is_error():
                raise ValueError(f"the grammar cannot be compiled: {first.get_error()}")
            self._compiled[grammar] = first
        matcher = EventMatcher(first.deep_copy(), self.vocab_size, self.eos_ids)
        return ThinkingMatcher(self._block(thought.marks), thought, matcher) if thought else matcher

    def _block(self, marks: Marks) -> "ThinkingBlock":
        if marks not in self._blocks:
            self._blocks[marks] = ThinkingBlock(self, marks)
        return self._blocks[marks]

    @cached_property
    def ascii_bytes(self) -> list[int]:
        """SentencePiece's tokens for single bytes that are characters: others spell those, and what a run of bytes
        stands for is known only at its end.
        """
        names = (f"<0x{byte:02X}>" for byte in range(0x21, 0x7F))
        return [token for name in names if (token := self._core.token_to_id(name)) is not None]

    def spelled(self, text: str) -> tuple[int, ...]:
        """Tokens that add exactly ``text``; where the tokenizer puts spaces into it, the longest ones that fit."""
        wanted, ids = text.encode(), self.encode([text], continues=True)
        if b"".join(self.texts[token] for token in ids) != wanted:
            ids, known = [], {known: token for token, known in enumerate(self.texts) if known and known in wanted}
            while wanted:
                piece = max(filter(wanted.startswith, known), key=len)
                ids.append(known[piece])
                wanted = wanted[len(piece) :]
        return tuple(ids)

    @cached_property
    def texts(self) -> list[bytes]:
        """What every token adds to a text."""
        return [self._tokenizer.decode_bytes([token]) for token in range(self.vocab_size)]


class EventMatcher:
    """Where one sequence stands in its grammar."""

    cut = False  # it knows of no thinking

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
        """Tokens that spell what must come next; [] where there is a choice. Others may spell the same."""
        return list(self._state.compute_ff_tokens())

    def forced_text(self) -> bytes:
        """All that must come next, whatever tokens spell it."""
        return bytes(self._state.compute_ff_bytes())

    def copy(self) -> "EventMatcher":
        """An independent matcher at the same place, for a fork."""
        return EventMatcher(self._state.deep_copy(), self._vocab_size, self._eos_ids)


class ThinkingBlock:
    """What may be written in a thinking block: anything but an end of sequence, and the block's end in one token with
    more. A token that ends it and goes on with line breaks is possible, for every grammar may begin with two.
    """

    def __init__(self, grammars: EventGrammars, marks: Marks) -> None:
        self.close = marks.close.encode()
        self.eos_ids = grammars.eos_ids
        self.texts = grammars.texts
        self.opening, self.ending = grammars.spelled(marks.open), grammars.spelled(marks.ending)
        self.breaks = {text: grammars.spelled(text) for text in ("\n", "\n\n")}
        self.vocab_size = grammars.vocab_size
        self._back = _borders(self.close)
        free = np.ones(-(-self.vocab_size // 32) * 32, dtype=bool)
        free[self.vocab_size :] = False
        free[list(self.eos_ids)] = False
        free[grammars.ascii_bytes] = False
        self.masks = [_packed(self._without_early_ends(free, state)) for state in range(len(self.close))]

    def read(self, token: int, state: int) -> tuple[int, bytes | None]:
        """How many characters of the end there are after ``token``, and what follows the end if it is there."""
        text = self.texts[token]
        for i, byte in enumerate(text):
            while state and self.close[state] != byte:
                state = self._back[state - 1]
            state += self.close[state] == byte
            if state == len(self.close):
                return 0, text[i + 1 :]
        return state, None

    def _without_early_ends(self, free: NDArray[np.bool_], state: int) -> NDArray[np.bool_]:
        allowed = free.copy()
        for token in self._suspects:
            rest = self.read(token, state)[1]
            if rest and rest.decode(errors="replace") not in self.breaks:
                allowed[token] = False
        return allowed

    @cached_property
    def _suspects(self) -> list[int]:
        """Tokens that go on after the end's last character."""
        last = self.close[-1:]
        return [token for token, text in enumerate(self.texts) if last in text[:-1]]


class ThinkingMatcher:
    """Where one sequence stands in its thinking, and then in its grammar.

    A block the prompt did not open is opened first, and one that reaches its limit is ended, ``cut`` then being True.
    """

    def __init__(self, block: ThinkingBlock, thought: Thought, grammar: EventMatcher) -> None:
        self.cut = False
        self._block = block
        self._grammar = grammar
        self.thinks = True
        self._left = thought.limit
        self._state = 0  # characters of the end that are there
        self._forced = () if thought.opened else block.opening

    def mask(self) -> NDArray[np.int32]:
        """As that of `EventMatcher`."""
        if not self.thinks:
            return self._grammar.mask()
        if self._forced:
            only = np.zeros(32 * len(self._block.masks[0]), dtype=bool)
            only[self._forced[0]] = True
            return _packed(only)
        return self._block.masks[self._state]

    def accept(self, token_id: int) -> None:
        """As that of `EventMatcher`."""
        if not self.thinks:
            self._grammar.accept(token_id)
            return
        if not self.mask()[token_id // 32] >> token_id % 32 & 1:
            raise ValueError(f"token {token_id} is not allowed in thinking here")
        opens = self._forced and not self.cut
        self._forced = self._forced[1:]
        if opens:
            return
        self._state, rest = self._block.read(token_id, self._state)
        if rest is not None:
            self.thinks = False
            for token in self._block.breaks.get(rest.decode(), ()):
                self._grammar.accept(token)
            return
        self._left -= 1
        if self._left <= 0 and not self.cut:
            self.cut, self._forced = True, self._block.ending

    def forced(self) -> list[int]:
        """As that of `EventMatcher`."""
        return list(self._forced) if self.thinks else self._grammar.forced()

    def forced_text(self) -> bytes:
        """As that of `EventMatcher`."""
        return (
            b"".join(map(self._block.texts.__getitem__, self.forced())) if self.thinks else self._grammar.forced_text()
        )

    def copy(self) -> "ThinkingMatcher":
        """An independent matcher at the same place."""
        twin = copy(self)
        twin._grammar = self._grammar.copy()
        return twin


def _packed(allowed: NDArray[np.bool_]) -> NDArray[np.int32]:
    """A bitmask; bit i of word w is token 32 w + i."""
    return np.packbits(allowed, bitorder="little").view(np.int32)


def _borders(text: bytes) -> list[int]:
    """For every beginning of ``text`` its longest proper end that ``text`` begins with (Knuth, Morris and Pratt)."""
    borders = [0]
    for i in range(1, len(text)):
        size = borders[-1]
        while size and text[size] != text[i]:
            size = borders[size - 1]
        borders.append(size + (text[size] == text[i]))
    return borders

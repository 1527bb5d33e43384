"""One node of a job: how its phases decode, its sequence, and what it wrote."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.sequence import Matcher, Sequence
from rrm_engine.graph.types import Phase
from rrm_engine.protocol.detokenize import Detokenizer
from rrm_engine.protocol.encode import Content, TextEncoder
from rrm_engine.protocol.parser import EventParser
from rrm_engine.protocol.thinking import Thought

Grammar = tuple[int, bool]  # children the node has had, whether it may split
MatcherFactory = Callable[[int, bool], Matcher]  # takes a Grammar


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """How one phase decodes; ``matcher`` makes a grammar's state where the phase is constrained, with the ``thought``
    in front of it.
    """

    budget: int
    thinking: bool
    sampling: SamplingParams
    matcher: MatcherFactory | None = None
    thought: Thought | None = None

    def match(self, grammar: Grammar | None) -> Matcher | None:
        return None if self.matcher is None or grammar is None else self.matcher(*grammar)

    def recorded(self, grammar: Grammar | None) -> dict[str, Any]:
        """How the phase decodes, for the trace, so that its tokens can be drawn again."""
        thought = {"thought": asdict(self.thought)} if self.thought else {}
        constrained = grammar and {"children": grammar[0], "may_split": grammar[1], **thought}
        return {"sampling": self.sampling.settings(), "grammar": constrained, "budget": self.budget}


@dataclass(slots=True)
class NodeRun:
    """A node's sequence and the text of its current phase.

    ``ends[i]`` is the length of that text after the phase's i-th token, so that a place in the text can be found
    in the tokens. ``forks`` says for each child where its fork of this node's context ends: the number of tokens,
    those of a token cut in the middle, and the length of the chain of tokens up to there.
    """

    path: str
    sequence: Sequence
    phase: Phase
    parser: EventParser | None
    detokenizer: Detokenizer
    running: bool = True
    turn: int = 0
    user_turns: int = 1  # in its context
    first: int = 0  # index in the sequence of the phase's first sampled token
    pieces: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    events: list[tuple[int, int]] = field(default_factory=list)  # where they stand in the text
    cut: list[int] = field(default_factory=list)  # kept part of a token that an event ended in
    forks: dict[str, tuple[int, list[int], int]] = field(default_factory=dict)
    sampled: list[tuple[int, int]] = field(default_factory=list)  # token ranges that the model wrote
    reasons: list[str] = field(default_factory=list)  # why it stopped decoding, each time
    phases: list[Phase] = field(default_factory=list)  # in which it did
    ready: tuple[float, int] = (0.0, 0)  # when the phase was handed to the engine: time, and steps launched by then
    last: tuple[float, int] = (0.0, 0)  # the same of its last token

    def wrote(self, token: int | None, last: bool) -> str:
        """Note one more token of the phase, None for an end of sequence; the text that is certain with it.

        Behind the ``last`` token nothing is held back any more.
        """
        piece = "" if token is None else self.detokenizer.step(token)
        if last:
            piece += self.detokenizer.end()
        self.pieces.append(piece)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(piece))
        return piece

    def enter(self, phase: Phase, parser: EventParser, detokenizer: Detokenizer) -> None:
        """Begin another phase behind the tokens the sequence has now."""
        self.phase, self.parser, self.running, self.turn = phase, parser, True, self.turn + 1
        self.user_turns += 1
        self.first = len(self.sequence.tokens)
        self.detokenizer, self.pieces, self.ends, self.events, self.cut = detokenizer, [], [], [], []

    def text(self, end: int | None = None) -> str:
        """What it wrote in this phase up to ``end``, without its events."""
        whole = "".join(self.pieces)[:end]
        parts, last = [], 0
        for start, stop in self.events:
            parts.append(whole[last:start])
            last = stop
        return "".join([*parts, whole[last:]])

    def split(self, boundary: int, encode: TextEncoder) -> tuple[int, list[int]]:
        """(tokens, rest): the sequence's tokens up to ``boundary`` in the text, where an event ends, and the kept
        part of a token cut in two there.

        White space behind an event stays with it: only a token that begins something else is cut. Tokens whose text
        came together, as bytes of one character do, are cut as one.
        """
        last = bisect_left(self.ends, boundary)
        text = "".join(self.pieces)
        if not text[boundary : self.ends[last]].strip():
            return self.first + last + 1, []
        begin = self.ends[last - 1] if last else 0
        whole = bisect_left(self.ends, begin) + 1 if begin else 0
        return self.first + whole, encode([Content(text[begin:boundary])], behind=True)

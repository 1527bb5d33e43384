"""A node's tokens, and which token wrote which part of its text."""

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from rrm_engine.graph.paths import NodePath
from rrm_engine.protocol.detokenize import Detokenizer
from rrm_engine.protocol.encode import Content, TextEncoder


class HasTokens(Protocol):
    """Holds all tokens of a node: a sequence of the engine, or a server's context."""

    tokens: list[int]


S = TypeVar("S", bound=HasTokens)


@dataclass(slots=True, eq=False)
class NodeTokens(Generic[S]):
    """A node's sequence and the text of its current phase.

    ``ends[i]`` is the length of that text after the phase's i-th token, so that a place in the text can be found
    in the tokens. ``opens`` is what the text begins with and the model did not write.
    """

    path: NodePath
    sequence: S
    detokenizer: Detokenizer
    first: int = 0  # index in the sequence of the phase's first sampled token
    user_turns: int = 1  # in its context
    opens: str = ""
    pieces: list[str] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)  # kept part of a token that an event ended in
    sampled: list[tuple[int, int]] = field(default_factory=list)  # token ranges that the model wrote

    @property
    def text(self) -> str:
        return self.opens + "".join(self.pieces)

    def wrote(self, token: int | None, last: bool) -> str:
        """Add one more token of the phase, None for an end of sequence; returns the text that becomes certain with it.

        With the ``last`` token, all text that was held back is given out.
        """
        piece = "" if token is None else self.detokenizer.step(token)
        if last:
            piece += self.detokenizer.end()
        self.pieces.append(piece)
        self.ends.append((self.ends[-1] if self.ends else len(self.opens)) + len(piece))
        return piece

    def enter(self, detokenizer: Detokenizer, opens: str = "") -> None:
        """Begin another phase after the tokens the sequence has now, which end with those of ``opens``."""
        self.user_turns += 1
        self.first = len(self.sequence.tokens)
        self.detokenizer, self.pieces, self.ends, self.cut = detokenizer, [], [], []
        self.opens = opens

    def split(self, boundary: int, encode: TextEncoder) -> tuple[int, list[int]]:
        """(number of tokens, rest) up to ``boundary`` in the text, where an event ends: the whole tokens before it, and
        the tokens of what comes before it in a token that spans it.

        White space after an event stays with it, so only a token that begins something else is cut. Tokens whose text
        came together, as the bytes of one character do, are cut as one.
        """
        last = bisect_left(self.ends, boundary)
        text = self.text
        if not text[boundary : self.ends[last]].strip():
            return self.first + last + 1, []
        begin = self.ends[last - 1] if last else len(self.opens)
        whole = bisect_left(self.ends, begin) + 1 if last else 0
        return self.first + whole, encode([Content(text[begin:boundary])], continues=True)

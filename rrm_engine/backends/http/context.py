"""A node's context as its servers are told of it: all its token ids, or its conversation."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rrm_engine.backends.http.wire import Delta, Message
from rrm_engine.backends.tokens import NodeTokens
from rrm_engine.graph.paths import NodePath
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.protocol.detokenize import Detokenizer
from rrm_engine.protocol.thinking import DEFAULT, Marks


class Context(Protocol):
    """What a node was told and has written. ``text`` is what it wrote in its phase, after what that was made to begin
    with.
    """

    @property
    def text(self) -> str: ...

    @property
    def length(self) -> int:
        """Tokens; where only the server knows them the chunks of what it wrote."""

    @property
    def prompt(self) -> Any:
        """What is sent to have it go on; later changes of the context do not change it."""

    def take(self, delta: Delta) -> tuple[str, int]:
        """Add what a chunk brings: the text that is certain with it, and its tokens."""

    def cut(self, at: int) -> None:
        """Forget what was written after the character ``at`` of the phase's text, white space aside."""

    def leave(self) -> None:
        """The phase is over."""

    def say(self, user: str, thinking: bool, opens: str = "") -> int:
        """Begin a phase with what the user says, and an answer that begins with ``opens``; the number of tokens that
        both take, 0 if unknown.
        """

    def fork(self, at: int) -> "Context":
        """One of its own, which ends at the character ``at`` of this one's phase's text."""

    def recorded(self) -> tuple[list[int], list[tuple[int, int]]]:
        """All token ids, none where only the server knows them, and the ranges that the model wrote."""


class Contexts(Protocol):
    """Makes them."""

    @property
    def marks(self) -> Marks: ...

    def opens_thinking(self, thinking: bool) -> bool:
        """Whether what is written begins inside thinking."""

    def open(self, path: NodePath, system: str, user: str, thinking: bool, opens: str = "") -> Context:
        """The context of a node whose answer begins with ``opens``."""


@dataclass(slots=True)
class Ids:
    """A plain list as a node's sequence."""

    tokens: list[int]


@dataclass(frozen=True, slots=True)
class TokenContexts:
    """Contexts of token ids, made as the engine in this process makes them."""

    chat: ChatFormat

    @property
    def marks(self) -> Marks:
        return self.chat.marks

    def opens_thinking(self, thinking: bool) -> bool:
        return self.chat.opens_thinking(thinking)

    def open(self, path: NodePath, system: str, user: str, thinking: bool, opens: str = "") -> "TokenContext":
        tokens = [*self.chat.opening(system, user, thinking), *self.chat.opens(opens)]
        node = NodeTokens(path, Ids(tokens), Detokenizer(self.chat.tokenizer), len(tokens), opens=opens)
        return TokenContext(self.chat, node, bool(system))


@dataclass(slots=True)
class TokenContext:
    """See Context. ``system``: whether it begins with a system text."""

    chat: ChatFormat
    node: NodeTokens[Ids]
    system: bool

    @property
    def text(self) -> str:
        return self.node.text

    @property
    def length(self) -> int:
        return len(self.node.sequence.tokens)

    @property
    def prompt(self) -> list[int]:
        return list(self.node.sequence.tokens)

    def take(self, delta: Delta) -> tuple[str, int]:
        node, pieces = self.node, []
        for i, token in enumerate(delta.tokens):
            last = delta.end is not None and i == len(delta.tokens) - 1
            ends = last and delta.end == "eos" and token in self.chat.encode.control_ids
            ends = ends or token in self.chat.eos_ids  # some servers tell of the end in a chunk after it
            node.sequence.tokens.append(token)
            pieces.append(node.wrote(None if ends else token, last))
        if delta.end is not None and not delta.tokens and node.pieces:  # the end came by itself
            rest = node.detokenizer.end()
            node.pieces[-1] += rest
            node.ends[-1] += len(rest)
            pieces.append(rest)
        return "".join(pieces), len(delta.tokens)

    def cut(self, at: int) -> None:
        keep, self.node.cut = self.node.split(at, self.chat.encode)
        del self.node.sequence.tokens[keep:]

    def leave(self) -> None:
        node = self.node
        if not node.sampled or node.sampled[-1][0] != node.first:
            node.sampled.append((node.first, self.length))

    def say(self, user: str, thinking: bool, opens: str = "") -> int:
        node = self.node
        closed = self._closed()
        turn = self.chat.turn(user, thinking, closed=closed, turns=node.user_turns, system=self.system)
        tokens = [*node.cut, *turn, *self.chat.opens(opens)]
        node.sequence.tokens += tokens
        node.enter(Detokenizer(self.chat.tokenizer), opens)
        return len(tokens)

    def fork(self, at: int) -> "TokenContext":
        node = self.node
        keep, cut = node.split(at, self.chat.encode)
        tokens = node.sequence.tokens[:keep]
        own = NodeTokens(node.path, Ids(tokens), Detokenizer(self.chat.tokenizer), keep, node.user_turns, cut=cut)
        return TokenContext(self.chat, own, self.system)

    def recorded(self) -> tuple[list[int], list[tuple[int, int]]]:
        return list(self.node.sequence.tokens), list(self.node.sampled)

    def _closed(self) -> bool:
        """Whether the end of the node's turn stands there, as the template writes it; another one is taken back."""
        node, tokens = self.node, self.node.sequence.tokens
        if node.cut or len(tokens) == node.first or tokens[-1] not in self.chat.encode.control_ids:
            return False
        if self.chat.closes_with(tokens[-1]):
            return True
        del tokens[-1]
        if node.sampled:
            node.sampled[-1] = (node.first, len(tokens))
        return False


@dataclass(frozen=True, slots=True)
class TurnContexts:
    """Contexts of messages, for servers that are only told what was said."""

    marks: Marks = DEFAULT

    def opens_thinking(self, thinking: bool) -> bool:
        return False  # what the server takes out of the text comes with its marks, see `TurnContext.take`

    def open(self, path: NodePath, system: str, user: str, thinking: bool, opens: str = "") -> "TurnContext":
        messages = [{"role": "system", "content": system}] if system.strip() else []
        return TurnContext(self.marks, [*messages, {"role": "user", "content": user}], [opens], opens)


@dataclass(slots=True)
class TurnContext:
    """See Context. Thinking that a server sends apart from the text stands in it between marks. An answer that begins
    with ``opens`` is sent as an assistant's message to go on with.
    """

    marks: Marks
    messages: list[Message]
    pieces: list[str] = field(default_factory=list)
    opens: str = ""
    thinks: bool = False
    length: int = 0  # chunks of text
    first: int = 0  # of them, where the phase begins
    sampled: list[tuple[int, int]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    @property
    def prompt(self) -> list[Message]:
        begun = [{"role": "assistant", "content": self.opens}] if self.opens else []
        return [*self.messages, *begun]

    def take(self, delta: Delta) -> tuple[str, int]:
        text = ""
        if delta.reasoning:
            text += ("" if self.thinks else self.marks.open) + delta.reasoning
            self.thinks = True
        if self.thinks and (delta.text or delta.end):
            text, self.thinks = text + self.marks.close, False
        text += delta.text
        self.pieces.append(text)
        count = int(bool(delta.text or delta.reasoning))
        self.length += count
        return text, count

    def cut(self, at: int) -> None:
        self.pieces = [self.text[:at]]

    def leave(self) -> None:
        if not self.sampled or self.sampled[-1][0] != self.first:
            self.sampled.append((self.first, self.length))

    def say(self, user: str, thinking: bool, opens: str = "") -> int:
        said = self.marks.visible(self.text).strip()
        self.messages = [*self.messages, {"role": "assistant", "content": said}, {"role": "user", "content": user}]
        self.pieces, self.opens, self.thinks, self.first = [opens], opens, False, self.length
        return 0

    def fork(self, at: int) -> "TurnContext":
        return replace(self, pieces=[self.text[:at]], thinks=False, length=0, first=0, sampled=[])

    def recorded(self) -> tuple[list[int], list[tuple[int, int]]]:
        return [], list(self.sampled)


def tokens_of(prompt: Sequence[Any]) -> int:
    """Tokens of a prompt; 0 for one of messages."""
    return len(prompt) if prompt and isinstance(prompt[0], int) else 0

"""How a child's conclusion gets into its parent's context: as text, or with the KV that the child computed for it.

KV that is attached was computed in the child's context, at the child's positions. Re-rotating the keys corrects the
positions; the other context makes it an approximation, whose error ``Shadows`` measures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rrm_engine.backends.tokens import NodeTokens
from rrm_engine.engine.replicas import Driven
from rrm_engine.engine.sequence import Sequence as EngineSequence
from rrm_engine.graph.types import Conclusion
from rrm_engine.kv.span import Span
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.protocol.style import final_of
from rrm_engine.solver.backend import Continuation

EngineTokens = NodeTokens[EngineSequence]
Render = Callable[[Sequence[Conclusion]], str]  # the user turn that hands conclusions over
Placed = tuple[int, Span]  # index in a turn's tokens where the span goes
PRIVATE_USE = range(0xF0000, 0xFFFFE)


@dataclass(frozen=True, slots=True)
class JoinSettings:
    """``boundary``: how many of a span's first tokens are computed again. ``report``: for how many tokens after each
    resume the distributions are compared with those after the text.
    """

    mode: Literal["text", "splice", "transcript"] = "text"
    boundary: int = 0
    report: int = 16


@dataclass(frozen=True, slots=True)
class Kept:
    """A child's conclusion as the ``tokens`` that the child wrote, and the text ``before`` and ``after`` them that is
    not whole tokens.

    ``span`` is the KV of the tokens from index ``offset`` on, None if they are to be computed.
    """

    before: str
    tokens: list[int]
    after: str
    offset: int = 0
    span: Span | None = None


@dataclass(slots=True)
class Joiner:
    """The joins of one job."""

    engine: Driven
    chat: ChatFormat
    join: JoinSettings
    as_text: int = 0  # conclusions appended as text although ``join.mode`` is another
    _kept: dict[str, Kept] = field(default_factory=dict)  # by the child's path

    def keep(self, parent: EngineTokens, child: EngineTokens, conclusion: Conclusion) -> None:
        """A child has concluded and still has its KV: hold the part that its parent will need."""
        if self.join.mode == "text" or not conclusion.ok:
            return
        whole = self.join.mode == "transcript"
        found = _last_phase(child, self.chat.eos_ids) if whole else _locate(child, final_of(conclusion.answer))
        if found is None:
            return
        first, kept = found
        if not self._text_only(kept.tokens):
            return
        start = first + self.join.boundary
        stop = min(first + len(kept.tokens), child.sequence.table.length)
        if start < stop:
            span = self.engine.of(parent.sequence).keep(parent.sequence, child.sequence, start, stop)
            kept = replace(kept, offset=self.join.boundary, span=span)
        if kept.span is not None or whole:  # without KV the text is tokenised together with its surroundings
            self._kept[child.path] = kept

    def _text_only(self, tokens: Sequence[int]) -> bool:
        """Whether they hold no control tokens but those of thinking; others would forge turns in the parent."""
        marks = self.chat.marks
        allowed = self.chat.encode([marks.open, marks.close])
        return not self.chat.encode.control_ids.intersection(tokens).difference(allowed)

    def turn(
        self,
        node: EngineTokens,
        continuation: Continuation,
        thinking: bool,
        so_far: Mapping[str, Any],
    ) -> tuple[list[int], list[Placed]]:
        """The tokens to append to ``node``, and where in them kept spans go.

        ``so_far`` are the arguments of `ChatFormat.turn` about the conversation so far.
        """
        conclusions, render, plain = continuation.conclusions, continuation.render, continuation.user
        # The KV of a child that concludes under several ids is attached once; the others are text.
        kept = [self._kept.pop(c.node, None) if c.node is not None else None for c in conclusions]
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in plain)
        marks = [next(free) for _ in conclusions]
        marked = [replace(c, answer=mark) for c, mark in zip(conclusions, marks, strict=True)]
        usable = [k is not None and self._fits(i, conclusions, marked, render, plain) for i, k in enumerate(kept)]
        for k, used in zip(kept, usable, strict=True):
            if k is not None and k.span is not None and not used:
                node.sequence.let_go(k.span)
        if self.join.mode != "text":
            self.as_text += usable.count(False)
        if not any(usable):
            return self.chat.turn(plain, thinking, **so_far), []
        user = render([m if used else c for c, m, used in zip(conclusions, marked, usable, strict=True)])
        places = {mark: k for mark, k, used in zip(marks, kept, usable, strict=True) if k is not None and used}
        for mark, k in places.items():
            user = user.replace(mark, k.before + mark + k.after)
        return _fill(self.chat.turn_around(user, places, thinking, **so_far), places)

    def _fits(
        self,
        index: int,
        conclusions: Sequence[Conclusion],
        marked: Sequence[Conclusion],
        render: Render,
        plain: str,
    ) -> bool:
        """Whether the style writes this conclusion exactly once and unchanged, so that its tokens may stand for it."""
        mark = marked[index].answer
        text = render([*conclusions[:index], marked[index], *conclusions[index + 1 :]])
        same = text.replace(mark, final_of(conclusions[index].answer)) == plain
        return text.count(mark) == 1 and (same or self.join.mode == "transcript")


def _last_phase(child: EngineTokens, eos_ids: frozenset[int]) -> tuple[int, Kept] | None:
    """All tokens that a node wrote in its last phase, and the index of the first."""
    tokens = child.sequence.tokens[child.first :]
    if tokens and tokens[-1] in eos_ids:
        tokens = tokens[:-1]
    return (child.first, Kept("", tokens, "")) if tokens else None


def _locate(child: EngineTokens, final: str) -> tuple[int, Kept] | None:
    """The tokens inside the last occurrence of ``final`` in a node's text, and the index of the first.

    None if the text does not contain it literally (it may have been escaped), or no token lies inside it.
    """
    text = "".join(child.pieces)
    begin = text.rfind(final)
    if begin < 0 or not final:
        return None
    end = begin + len(final)
    starts = [0, *child.ends]
    inside = [i for i, stop in enumerate(child.ends) if begin <= starts[i] and stop <= end]
    while inside and not child.pieces[inside[-1]]:  # the beginning of a character that follows
        inside.pop()
    if not inside:
        return None
    first, last = child.first + inside[0], child.first + inside[-1] + 1
    ends = text[begin : starts[inside[0]]], text[child.ends[inside[-1]] : end]
    return first, Kept(ends[0], child.sequence.tokens[first:last], ends[1])


def _fill(parts: Sequence[list[int] | str], places: dict[str, Kept]) -> tuple[list[int], list[Placed]]:
    """Replace marks by the children's tokens. Between two spans there must be a token that is computed."""
    tokens: list[int] = []
    splices: list[Placed] = []
    free = 0
    for part in parts:
        if not isinstance(part, str):
            tokens += part
            continue
        kept = places[part]
        at = len(tokens) + kept.offset
        if kept.span is not None and kept.span.live and at >= free:
            splices.append((at, kept.span))
            free = at + len(kept.span) + 1
        tokens += kept.tokens
    return tokens, [(at, span) for at, span in splices if at + len(span) < len(tokens)]

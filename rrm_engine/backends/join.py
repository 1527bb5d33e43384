"""How a child's conclusion gets into its parent's context: as text, or with the KV that the child computed for it.

KV that is attached was computed in the child's context, at the child's positions. Re-rotation puts the keys right;
that they were made from other neighbours makes it an approximation, which ``Measure`` quantifies.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import torch

from rrm_engine.engine.engine import Engine
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.sequence import Sequence as EngineSequence
from rrm_engine.graph.types import Conclusion
from rrm_engine.kv.span import Span
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.protocol.style import final_of

if TYPE_CHECKING:
    from rrm_engine.backends.job import NodeRun

Render = Callable[[Sequence[Conclusion]], str]  # the user turn that hands conclusions over
Placed = tuple[int, Span]  # index in the tokens of a turn
PRIVATE_USE = range(0xF0000, 0xFFFFE)
BEHIND_ALL = 1 << 62  # as a root: everybody goes before


@dataclass(frozen=True, slots=True)
class Join:
    """The settings: ``boundary`` is how many of a span's first tokens are computed again."""

    mode: Literal["text", "splice", "transcript"] = "text"
    boundary: int = 0
    report: bool = True


@dataclass(frozen=True, slots=True)
class Kept:
    """What stands for a child's conclusion: ``tokens`` the child wrote, between two ends that had to be cut off.

    ``span`` is the KV of those from index ``offset`` on, None if there is none or it is computed again.
    """

    before: str
    tokens: list[int]
    after: str
    offset: int = 0
    span: Span | None = None


@dataclass(slots=True, eq=False)
class Measure:
    """A resume done with text as well: ``shadow`` samples one token behind the same tokens, all of them computed."""

    node: str
    joined: EngineSequence
    shadow: EngineSequence
    logits: torch.Tensor | None = None  # of ``joined``


@dataclass(slots=True)
class Joiner:
    """The joins of one job. ``kl`` (nats, text to spliced) and ``top1`` (whether the likeliest tokens agree) are of
    the next-token distributions behind each resume that was measured, by node.
    """

    engine: Engine
    chat: ChatFormat
    join: Join
    as_text: int = 0  # conclusions appended as text although ``join`` is not
    kl: dict[str, list[float]] = field(default_factory=dict)
    top1: dict[str, list[bool]] = field(default_factory=dict)
    _kept: dict[str, Kept] = field(default_factory=dict)  # by the child's path
    _measures: list[Measure] = field(default_factory=list)
    _shadows: set[str] = field(default_factory=set)

    def keep(self, parent: "NodeRun", child: "NodeRun", conclusion: Conclusion) -> None:
        """A child has concluded and still has its KV: hold what its parent will need of it."""
        if self.join.mode == "text" or not conclusion.ok:
            return
        whole = self.join.mode == "transcript"
        found = _last_phase(child, self.engine.eos_ids) if whole else _locate(child, final_of(conclusion.answer))
        if found is None:
            return
        first, kept = found
        start = first + self.join.boundary
        stop = min(first + len(kept.tokens), child.sequence.table.length)
        if start < stop:
            span = self.engine.keep(parent.sequence, child.sequence, start, stop)
            kept = replace(kept, offset=self.join.boundary, span=span)
        if kept.span is not None or whole:  # what is computed again anyway is better tokenised with its surroundings
            self._kept[child.path] = kept

    def turn(
        self,
        node: "NodeRun",
        conclusions: Sequence[Conclusion],
        render: Render,
        thinking: bool,
        after_eos: bool,
    ) -> tuple[list[int], list[Placed]]:
        """The tokens to append to ``node``, and where in them kept spans go."""
        kept = [self._kept.pop(f"{node.path}.{c.id}", None) for c in conclusions]
        plain = render(conclusions)
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
            return self.chat.turn(plain, thinking, after_eos), []
        user = render([m if used else c for c, m, used in zip(conclusions, marked, usable, strict=True)])
        places = {mark: k for mark, k, used in zip(marks, kept, usable, strict=True) if k is not None and used}
        for mark, k in places.items():
            user = user.replace(mark, k.before + mark + k.after)
        return _fill(self.chat.turn_around(user, places, thinking, after_eos), places)

    def _fits(
        self,
        index: int,
        conclusions: Sequence[Conclusion],
        marked: Sequence[Conclusion],
        render: Render,
        plain: str,
    ) -> bool:
        """Whether the style writes that conclusion once and, for its tokens to be the same, as it is."""
        mark = marked[index].answer
        text = render([*conclusions[:index], marked[index], *conclusions[index + 1 :]])
        same = text.replace(mark, final_of(conclusions[index].answer)) == plain
        return text.count(mark) == 1 and (same or self.join.mode == "transcript")

    def measure(self, node: "NodeRun") -> None:
        """Called right after a resume with spans: let a shadow of the node do the same with text, once there is room.

        The shadow goes behind everybody, takes blocks from nobody and shares full blocks only, so that nothing is
        copied for it; it disturbs no more than the time of a step.
        """
        if not self.join.report:
            return
        joined, size = node.sequence, self.engine.pool.block_size
        key = f"{joined.key}~{len(self._shadows)}"
        shared = joined.table.length // size * size  # up to where it waited: nothing has run since
        options = {"root": BEHIND_ALL, "fork_of": (joined, shared)}
        shadow = self.engine.submit(key, list(joined.tokens), 1, SamplingParams(), **options)  # type: ignore[arg-type]
        shadow.modest = shadow.keep_logits = joined.keep_logits = True
        self._shadows.add(key)
        self._measures.append(Measure(node.path, joined, shadow))

    def on_token(self, sequence: EngineSequence) -> bool:
        """A sequence of the job has a token. True if it is a shadow's, which is nobody else's business."""
        for measure in [m for m in self._measures if sequence in (m.joined, m.shadow)]:
            self._look(measure)
        return sequence.key in self._shadows

    def end(self, path: str | None = None) -> None:
        """A node is over, or with None the whole job: what was not measured by now is not measured."""
        for measure in [m for m in self._measures if path in (m.node, None)]:
            self._look(measure)
            if measure in self._measures:
                self._finish(measure)

    def _look(self, measure: Measure) -> None:
        joined, shadow = measure.joined, measure.shadow
        if measure.logits is None:
            measure.logits, joined.logits = joined.logits, None
        if measure.logits is None or shadow.logits is None:
            return
        text, spliced = shadow.logits.log_softmax(-1), measure.logits.log_softmax(-1)
        self.kl.setdefault(measure.node, []).append(max(0.0, float((text.exp() * (text - spliced)).sum())))
        self.top1.setdefault(measure.node, []).append(bool(text.argmax() == spliced.argmax()))
        self._finish(measure)

    def _finish(self, measure: Measure) -> None:
        self.engine.finish(measure.shadow)
        measure.joined.keep_logits = False
        self._measures.remove(measure)


def _last_phase(child: "NodeRun", eos_ids: frozenset[int]) -> tuple[int, Kept] | None:
    """All that a node wrote in its last phase, and where that begins in its tokens."""
    tokens = child.sequence.tokens[child.first :]
    if tokens and tokens[-1] in eos_ids:
        tokens = tokens[:-1]
    return (child.first, Kept("", tokens, "")) if tokens else None


def _locate(child: "NodeRun", final: str) -> tuple[int, Kept] | None:
    """The tokens that lie inside the last ``final`` of a node's text, and where they begin in its tokens.

    None if the text does not hold it literally (it may have been escaped), or it holds no whole token.
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
    """Put the children's tokens where the marks are. Between two spans there has to be a token that is computed."""
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

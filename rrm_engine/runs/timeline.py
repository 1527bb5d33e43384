"""A job's events as time lines: what every node did when, and what made it do so."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

from rrm_engine.runs.events import (
    Began,
    Cancelled,
    Concluded,
    DidNotFit,
    Ended,
    Event,
    Finished,
    FirstToken,
    JobBegan,
    Paused,
    Readmitted,
    Started,
    Wrote,
    WroteMalformed,
)
from rrm_engine.runs.rows import Row

Interval = tuple[float, float]
ROOT, FALLBACK = "root", "root!direct"
NAMES = {"graph": "plan", "solver": "solve", "direct": "solve", "continuation": "continue"}  # by phase
NO_ROOM = DidNotFit.EVENT  # the phase of a stretch that could not begin
CAUSES = (JobBegan, Wrote, Paused, Concluded)  # what the graph machine answers with starts and resumes
OF_THE_JOB = (JobBegan, Finished)  # not of a node, although they stand at the root
WHILE_RUNNING = (FirstToken, Readmitted, Wrote, WroteMalformed, Paused)


class Incomplete(Exception):
    """A job's events are not all there, or contradict each other or the job's row."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """A node's decoding from its start or a resume to the pause that follows. Times are the events' ``t``.

    ``begin``, ``first`` and ``end`` are indices of the job's events: start or resume, first token (None: it never
    got one, and counts as queued all the time) and pause. ``base`` is the length of the sequence at ``begin``.
    """

    node: str
    phase: str
    begin: int
    first: int | None
    end: int
    after: tuple[str, ...]  # nodes whose conclusions it was given
    base: int
    ready_t: float
    admitted_t: float
    first_t: float
    end_t: float
    put_back: tuple[Interval, ...]  # after the first token: others had its place or its memory

    @property
    def queued(self) -> list[Interval]:
        """When it wanted to run and did not, in order."""
        return [(self.ready_t, self.admitted_t), *self.put_back]


@dataclass(slots=True)
class JobTrace:
    """One job's events in order, the stretches of every node, and the index of the event that ended the node."""

    key: str
    session: int
    row: Row
    events: list[Event]
    nodes: dict[str, list[Stretch]] = field(default_factory=dict)
    over: dict[str, int] = field(default_factory=dict)

    @property
    def span_s(self) -> float:
        return self.events[-1].t - self.events[0].t

    def cause(self, index: int) -> int:
        """The event that the graph machine answered with the one at ``index``: the last of its kind before it."""
        return next(i for i in range(index - 1, -1, -1) if isinstance(self.events[i], CAUSES))

    def stretch_at(self, node: str, index: int) -> Stretch:
        """The stretch of ``node`` that the event at ``index`` stands in or follows."""
        return next(s for s in reversed(self.nodes[node]) if s.begin <= index)

    def tokens_to(self, stretch: Stretch, index: int) -> int:
        """Tokens sampled in ``stretch`` up to the event, those cut off after an event's end included."""
        span = self.events[stretch.begin : min(index, stretch.end) + 1]
        return max(e.tokens for e in span if e.node == stretch.node) - stretch.base

    def real(self, node: str) -> list[Stretch]:
        """The stretches of ``node`` that did begin."""
        return [s for s in self.nodes[node] if s.phase != NO_ROOM]

    def beginning(self, stretch: Stretch) -> Began:
        """The event that began a stretch that did begin."""
        return cast(Began, self.events[stretch.begin])

    def pause(self, stretch: Stretch) -> Paused:
        """The event that a stretch that did begin ended with."""
        return cast(Paused, self.events[stretch.end])

    def end(self, node: str) -> Ended:
        """The event that ended the node."""
        return cast(Ended, self.events[self.over[node]])

    def waits(self, node: str) -> Iterator[tuple[int, int]]:
        """Pairs of events between which the node was paused, and neither ready nor over."""
        stretches = self.nodes[node]
        for stretch, following in pairwise(stretches):
            yield stretch.end, following.begin
        last, over = stretches[-1], self.over[node]
        abandoned = isinstance(self.events[over], Cancelled) and last.phase != NO_ROOM
        if abandoned and self.pause(last).reason != "cancelled":
            yield last.end, over


def follow_nodes(trace: JobTrace) -> None:
    """Fill in ``nodes`` and ``over``. Raises Incomplete where an event cannot follow the one before it."""
    own: dict[str, list[int]] = defaultdict(list)  # indices of each node's events
    for index, event in enumerate(trace.events):
        if not isinstance(event, OF_THE_JOB):
            own[event.node].append(index)
    for path, indices in own.items():
        stretches = _follow(trace, path, indices)
        if stretches:
            trace.nodes[path] = stretches


def _follow(trace: JobTrace, path: str, indices: Sequence[int]) -> list[Stretch]:
    """One node's life: (start pause | resume pause | no_room)* and then concluded or cancelled."""
    stretches: list[Stretch] = []
    phase: list[int] = []  # of the events, those of the phase that it is in
    for index in indices:
        event = trace.events[index]
        out_of_place = bool(phase) != isinstance(event, WHILE_RUNNING) or path in trace.over
        if out_of_place or (isinstance(event, Began) and isinstance(event, Started) != (not stretches)):
            where = f"where trace.jsonl has it (step {event.step})"
            raise Incomplete(f"{path} cannot have the event {event.EVENT} {where}")
        match event:
            case Concluded() | Cancelled():
                trace.over[path] = index
            case DidNotFit():
                stretches.append(_no_stretch(index, event))
            case Paused():
                stretches.append(_stretch(trace.events, [*phase, index]))
                phase = []
            case _:
                phase.append(index)
    if stretches and path not in trace.over:
        raise Incomplete(f"{path} never ends")
    return stretches


def _no_stretch(index: int, event: DidNotFit) -> Stretch:
    """Of a phase that could not begin."""
    t = event.t
    return Stretch(event.node, NO_ROOM, index, None, index, (), event.tokens, t, t, t, t, ())


def _stretch(events: list[Event], phase: Sequence[int]) -> Stretch:
    """Of the node's events in one phase, by their indices, from the start or resume to the pause."""
    begin, end = phase[0], phase[-1]
    start, stop = cast(Began, events[begin]), events[end].t
    first = next((i for i in phase if isinstance(events[i], FirstToken)), None)
    token = stop if first is None else events[first].t
    queued_s = 0.0 if first is None else cast(FirstToken, events[first]).queued_s
    return Stretch(
        node=start.node,
        phase=start.phase,
        begin=begin,
        first=first,
        end=end,
        after=start.after,
        base=start.tokens,
        ready_t=start.t,
        admitted_t=token if first is None else min(token, start.t + queued_s),
        first_t=token,
        end_t=stop,
        put_back=tuple(_put_back(e, token) for i in phase if isinstance(e := events[i], Readmitted)),
    )


def _put_back(event: Readmitted, first_t: float) -> Interval:
    end = max(first_t, event.t - event.ran_s)
    return max(first_t, end - event.queued_s), end

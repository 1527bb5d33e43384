"""A job's events as time lines: what every node did when, and what made it do so."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from rrm_engine.runs.directory import Row

Event = dict[str, Any]
Interval = tuple[float, float]
ROOT, FALLBACK = "root", "root!direct"
NAMES = {"graph": "plan", "solver": "solve", "direct": "solve", "continuation": "continue"}  # by phase
NO_ROOM = "no_room"  # the phase of a stretch that could not begin
CAUSES = ("job", "event", "pause", "concluded")  # what the graph machine answers with starts and resumes
WHILE_RUNNING = ("first_token", "readmitted", "event", "malformed", "pause", "text")


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
        return float(self.events[-1]["t"] - self.events[0]["t"])

    def cause(self, index: int) -> int:
        """The event that the graph machine answered with the one at ``index``: the last of its kind before it."""
        return next(i for i in range(index - 1, -1, -1) if self.events[i]["event"] in CAUSES)

    def stretch_at(self, node: str, index: int) -> Stretch:
        """The stretch of ``node`` that the event at ``index`` stands in or follows."""
        return next(s for s in reversed(self.nodes[node]) if s.begin <= index)

    def tokens_to(self, stretch: Stretch, index: int) -> int:
        """Tokens sampled in ``stretch`` up to the event, those cut off after an event's end included."""
        span = self.events[stretch.begin : min(index, stretch.end) + 1]
        return int(max(e["tokens"] for e in span if e["node"] == stretch.node) - stretch.base)

    def real(self, node: str) -> list[Stretch]:
        """The stretches of ``node`` that did begin."""
        return [s for s in self.nodes[node] if s.phase != NO_ROOM]

    def waits(self, node: str) -> Iterator[tuple[int, int]]:
        """Pairs of events between which the node was paused, and neither ready nor over."""
        stretches = self.nodes[node]
        for stretch, following in pairwise(stretches):
            yield stretch.end, following.begin
        last, over = stretches[-1], self.over[node]
        abandoned = self.events[over]["event"] == "cancelled" and last.phase != NO_ROOM
        if abandoned and self.events[last.end]["reason"] != "cancelled":
            yield last.end, over


def follow_nodes(trace: JobTrace) -> None:
    """Fill in ``nodes`` and ``over``. Raises Incomplete where an event cannot follow the one before it."""
    paths = dict.fromkeys(e["node"] for e in trace.events if e["event"] not in ("job", "finish"))
    try:
        for path in paths:
            stretches = _follow(trace, path)
            if stretches:
                trace.nodes[path] = stretches
    except (KeyError, TypeError) as error:
        raise Incomplete(f"an event lacks what this version records ({error!r})") from None


def _follow(trace: JobTrace, path: str) -> list[Stretch]:
    """One node's life: (start pause | resume pause | no_room)* and then concluded or cancelled."""
    stretches: list[Stretch] = []
    begin: int | None = None
    for index, event in enumerate(trace.events):
        kind = event["event"]
        if event["node"] != path or kind in ("job", "finish"):
            continue
        out_of_place = (begin is not None) != (kind in WHILE_RUNNING) or path in trace.over
        if out_of_place or (kind in ("start", "resume") and (kind == "start") != (not stretches)):
            raise Incomplete(f"{path} cannot have the event {kind} where trace.jsonl has it (step {event['step']})")
        if kind in ("start", "resume"):
            begin = index
        elif kind == NO_ROOM:
            stretches.append(_stretch(trace.events, index, index))
        elif kind == "pause":
            assert begin is not None
            stretches.append(_stretch(trace.events, begin, index))
            begin = None
        elif kind in ("concluded", "cancelled"):
            trace.over[path] = index
    if stretches and path not in trace.over:
        raise Incomplete(f"{path} never ends")
    return stretches


def _stretch(events: list[Event], begin: int, end: int) -> Stretch:
    start, stop = events[begin], float(events[end]["t"])
    own = [(i, e) for i, e in enumerate(events[begin : end + 1], start=begin) if e["node"] == start["node"]]
    first = next((i for i, e in own if e["event"] == "first_token"), None)
    ready, token = float(start["t"]), stop if first is None else float(events[first]["t"])
    none = start["event"] == NO_ROOM
    return Stretch(
        node=start["node"],
        phase=NO_ROOM if none else start["phase"],
        begin=begin,
        first=first,
        end=end,
        after=() if none else tuple(start["after"]),
        base=start["tokens"],
        ready_t=ready,
        admitted_t=token if first is None else min(token, ready + events[first]["queued_s"]),
        first_t=token,
        end_t=stop,
        put_back=tuple(_put_back(e, token) for _, e in own if e["event"] == "readmitted"),
    )


def _put_back(event: Event, first_t: float) -> Interval:
    end = max(first_t, event["t"] - event["ran_s"])
    return max(first_t, end - event["queued_s"]), end

"""Where a recursive row's time went: its latency split into parts along the critical path.

The critical path is walked backwards from the finish. An event that finished, started or resumed something is the
graph machine's answer to the one event that came last of all it had to wait for; so a stretch of decoding that was
made ready by event e leads on to the stretch in which e stands:
    the finish            -> the conclusion of the root, or of the direct solve that stood in for it
    a resume              -> the last conclusion its node waited for, or, had all concluded, the node's own pause
    a child's start       -> the last conclusion it depends on, else its parent's event that declares it
    the root's start      -> the job's beginning, where the walk ends
Every moment between the job's beginning and its finish is crossed exactly once, so the parts add up to that span;
the row's latency may differ from it by TOLERANCE, or the row is reported as incomplete.

In a stretch on the path, up to the event that the path leaves it by, time is
    queued     ready but not taking part: from start or resume to the begin of the step that admits the sequence, if
               not the first it could be in, and later whenever it was put back because others had its place or its
               memory (from the readmission on, what was lost is recomputed: that counts as decoding)
    prefill    from admission to the first token: the steps that ran its prompt or what was appended, other
               sequences' share of these steps included
    root       from the first token on, in the root or the direct solve that stood in for it
    straggler  the same in a descendant, while a node waited for it (or for what it waits for) alone: all others of
               at least two conclusions that the node's next resume was given were there already. The last one of a
               chain of dependent siblings counts too
    children   the same in a descendant at any other time
and between stretches
    gaps       from the event that made a node ready to its start or resume: prompts, tokenising, grammars; from the
               last token to the finish; the job's beginning

Decoding includes what goes on between two steps, and the prefill of other sequences in its steps. Times of medians
are medians of each part, which need not add up.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rrm_engine.runs.events import JobBegan, Resumed
from rrm_engine.runs.timeline import FALLBACK, ROOT, Interval, JobTrace, Stretch

RECURSIVE = "rrm"
PARTS = ("root", "children", "straggler", "prefill", "queued", "gaps")


@dataclass(frozen=True, slots=True)
class Hop:
    """One stretch of the critical path: what it sampled until the path leaves it, in seconds after the job began."""

    node: str
    phase: str
    ready_s: float
    until_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Attribution:
    """A row's latency in parts. ``path_tokens`` were sampled on the path that ``hops`` tell, in order of time.

    The row's ``critical_path_tokens`` is the longest chain counted in tokens; a chain that is shorter in tokens may
    have taken longer.
    """

    key: str
    session: int
    latency_s: float
    span_s: float
    parts: dict[str, float]
    path_tokens: int
    critical_path_tokens: int
    preemptions: int
    hops: list[Hop] = field(default_factory=list)

    @property
    def shares(self) -> dict[str, float]:
        """The parts as fractions of the latency."""
        return {name: seconds / self.latency_s for name, seconds in self.parts.items()}


def is_attributed(trace: JobTrace) -> bool:
    """Recursive rows that ran to their end."""
    return bool(trace.row["mode"] == RECURSIVE and trace.row["status"] != "failed")


def attribute(trace: JobTrace) -> Attribution:
    """Split one job's latency."""
    walk = _Walk(trace)
    walk.run()
    return Attribution(
        key=trace.key,
        session=trace.session,
        latency_s=trace.row["latency_s"],
        span_s=trace.span_s,
        parts=walk.parts(),
        path_tokens=sum(hop.tokens for hop in walk.hops),
        critical_path_tokens=trace.row["critical_path_tokens"],
        preemptions=trace.row["preemptions"],
        hops=walk.hops[::-1],
    )


def medians(found: Sequence[Attribution]) -> dict[str, Any]:
    """Medians over rows: of the latency, of each part in seconds, and of each part's share."""
    if not found:
        return {"rows": 0}
    return {
        "rows": len(found),
        "latency_s": statistics.median(a.latency_s for a in found),
        "parts": {name: statistics.median(a.parts[name] for a in found) for name in PARTS},
        "shares": {name: statistics.median(a.shares[name] for a in found) for name in PARTS},
    }


def as_json(found: Sequence[Attribution]) -> list[dict[str, Any]]:
    """Rows for a JSON file."""
    return [{**asdict(a), "shares": a.shares} for a in found]


class _Walk:
    """From the finish back to the beginning, collecting intervals by what went on in them."""

    def __init__(self, trace: JobTrace) -> None:
        self.trace = trace
        self.hops: list[Hop] = []
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._decoding: list[Interval] = []  # of descendants
        self._alone: list[Interval] = []  # a node waited for one conclusion only

    def run(self) -> None:
        events = self.trace.events
        at, until = self.trace.cause(len(events) - 1), events[-1].t
        while not isinstance(events[at], JobBegan):
            stretch = self.trace.stretch_at(events[at].node, at)
            left = min(stretch.end_t, events[at].t)
            self._seconds["gaps"] += until - left
            self._cross(stretch, left, at)
            at, until = self.trace.cause(stretch.begin), stretch.ready_t
            self._note_straggler(stretch, at)
        self._seconds["gaps"] += until - events[0].t

    def parts(self) -> dict[str, float]:
        """Seconds of each part; what a straggler decoded is taken out of what descendants decoded."""
        alone = sum(_overlap(_merged(self._alone), interval) for interval in self._decoding)
        whole = sum(end - start for start, end in self._decoding)
        return {**self._seconds, "children": whole - alone, "straggler": alone}

    def _cross(self, stretch: Stretch, left: float, at: int) -> None:
        """What went on from the stretch's being ready until ``left``, where the event ``at`` stands."""
        decoding = _without((stretch.first_t, left), stretch.put_back)
        decoded = sum(end - start for start, end in decoding)
        self._seconds["queued"] += stretch.admitted_t - stretch.ready_t + (left - stretch.first_t - decoded)
        self._seconds["prefill"] += stretch.first_t - stretch.admitted_t
        if stretch.node in (ROOT, FALLBACK):
            self._seconds["root"] += decoded
        else:
            self._decoding += decoding
        began = self.trace.events[0].t
        tokens = self.trace.tokens_to(stretch, at)
        self.hops.append(Hop(stretch.node, stretch.phase, stretch.ready_t - began, left - began, tokens))

    def _note_straggler(self, stretch: Stretch, cause: int) -> None:
        """If the stretch was resumed by its last child: since when it had waited for that one alone."""
        trace = self.trace
        given = sorted(trace.over[path] for path in stretch.after if path in trace.nodes)
        if len(given) < 2 or given[-1] != cause or not isinstance(trace.events[stretch.begin], Resumed):
            return
        paused = trace.stretch_at(stretch.node, cause).end_t
        since = max(paused, trace.events[given[-2]].t)
        self._alone.append((since, trace.events[cause].t))


def _without(whole: Interval, cuts: Iterable[Interval]) -> list[Interval]:
    """What is left of ``whole``; ``cuts`` are disjoint and in order."""
    left, (start, stop) = [], whole
    for low, high in cuts:
        if low < stop and high > start:
            left.append((start, max(start, low)))
            start = min(high, stop)
    return [(a, b) for a, b in [*left, (start, stop)] if b > a]


def _merged(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _overlap(intervals: Iterable[Interval], with_: Interval) -> float:
    return sum(max(0.0, min(end, with_[1]) - max(start, with_[0])) for start, end in intervals)

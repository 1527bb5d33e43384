"""What nodes did with their time, from a run's events: the batch, parents that wait, queues, nodes of no use."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from math import fsum
from typing import Any

from rrm_engine.analyze.statistics import mean, median
from rrm_engine.runs.arms import Arm
from rrm_engine.runs.errors import RunError
from rrm_engine.runs.events import Cancelled, WroteMalformed
from rrm_engine.runs.timeline import FALLBACK, ROOT, Interval, JobTrace
from rrm_engine.runs.trust import RECURSIVE

POINTS = 240  # of the batch over time
FORMULAS = {
    "nodes_at_work": "seconds in which nodes were in the batch, summed / seconds in which any was",
    "idle_parents": "of nodes that waited: seconds of waiting for conclusions / seconds from their start to end",
    "queued": "seconds in which nodes were ready and not in the batch / those and the seconds in it",
    "of_no_use": "nodes from which no chain of conclusions led to the answer / nodes of recursive rows",
    "tokens_of_no_use": "tokens that these wrote / tokens that all nodes of recursive rows wrote",
}


def batch_figures(arm: Arm) -> dict[str, Any]:
    """Figures of an arm's jobs whose events are whole; ``left_out`` says how many are not, ``problem`` why none is."""
    jobs: list[tuple[int, JobTrace]] = []
    incomplete, problems = 0, []
    for number, run in enumerate(arm.runs):
        try:
            found = run.trace
        except RunError as error:
            problems.append(str(error))
            continue
        jobs += [(number, trace) for trace in found.jobs]
        incomplete += len(found.incomplete)
    about: dict[str, Any] = {"jobs": len(jobs), "left_out": incomplete, "problem": "; ".join(problems) or None}
    return {**about, **(_figures(jobs) if jobs else {})}


def _figures(jobs: Sequence[tuple[int, JobTrace]]) -> dict[str, Any]:
    recursive = [trace for _, trace in jobs if trace.row["mode"] == RECURSIVE]
    queues = [fsum(end - start for start, end in s.queued) for _, t in jobs for s in _stretches(t)]
    work = fsum(end - start for _, t in jobs for start, end in at_work(t))
    return {
        "nodes_at_work": work / busy if (busy := _busy(jobs)) else None,
        "over_time": over_time(jobs),
        "idle_parents": _idle(recursive),
        "queued": fsum(queues) / (fsum(queues) + work) if work else None,
        "queued_s_median": median(queues),
        "queued_s_max": max(queues, default=None),
        "malformed": sum(isinstance(event, WroteMalformed) for _, t in jobs for event in t.events),
        "recursive": _use(recursive),
    }


def at_work(trace: JobTrace) -> list[Interval]:
    """When nodes of the job were in the batch: from a stretch's admission to its end, but for what it was put back."""
    found: list[Interval] = []
    for stretch in _stretches(trace):
        start = stretch.admitted_t
        for low, high in stretch.put_back:
            found.append((start, low))
            start = high
        found.append((start, stretch.end_t))
    return [(start, end) for start, end in found if end > start]


def useful(trace: JobTrace) -> set[str]:
    """The nodes whose conclusions led to the answer: the one that gave it, those that it was given, and so on."""
    answering = FALLBACK if FALLBACK in trace.nodes and not isinstance(trace.end(FALLBACK), Cancelled) else ROOT
    found, left = set(), [answering]
    while left:
        path = left.pop()
        if path not in found and path in trace.nodes:
            found.add(path)
            left += [given for stretch in trace.nodes[path] for given in stretch.after]
    return found


def tokens_of(trace: JobTrace, path: str) -> int:
    """Tokens that the node wrote."""
    transcript = trace.end(path).transcript
    return sum(stop - start for start, stop in transcript.sampled) if transcript else 0


@dataclass(slots=True)
class _Level:
    """How many intervals hold each moment, from their ends in order of time."""

    changes: Counter[float] = field(default_factory=Counter)

    def add(self, intervals: Iterable[Interval]) -> None:
        for start, end in intervals:
            self.changes[start] += 1
            self.changes[end] -= 1

    def steps(self) -> list[tuple[float, int]]:
        level, found = 0, []
        for t in sorted(self.changes):
            level += self.changes[t]
            found.append((t, level))
        return found


def over_time(jobs: Sequence[tuple[int, JobTrace]]) -> list[dict[str, Any]]:
    """For each process that ran jobs the mean number of nodes in the batch, in up to POINTS spans of equal length: what
    ran directly and what ran recursively, in seconds from its first job on."""
    found = []
    for (run, session), group in groupby(sorted(jobs, key=_process), key=_process):
        traces = [trace for _, trace in group]
        began = min(t.events[0].t for t in traces)
        ended = max(t.events[-1].t for t in traces)
        width = (ended - began) / POINTS
        if width <= 0:
            continue
        series = {}
        for mode in sorted({t.row["mode"] for t in traces}):
            filled = [0.0] * POINTS
            for trace in (t for t in traces if t.row["mode"] == mode):
                for start, end in at_work(trace):
                    _fill(filled, (start - began) / width, (end - began) / width)
            series[mode] = [round(value, 4) for value in filled]
        found.append({"run": run, "session": session, "span_s": ended - began, "nodes": series})
    return found


def _process(job: tuple[int, JobTrace]) -> tuple[int, int]:
    return job[0], job[1].session


def _fill(filled: list[float], start: float, end: float) -> None:
    """Add an interval, in spans, to the share of each span that it covers."""
    for at in range(max(0, int(start)), min(len(filled), int(end) + 1)):
        filled[at] += max(0.0, min(end, at + 1) - max(start, at))


def _busy(jobs: Sequence[tuple[int, JobTrace]]) -> float:
    """Seconds in which any node was in the batch, of all processes."""
    total = 0.0
    for _, group in groupby(sorted(jobs, key=_process), key=_process):
        level = _Level()
        for _, trace in group:
            level.add(at_work(trace))
        steps = level.steps()
        total += fsum(b[0] - a[0] for a, b in pairwise(steps) if a[1] > 0)
    return total


def _idle(traces: Sequence[JobTrace]) -> float | None:
    waited = lived = 0.0
    for trace in traces:
        for path, stretches in trace.nodes.items():
            waits = [trace.events[end].t - trace.events[start].t for start, end in trace.waits(path)]
            if waits:
                waited += fsum(waits)
                lived += trace.events[trace.over[path]].t - stretches[0].ready_t
    return waited / lived if lived else None


def _use(traces: Sequence[JobTrace]) -> dict[str, Any]:
    nodes = [(path, tokens_of(trace, path), path in useful(trace)) for trace in traces for path in trace.nodes]
    tokens, wasted = sum(n for _, n, _ in nodes), sum(n for _, n, used in nodes if not used)
    of_no_use = sum(not used for *_, used in nodes)
    return {
        "nodes": len(nodes),
        "cancelled": sum(isinstance(t.end(path), Cancelled) for t in traces for path in t.nodes),
        "of_no_use": of_no_use / len(nodes) if nodes else None,
        "tokens_of_no_use": wasted / tokens if tokens else None,
        "tokens_mean": mean(n for _, n, _ in nodes),
    }


def _stretches(trace: JobTrace) -> list[Any]:
    return [stretch for path in trace.nodes for stretch in trace.real(path)]

"""What has to hold before a job's events are believed; each check raises Incomplete with a sentence.

The events are counted, every node goes through its life in order (see timeline.py), and what the job's row says
(nodes, resumes, latency, critical path) follows from the events.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite

from rrm_engine.graph.paths import NodePath
from rrm_engine.runs.events import Began, Event, Finished, JobBegan, WroteChild
from rrm_engine.runs.timeline import FALLBACK, NO_ROOM, ROOT, Incomplete, JobTrace

TOLERANCE, TOLERANCE_S = 0.02, 0.02  # of a row's latency against its events: the larger of the two


def check_whole(events: Sequence[Event]) -> None:
    """No event is missing, doubled or out of order."""
    if not events:
        raise Incomplete("trace.jsonl has no events of it")
    last, kinds = events[-1], list(map(type, events))
    one_of_each = kinds.count(JobBegan) == kinds.count(Finished) == 1
    if not one_of_each or kinds[0] is not JobBegan or not isinstance(last, Finished):
        raise Incomplete("its events do not go from one job event to one finish event")
    if last.events != len(events):
        raise Incomplete(f"it had {last.events} events and trace.jsonl has {len(events)} of them")
    if not (all(a.t <= b.t for a, b in pairwise(events)) and isfinite(events[0].t) and isfinite(last.t)):
        raise Incomplete("its events are not in the order of time")


def check_samples(trace: JobTrace) -> None:
    """A node's last event says where in its tokens it sampled; that must be where its stretches are."""
    for path in trace.nodes:
        stretches, transcript = trace.real(path), trace.end(path).transcript
        ranges = transcript.sampled if transcript else ()
        if len(ranges) != len(stretches):
            raise Incomplete(f"{path} decoded {len(ranges)} times and trace.jsonl has {len(stretches)} of them")
        for stretch, (low, high) in zip(stretches, ranges, strict=True):
            if stretch.base != low:
                raise Incomplete(f"a phase of {path} begins at token {stretch.base} and should at {low}")
            # The token of the step in which a node is cancelled is not reported.
            if stretch.first is None and high - low > 1:
                raise Incomplete(f"{path} has no event for the first token of a phase")


def check_against_row(trace: JobTrace) -> None:
    """Every start and resume has its cause, and the row says what the events say."""
    check_causes(trace)
    check_row(trace)


def check_causes(trace: JobTrace) -> None:
    """A node starts for its parent or a sibling, and goes on for its children or itself."""
    made = {event.child for event in trace.events if isinstance(event, WroteChild)}
    for path, stretches in trace.nodes.items():
        parent = NodePath(path).parent or ""
        if parent and path not in made:
            raise Incomplete(f"{path} starts and no event declares it")
        for stretch in stretches:
            by = trace.events[trace.cause(stretch.begin)].node
            family = by in (path, parent) or (NodePath(by).parent or "") in (path, parent)
            if not family and path not in (ROOT, FALLBACK):
                raise Incomplete(f"what made {path} go at step {trace.events[stretch.begin].step} is missing")
            late = [p for p in stretch.after if p in trace.nodes and trace.over[p] > stretch.begin]
            if late:
                raise Incomplete(f"{path} is given the conclusion of {late[0]} before {late[0]} concludes")


def check_row(trace: JobTrace) -> None:
    """What the row measured must follow from the events; a failed job was cut off anywhere."""
    row, phases = trace.row, [len(trace.real(path)) for path in trace.nodes]
    if row["status"] == "failed":
        return
    found = {
        "nodes": (row["nodes"], sum(n > 0 for n in phases)),
        "resumes": (row["resumes"], sum(n - 1 for n in phases if n)),
        "critical_path_tokens": (row["critical_path_tokens"], critical_path_tokens(trace)),
    }
    for name, (told, value) in found.items():
        if told != value:
            raise Incomplete(f"its row says {told} {name} and its events {value}")
    if not abs(trace.span_s - row["latency_s"]) <= max(TOLERANCE * row["latency_s"], TOLERANCE_S):
        raise Incomplete(f"its row says {row['latency_s']:.3f} s and its events {trace.span_s:.3f} s")


def critical_path_tokens(trace: JobTrace) -> int:
    """The longest chain of sampled tokens, defined as in the job's row but from the events alone."""
    ends: dict[str, int] = {}  # the longest chain up to the node's last token so far
    starts: dict[str, int] = {}  # up to its present stretch
    born: dict[str, int] = {}
    for index, event in enumerate(trace.events):
        path = event.node
        if isinstance(event, Began):
            given = [ends[p] for p in event.after if p in ends]
            starts[path] = ends[path] = max([ends.get(path, 0), born.get(path, 0), *given])
        elif path in starts:
            stretch = trace.stretch_at(path, index)
            if stretch.phase != NO_ROOM:
                ends[path] = max(ends[path], starts[path] + event.tokens - stretch.base)
        if isinstance(event, WroteChild) and event.child:
            born[event.child] = ends[path]
    return ends.get(ROOT, 0) + ends.get(FALLBACK, 0)

"""A run as a native Perfetto trace (protobuf), for ui.perfetto.dev and trace_processor.

A process track for each job holds a track for each node, nested as the nodes are. On a node's track
    slices     plan, solve, continue: a stretch of decoding from admission to pause, by its phase; in it prefill, up to
               the first token, and queued, where the sequence was put back; queued before it; wait, while paused
    instants   the events it wrote (child, await, atomic, done, malformed), each repair, and how it ended
    arrows     from the event that declares a child to the child's first slice; from a conclusion to the first slice
               of every stretch that was given it: the parent's, or that of a sibling that depends on it
The process track "engine" holds counters: over the exported jobs the sequences running, queued and waiting (paused);
over all there were, the KV blocks in use, those of them that paused sequences hold (pinned), and the host blocks in use
(offloaded). The process track "profiler" holds the ranges of a run recorded with --profile, each with the nodes it
worked for; of the steps that did so for an exported job. Timestamps are the events' monotonic ``t``. A later session of
the run whose clock lies before that of the one before, after a restart of the machine, is moved to after it.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rrm_engine.graph.paths import NodePath
from rrm_engine.legible import legible
from rrm_engine.runs.events import Event, Started, Wrote, WroteChild
from rrm_engine.runs.timeline import NAMES, NO_ROOM, JobTrace, Stretch
from rrm_engine.trace.command import TraceError
from rrm_engine.trace.packets import Packets
from rrm_engine.trace.profile_reader import Range, RecordedProfile

COUNTERS = ("sequences running", "sequences queued", "sequences waiting")
BLOCKS = {"blocks": "KV blocks used", "pinned": "KV blocks pinned", "offloaded": "KV blocks offloaded"}  # by field
INSTANTS = {"child", "await", "atomic", "done", "malformed", "concluded", "cancelled", NO_ROOM, "finish"}
SESSION_GAP_S = 1.0
UNTOLD = {"kind", "token_ids"}  # the one is the name, the others are many


def export(jobs: Sequence[JobTrace], path: Path, profile: RecordedProfile | None = None) -> None:
    """Write the jobs, and the profile of one of their sessions, to ``path``.

    Raises TraceError without the perfetto package or if it cannot be written.
    """
    try:
        from perfetto.protos.perfetto.trace import perfetto_trace_pb2
    except ImportError:
        raise TraceError("The Perfetto export needs one more package: pip install rrm-engine[trace]") from None
    packets = Packets(perfetto_trace_pb2)
    shifts = session_shifts(jobs)
    _counters(packets, jobs, shifts)
    for trace in jobs:
        _Job(packets, trace, shifts[trace.session]).write()
    if profile:
        _ranges(packets, profile, jobs, shifts)
    try:
        path.write_bytes(packets.serialized())
    except OSError as error:
        raise TraceError(f"{path} cannot be written: {error.strerror or error}") from None


def session_shifts(jobs: Iterable[JobTrace]) -> dict[int, float]:
    """Seconds to add to the times of each session."""
    spans: dict[int, list[float]] = defaultdict(list)
    for trace in jobs:
        spans[trace.session] += [trace.events[0].t, trace.events[-1].t]
    shifts: dict[int, float] = {}
    reached: float | None = None
    for session in sorted(spans):
        begin, end = min(spans[session]), max(spans[session])
        overlaps = reached is not None and begin < reached
        shifts[session] = reached + SESSION_GAP_S - begin if overlaps and reached is not None else 0.0
        reached = end + shifts[session]
    return shifts


def counter_changes(trace: JobTrace) -> list[tuple[float, str, int]]:
    """(time, counter, +1 or -1) for every change of a node's state."""
    changes: list[tuple[float, str, int]] = []

    def during(name: str, start: float, end: float, sign: int = 1) -> None:
        changes.extend([(start, name, sign), (end, name, -sign)])

    running, queued, waiting = COUNTERS
    for path in trace.nodes:
        for stretch in trace.real(path):
            during(queued, stretch.ready_t, stretch.admitted_t)
            during(running, stretch.admitted_t, stretch.end_t)
            for start, end in stretch.put_back:
                during(queued, start, end)
                during(running, start, end, -1)
        for begin, end in trace.waits(path):
            during(waiting, trace.events[begin].t, trace.events[end].t)
    return changes


def _counters(packets: Packets, jobs: Sequence[JobTrace], shifts: Mapping[int, float]) -> None:
    engine = packets.process("engine")
    tracks = {name: packets.counter(name, engine) for name in (*COUNTERS, *BLOCKS.values())}
    changes = [(t + shifts[job.session], name, by) for job in jobs for t, name, by in counter_changes(job)]
    values: Counter[str] = Counter()
    began = min(job.events[0].t + shifts[job.session] for job in jobs)
    moments = {(began, name): 0 for name in COUNTERS}  # the value after all changes of a moment
    for t, name, by in sorted(changes):
        values[name] += by
        moments[t, name] = values[name]
    for (t, name), value in moments.items():
        packets.count(t, tracks[name], value)
    for job in jobs:
        for event in job.events:
            for name, title in BLOCKS.items():
                packets.count(event.t + shifts[job.session], tracks[title], getattr(event, name))


def ranges_of(profile: RecordedProfile, jobs: Iterable[JobTrace]) -> list[Range]:
    """The outermost ranges of a profile that hold work for one of the jobs, of the session it was recorded in."""
    keys = {trace.key for trace in jobs if trace.session == profile.about.get("session", 0)}
    return [outer for outer in profile.outer if any(one.jobs & keys for one in outer.walk())]


def _ranges(packets: Packets, profile: RecordedProfile, jobs: Sequence[JobTrace], shifts: Mapping[int, float]) -> None:
    chosen = ranges_of(profile, jobs)
    if not chosen:
        return
    track = packets.track("ranges", packets.process("profiler"), 0)
    shift = shifts[profile.about.get("session", 0)]

    def write(one: Range) -> None:
        packets.begin(one.start + shift, track, one.name, "range", one.told)
        for inner in one.inner:
            write(inner)
        packets.end(one.end + shift, track)

    for outer in chosen:
        write(outer)


class _Job:
    """Writes one job's tracks, slices, instants and flows."""

    def __init__(self, packets: Packets, trace: JobTrace, shift: float) -> None:
        self.packets = packets
        self.trace = trace
        self.shift = shift
        self.tracks = {"": packets.process(legible(trace.key))}
        self.leaving: dict[int, list[int]] = defaultdict(list)  # event -> flows that begin there
        self.arriving: dict[int, list[int]] = defaultdict(list)  # begin of a stretch -> flows that end there

    def write(self) -> None:
        self._tie()
        for rank, path in enumerate(self.trace.nodes):
            parent, name = NodePath(path).parent or "", NodePath(path).id
            self.tracks[path] = self.packets.track(legible(name), self.tracks[parent], rank)
            waits = dict(self.trace.waits(path))
            for stretch in self.trace.nodes[path]:
                if stretch.phase != NO_ROOM:
                    self._stretch(stretch)
                if over := waits.get(stretch.end):
                    self._slice(path, "wait", "wait", stretch.end_t, self._t(over))
        for index, event in enumerate(self.trace.events):
            if event.node in self.tracks:
                self._instants(index, event)

    def _tie(self) -> None:
        """Number the arrows."""
        declared = {e.child: i for i, e in enumerate(self.trace.events) if isinstance(e, WroteChild)}
        for path in self.trace.nodes:
            for stretch in self.trace.real(path):
                sources = [self.trace.over[p] for p in stretch.after if p in self.trace.nodes]
                if isinstance(self.trace.beginning(stretch), Started) and path in declared:
                    sources.append(declared[path])
                for source in sources:
                    flow = self.packets.new_id()
                    self.leaving[source].append(flow)
                    self.arriving[stretch.begin].append(flow)

    def _stretch(self, stretch: Stretch) -> None:
        flows = self.arriving[stretch.begin]
        if stretch.admitted_t > stretch.ready_t:
            self._slice(stretch.node, "queued", "queue", stretch.ready_t, stretch.admitted_t, arriving=flows)
            flows = []
        if stretch.first is None and not flows:
            return  # it was queued until it was over
        begin, end = self.trace.beginning(stretch), self.trace.pause(stretch)
        notes = {
            "tokens": self.trace.tokens_to(stretch, stretch.end),
            "phase": stretch.phase,
            "reason": end.reason,
            "steps": end.step - begin.step,
            **_annotations(begin, {"phase"}),
        }
        track = self.tracks[stretch.node]
        name = NAMES.get(stretch.phase, stretch.phase)
        self.packets.begin(stretch.admitted_t + self.shift, track, name, "phase", notes, arriving=flows)
        if stretch.first is not None:
            self._slice(stretch.node, "prefill", "prefill", stretch.admitted_t, stretch.first_t)
        for start, stop in stretch.put_back:
            if stop > start:
                self._slice(stretch.node, "queued", "queue", start, stop)
        self.packets.end(stretch.end_t + self.shift, track)

    def _instants(self, index: int, event: Event) -> None:
        name = event.KIND if isinstance(event, Wrote) else event.EVENT
        if name not in INSTANTS:
            return
        track, t = self.tracks[event.node], self._t(index) + self.shift
        title = f"child {legible(event.id)}" if isinstance(event, WroteChild) else name
        notes = {"tokens": event.tokens, **_annotations(event)}
        self.packets.instant(t, track, title, "event", notes, leaving=self.leaving[index])
        for repair in event.repairs if isinstance(event, Wrote) else ():
            self.packets.instant(t, track, f"repair {legible(repair)}", "repair")

    def _slice(
        self, path: str, name: str, category: str, start: float, end: float, arriving: Sequence[int] = ()
    ) -> None:
        track = self.tracks[path]
        self.packets.begin(start + self.shift, track, name, category, arriving=arriving)
        self.packets.end(end + self.shift, track)

    def _t(self, index: int) -> float:
        return self.trace.events[index].t


def _annotations(event: Event, without: Iterable[str] = ()) -> dict[str, Any]:
    """The event's own fields."""
    return {name: value for name, value in event.own().items() if name not in UNTOLD and name not in without}

"""From a recorded run to graphs: after which token each node started its children, and every node's token ids."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

from rrm_engine.graph.paths import NodePath
from rrm_engine.legible import legible_key
from rrm_engine.replay.graph import Append, Await, Child, Decode, Graph, Node, Step
from rrm_engine.replay.reader import GraphError, contains
from rrm_engine.runs.errors import RunError
from rrm_engine.runs.events import Range, Transcript, WroteChild
from rrm_engine.runs.manifest import read_manifest
from rrm_engine.runs.reader import read_jobs, timeline
from rrm_engine.runs.timeline import FALLBACK, ROOT, Incomplete, JobTrace


def check_from(directory: Path) -> None:
    """Raise GraphError unless it is the directory of a run that recorded its token ids."""
    try:
        used = read_manifest(directory).resolved
    except RunError as error:
        raise GraphError(f"--from {directory}: {error}") from None
    if used.get("backend", "local") != "local" and used.get("continue_by") == "turn":
        raise GraphError(f"--from {directory}: its servers gave no token ids, and a replay needs them")


def recorded_graphs(directory: Path, keys: Collection[str] = ()) -> list[Graph]:
    """One graph per finished job of a run, under the job's key ``id/mode/sample``; ``keys`` as for `read_run`. Raises
    GraphError.

    What a node wrote after an await and lost is not in its tokens and not replayed, nodes that never wrote a token
    are left out, and one that was cancelled ends where it was. The fallback of a broken graph is a second root.
    """
    check_from(directory)
    try:
        forks = read_manifest(directory).resolved.get("child_context") == "parent"
        jobs = read_jobs(directory, keys)
    except RunError as error:
        raise GraphError(f"--from {directory}: {error}") from None
    graphs = []
    for job in jobs:
        if job.row is None:
            continue
        try:
            graph = _graph(timeline(job), forks)
        except Incomplete as error:
            raise GraphError(
                f"--from {directory}: the trace of {legible_key(job.key)} cannot be replayed: {error}; "
                "--jobs can leave it out"
            ) from None
        if graph is not None:
            graphs.append(graph)
    if not graphs:
        raise GraphError(f"--from {directory}: no finished job of this run has written a token")
    return graphs


@dataclass(frozen=True, slots=True)
class _Phase:
    """Tokens ``start`` to ``stop`` of a node, sampled in one go once the ``awaited`` had ended."""

    start: int
    stop: int
    awaited: tuple[str, ...]


def _graph(trace: JobTrace, forks: bool) -> Graph | None:
    """The graph of a job; None if no node wrote a token."""
    phases = {name: found for name in trace.nodes if (found := _phases(trace, name))}
    if not phases:
        return None
    tokens = {name: tuple(_transcript(trace, name).token_ids) for name in phases}
    contexts = {name: tokens[name][: phases[name][0].start] for name in phases}
    starts = _child_places(trace, phases)
    shared: dict[str, int] = {}  # child -> tokens of its parent that it starts with
    for child in starts if forks else ():
        parent = NodePath(child).parent or ""
        # Where an event ended inside a token, the fork ends before that token: the child starts there.
        place = _common(contexts[child][:-1], tokens[parent][: starts[child]])
        if any(phase.start < place <= phase.stop for phase in phases[parent]):
            starts[child] = shared[child] = place
    fresh = [context for name, context in contexts.items() if name not in shared]
    prefix = reduce(lambda a, b: a[: _common(a, b[:-1])], fresh, fresh[0][:-1]) if len(fresh) > 1 else ()
    nodes = {}
    for name, found in phases.items():
        own = {child: place for child, place in starts.items() if (NodePath(child).parent or "") == name}
        after = [other for other in trace.real(name)[0].after if other in phases]
        after += [ROOT] if name == FALLBACK and ROOT in phases else []
        prompt = contexts[name][shared.get(name, len(prefix)) :]
        answers = {child: tokens[child][phases[child][-1].start :] for child in own}
        spliced = _transcript(trace, name).spliced
        steps = _with_children(_steps(tokens[name], found, own), contexts[name], spliced, answers)
        nodes[name] = Node(prompt, steps, tuple(after), name in shared)
    return Graph(trace.key, nodes, prefix)


def _transcript(trace: JobTrace, name: str) -> Transcript:
    """Of a node that had a sequence."""
    found = trace.end(name).transcript
    assert found is not None
    return found


def _phases(trace: JobTrace, name: str) -> list[_Phase]:
    """The node's phases that sampled something, with all that was awaited since the one before."""
    phases: list[_Phase] = []
    awaited: tuple[str, ...] = ()
    stretches = trace.real(name)
    ranges = _transcript(trace, name).sampled if stretches else ()
    for turn, (stretch, (start, stop)) in enumerate(zip(stretches, ranges, strict=True)):
        awaited += stretch.after if turn else ()  # the first one's are what it depends on
        if start < stop:
            phases.append(_Phase(start, stop, awaited))
            awaited = ()
    return phases


def _child_places(trace: JobTrace, phases: dict[str, list[_Phase]]) -> dict[str, int]:
    """Tokens that a child's parent had when it had written the child's event."""
    places = {}
    for event in trace.events:
        if isinstance(event, WroteChild) and event.child in phases:
            phase = [p for p in phases[event.node] if p.start < event.tokens][-1]
            places[event.child] = min(event.tokens, phase.stop)
    return places


def _steps(tokens: tuple[int, ...], phases: list[_Phase], children: dict[str, int]) -> tuple[Step, ...]:
    steps: list[Step] = []
    written = phases[0].start
    for phase in phases:
        if known := tuple(name for name in phase.awaited if name in children):
            steps.append(Await(known))
        if phase.start > written:
            steps.append(Append(tokens[written : phase.start]))
        written = phase.start
        for child, place in sorted(children.items(), key=lambda item: item[1]):
            if phase.start < place <= phase.stop:
                steps += [Decode(tokens[written:place])] if place > written else []
                steps.append(Child(child))
                written = place
        steps += [Decode(tokens[written : phase.stop])] if phase.stop > written else []
        written = phase.stop
    return tuple(steps)


def _with_children(
    steps: tuple[Step, ...],
    context: tuple[int, ...],
    spliced: Sequence[Range],
    answers: dict[str, tuple[int, ...]],
) -> tuple[Step, ...]:
    """``steps`` with every append cut where a child's KV was ``spliced`` (ranges of the node's tokens) into it."""
    found: list[Step] = []
    at, free = len(context), dict(answers)
    for step in steps:
        tokens = step.tokens if isinstance(step, Append | Decode) and not isinstance(step.tokens, int) else ()
        stop, done = at + len(tokens), at
        for start, end in spliced if isinstance(step, Append) else ():
            part = tokens[start - at : end - at]
            child = next((name for name, answer in free.items() if contains(answer, part)), None)
            if at <= start < end <= stop and child is not None:
                found += [Append(tokens[done - at : start - at])] if start > done else []
                found.append(Append(part, child))
                done = end
                del free[child]
        rest = tokens[done - at :]
        found += [step] if done == at else [Append(rest)] if rest else []
        at = stop
    return tuple(found)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

"""A recorded run as far as it can be recomputed: settings, and each node's transcript with who wrote what."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.errors import RrmError
from rrm_engine.legible import legible_key
from rrm_engine.protocol.thinking import Marks, Thought
from rrm_engine.runs.checks import check_samples, check_whole
from rrm_engine.runs.directory import Row, row_key
from rrm_engine.runs.reader import TraceError, chosen_jobs, json_lines, refuse_unknown
from rrm_engine.runs.timeline import Event, Incomplete, JobTrace, follow_nodes


class VerifyError(RrmError):
    """A run cannot be verified; the message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``start`` to ``stop`` of a transcript, written by the model in one phase, and how they were drawn.

    ``grammar`` is (children the node had, whether it might split) where the phase was constrained, ``thought`` the
    thinking in front of that; ``budget`` are the tokens that the phase was allowed.
    """

    start: int
    stop: int
    phase: str
    sampling: SamplingParams
    grammar: tuple[int, bool] | None
    budget: int
    thought: Thought | None = None


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """One node's linearised transcript: its prompt, what it wrote, and what was appended in between.

    From the token ``approximate_from`` on KV was attached instead of computed (None: nowhere); ``splice_kl`` is what
    the run measured of that: of every resume the mean KL divergence of the first tokens after it, in nats.
    """

    job: str
    node: str
    tokens: list[int]
    segments: tuple[Segment, ...]
    approximate_from: int | None = None
    splice_kl: tuple[float, ...] = ()

    @property
    def key(self) -> str:
        """The name of its sequence, which seeds its sampling noise."""
        return f"{self.job}:{self.node}"

    @property
    def positions(self) -> list[int]:
        """Where in ``tokens`` the model wrote."""
        return [i for segment in self.segments for i in range(segment.start, segment.stop)]


@dataclass(frozen=True, slots=True)
class Recording:
    """A run's settings and nodes; ``unfinished`` are jobs without a row, which are left out."""

    path: Path
    model: str
    dtype: str
    attention: str
    seed: int
    block_size: int
    step_tokens: int
    max_width: int
    max_sequence_tokens: int
    nodes: tuple[NodeRecord, ...]
    unfinished: int


def read_recording(
    path: Path, nodes: Collection[str] = (), jobs: Collection[str] = (), limit: int | None = None
) -> Recording:
    """The run in ``path``: of the ``jobs`` named the ``nodes`` named (none: all), the first ``limit`` of them.

    A job is named as ``id/mode/sample``, ``id/mode`` or ``id``, a node by its path. Raises VerifyError if the
    directory holds no run, a name is unknown, or a job's trace is not whole.
    """
    try:
        return _read(path, nodes, jobs, limit)
    except TraceError as error:
        raise VerifyError(str(error)) from None


def _read(path: Path, nodes: Collection[str], jobs: Collection[str], limit: int | None) -> Recording:
    manifest = _manifest(path)
    groups: dict[tuple[str, int], list[Event]] = {}
    for event in json_lines(path / "trace.jsonl", {"job", "node", "event"}):
        groups.setdefault((event["job"], event.get("session", 0)), []).append(event)
    rows = {row_key(row): row for row in json_lines(path / "rows.jsonl", {"id", "mode", "sample"})}
    if not rows:
        raise VerifyError(f"{path} has no finished job to verify yet")
    chosen = chosen_jobs(rows, jobs)
    records = [
        record
        for key, row in rows.items()
        if key in chosen
        for record in _job(path, key, row, groups.get((key, row.get("session", 0)), []))
    ]
    known = dict.fromkeys(record.node for record in records)
    for wanted in nodes:
        refuse_unknown("--nodes", wanted, "node", wanted in known, known)
    records = [record for record in records if (not nodes or record.node in nodes) and record.positions][:limit]
    if not records:
        raise VerifyError(f"in the nodes chosen of {path} the model has not written a single token")
    unfinished = len({key for key, _ in groups} - rows.keys())
    return replace(manifest, nodes=tuple(records), unfinished=unfinished)


def _manifest(path: Path) -> Recording:
    file = path / "run.json"
    if not path.is_dir():
        raise VerifyError(f"{path} is not a directory; pass the directory of a recorded run")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        used = data["resolved"]
        return Recording(
            path,
            model=used["model"],
            dtype=used["dtype"],
            attention="sdpa" if used["attention"] == "sdpa" else "auto",  # the compiled kernel is not on every device
            seed=used["seed"],
            block_size=used["block_size"],
            step_tokens=used["step_tokens"],
            max_width=used["max_sibling_width"],
            max_sequence_tokens=used["max_sequence_tokens"],
            nodes=(),
            unfinished=0,
        )
    except FileNotFoundError:
        raise VerifyError(f"{path} holds no run.json; pass the directory of a recorded run") from None
    except (OSError, ValueError) as error:
        raise VerifyError(f"{file} cannot be read ({error})") from None
    except (KeyError, TypeError) as error:
        raise VerifyError(f"{file} lacks a setting that is needed ({error}): another version wrote it") from None


def _job(path: Path, key: str, row: Row, events: list[Event]) -> Iterator[NodeRecord]:
    """A job's nodes. Every event must be there: a trace that was cut short would verify less than it seems to."""
    trace = JobTrace(key, row.get("session", 0), row, events)
    try:
        check_whole(events)
        follow_nodes(trace)
        check_samples(trace)
    except Incomplete as error:
        raise VerifyError(
            f"the trace of {legible_key(key)} in {path / 'trace.jsonl'} is not whole: {error}; --jobs can leave it out"
        ) from None
    for node in trace.nodes:
        record = _node(trace, node)
        if record is not None:
            yield record


def _node(trace: JobTrace, node: str) -> NodeRecord | None:
    """The transcript of a node; None if it never got a sequence."""
    over = trace.events[trace.over[node]]
    begins = [trace.events[stretch.begin] for stretch in trace.real(node)]
    if not begins:
        return None
    try:
        tokens = over["token_ids"]
        segments = tuple(_segment(e, *span) for e, span in zip(begins, over["sampled"], strict=True))
    except (KeyError, TypeError) as error:
        raise VerifyError(
            f"the trace of {legible_key(trace.key)} does not say how {node} was sampled ({error}): another version "
            f"recorded it, so record the run again"
        ) from None
    edges = [edge for segment in segments for edge in (segment.start, segment.stop)]
    if edges[0] < 1 or edges != sorted(edges) or edges[-1] != len(tokens):
        raise VerifyError(
            f"the trace of {legible_key(trace.key)} contradicts itself: {node} has {len(tokens)} tokens, not {edges}"
        )
    attached = min((start for start, _ in over.get("spliced", ())), default=None)
    measured = tuple(report["kl_mean"] for report in over.get("splice_report", ()))
    return NodeRecord(trace.key, node, tokens, segments, attached, measured)


def _segment(event: Event, start: int, stop: int) -> Segment:
    grammar = event["grammar"]
    constrained = (grammar["children"], grammar["may_split"]) if grammar else None
    thought = grammar.get("thought") if grammar else None
    if thought:
        thought = Thought(Marks(**thought["marks"]), thought["opened"], thought["limit"])
    budget = event.get("budget", stop - start)  # older versions left it out, and had no setting that asks for it
    return Segment(start, stop, event["phase"], SamplingParams.of(event["sampling"]), constrained, budget, thought)

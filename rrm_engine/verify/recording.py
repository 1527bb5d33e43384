"""A recorded run as far as it can be recomputed: settings, and each node's transcript with who wrote what."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rrm_engine.errors import RrmError
from rrm_engine.graph.types import Phase
from rrm_engine.legible import legible_key
from rrm_engine.runs.errors import RunError
from rrm_engine.runs.events import Began, Grammar
from rrm_engine.runs.manifest import read_manifest
from rrm_engine.runs.reader import RecordedJob, chosen_jobs, read_jobs, refuse_unknown, timeline
from rrm_engine.runs.timeline import Incomplete, JobTrace

if TYPE_CHECKING:
    from rrm_engine.engine.sampler import SamplingParams


class VerifyError(RrmError):
    """A run cannot be verified; the message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``start`` to ``stop`` of a transcript, written by the model in one phase, and how they were drawn.

    ``grammar`` is what constrained the phase, if anything did; ``budget`` are the tokens that it was allowed.
    """

    start: int
    stop: int
    phase: Phase
    sampling: "SamplingParams"
    grammar: Grammar | None
    budget: int


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
    except RunError as error:
        raise VerifyError(str(error)) from None


def _read(path: Path, nodes: Collection[str], jobs: Collection[str], limit: int | None) -> Recording:
    used = read_manifest(path).resolved
    if (backend := used.get("backend", "local")) != "local":
        raise VerifyError(
            f"{path} was decoded by servers (--backend {backend}), whose numerics and noise are their own: verify "
            f"computes again what the engine in this process wrote"
        )
    found = read_jobs(path)
    finished = {job.key: job for job in found if job.row is not None}
    if not finished:
        raise VerifyError(f"{path} has no finished job to verify yet")
    chosen = chosen_jobs(finished, jobs)
    records = [record for key, job in finished.items() if key in chosen for record in _job(path, job)]
    known = dict.fromkeys(record.node for record in records)
    for wanted in nodes:
        refuse_unknown("--nodes", wanted, "node", wanted in known, known)
    records = [record for record in records if (not nodes or record.node in nodes) and record.positions][:limit]
    if not records:
        raise VerifyError(f"in the nodes chosen of {path} the model has not written a single token")
    try:
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
            nodes=tuple(records),
            unfinished=len({job.key for job in found} - finished.keys()),
        )
    except KeyError as error:
        raise VerifyError(f"the run.json of {path} lacks a setting that is needed ({error})") from None


def _job(path: Path, job: RecordedJob) -> Iterator[NodeRecord]:
    """A job's nodes. Every event must be there: a trace that was cut short would verify less than it seems to."""
    try:
        trace = timeline(job)
    except Incomplete as error:
        where = f"the trace of {legible_key(job.key)} in {path / 'trace.jsonl'}"
        raise VerifyError(f"{where} is not whole: {error}; --jobs can leave it out") from None
    for node in trace.nodes:
        record = _node(trace, node)
        if record is not None:
            yield record


def _node(trace: JobTrace, node: str) -> NodeRecord | None:
    """The transcript of a node; None if it never got a sequence."""
    begins = [trace.beginning(stretch) for stretch in trace.real(node)]
    transcript = trace.end(node).transcript
    if not begins or transcript is None:
        return None
    tokens = transcript.token_ids
    segments = tuple(_segment(e, *span) for e, span in zip(begins, transcript.sampled, strict=True))
    edges = [edge for segment in segments for edge in (segment.start, segment.stop)]
    if edges[0] < 1 or edges != sorted(edges) or edges[-1] != len(tokens):
        raise VerifyError(
            f"the trace of {legible_key(trace.key)} contradicts itself: {node} has {len(tokens)} tokens, not {edges}"
        )
    attached = min((start for start, _ in transcript.spliced), default=None)
    measured = tuple(report.kl_mean for report in transcript.splice_report)
    return NodeRecord(trace.key, node, tokens, segments, attached, measured)


def _segment(event: Began, start: int, stop: int) -> Segment:
    if not event.sampling:
        raise VerifyError(
            f"the trace of {legible_key(event.job)} does not say how {event.node} was sampled: another version "
            f"recorded it, or a server decoded it"
        )
    from rrm_engine.engine.sampler import SamplingParams  # imports torch; refusals need not wait for it

    budget = stop - start if event.budget is None else event.budget  # older runs had no setting that asks for it
    return Segment(start, stop, event.phase, SamplingParams.of(event.sampling), event.grammar, budget)

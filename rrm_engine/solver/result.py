"""A job and its result, for every backend and the bench."""

from dataclasses import dataclass, field
from typing import Any

from rrm_engine.config import MODES
from rrm_engine.errors import RrmError
from rrm_engine.graph.types import Status


@dataclass(frozen=True, slots=True)
class Job:
    """One solve of one task. ``key`` is unique in a run and seeds the job's sampling noise.

    Raises RrmError for a value of the wrong type, an unknown mode and a negative sample.
    """

    id: str
    task: str
    mode: str = "rrm"  # one of rrm_engine.config.MODES
    sample: int = 0

    def __post_init__(self) -> None:
        for name in ("id", "task"):
            if not isinstance(value := getattr(self, name), str):
                raise RrmError(f"the {name} of a Job must be a str, not {value!r}")
        if self.mode not in MODES:
            raise RrmError(f"the mode of a Job must be {' or '.join(MODES)}, not {self.mode!r}")
        if type(self.sample) is not int or self.sample < 0:
            raise RrmError(f"the sample of a Job must be a whole number, at least 0, not {self.sample!r}")

    @property
    def key(self) -> str:
        return f"{self.id}/{self.mode}/{self.sample}"


@dataclass(slots=True)
class JobResult:
    """One finished job. Times are seconds on the monotonic clock; those named ``*_s`` are durations.

    ``forward_prefilled`` counts tokens run through the model that were not sampled there (prompts, conclusions,
    recomputation after preemption), ``forward_decoded`` the sampled tokens run or emitted, ``reused`` prompt tokens
    whose KV was already in the pool (prefix cache or fork). ``critical_path_tokens`` is the longest chain of decoded
    tokens that depend on each other: a child starts where its event ended, a parent resumes after its slowest child.
    ``critical_path_steps`` is that chain in steps; with drafts a step may give several tokens.
    """

    job: Job
    status: Status
    answer: str
    latency_s: float
    ttft_s: float | None = None
    time_to_first_child_s: float | None = None
    model_calls: int = 0
    forward_prefilled: int = 0
    forward_decoded: int = 0
    reused: int = 0
    drafted: int = 0  # guessed tokens that were run
    accepted: int = 0  # of these, those that were then sampled
    critical_path_tokens: int = 0
    critical_path_steps: int = 0
    total_tokens: int = 0  # decoded by all nodes
    nodes: int = 1
    max_depth: int = 0
    max_sibling_width: int = 0
    overlap_s: float = 0.0  # time in which a node and one of its descendants were decoding
    parallel_s: float = 0.0  # time in which at least two nodes were decoding
    resumes: int = 0
    resume_latency_s: list[float] = field(default_factory=list)  # last conclusion -> parent's next token
    forked_blocks: int = 0  # blocks shared by a fork instead of computed
    copied_blocks: int = 0  # copy-on-write copies
    peak_kv_blocks: int = 0
    preemptions: int = 0
    offloaded_blocks: int = 0  # blocks of waiting nodes moved to host memory
    restored_blocks: int = 0  # blocks brought back from there
    spliced_tokens: int = 0  # tokens whose KV was attached instead of computed: what follows them is approximate
    splice_report: list[dict[str, Any]] = field(default_factory=list)  # a SpliceReport per resume that was measured
    text_joins: int = 0  # conclusions appended as text although their KV was to be attached
    servers: dict[str, Any] = field(default_factory=dict)  # by replica what it did: servers, or several devices here
    prompt_sha256: str = ""
    prompt_preview: str = ""
    finish_reasons: dict[str, str] = field(default_factory=dict)  # node path -> reason
    cut: dict[str, int] = field(default_factory=dict)  # setting -> how often its limit ended or refused something
    repairs: dict[str, int] = field(default_factory=dict)  # parser and graph leniencies, counted
    error: str | None = None
    traceback: str | None = field(default=None, repr=False)  # of an error that is a bug; a row does not hold it

"""A row of rows.jsonl: one finished job, what it measured and how it was graded.

The bench writes it when the job is over and graded; its times are seconds, durations are named ``*_s``. What the
measured fields mean stands at ``JobResult``.
"""

from typing import Any, NotRequired, TypedDict

from rrm_engine.runs.typed import WrongShape, check_keys

Row = dict[str, Any]  # as Fields says, and whatever a newer version adds


class Servers(TypedDict, total=False):
    """Which replicas had each node, and, of servers, what waited, was tried again or was found in their caches."""

    continued_by: str
    replicas: dict[str, list[str]]
    queued_s: float
    attempts: int
    restarts: int
    cached_tokens: int | None
    cached_untold: int


class Fields(TypedDict):
    """What is NotRequired was added after the first version of the file; older runs lack it."""

    # the job
    id: str
    task: NotRequired[str]
    mode: str
    sample: int
    # what came out
    status: str
    answer: str
    error: str | None
    finish_reasons: dict[str, str]
    cut: NotRequired[dict[str, int]]
    repairs: dict[str, int]
    prompt_sha256: str
    prompt_preview: str
    # time
    latency_s: float
    ttft_s: float | None
    time_to_first_child_s: float | None
    overlap_s: float
    parallel_s: float
    resume_latency_s: list[float]
    # the graph, and tokens
    model_calls: int
    nodes: int
    max_depth: int
    max_sibling_width: int
    resumes: int
    critical_path_tokens: int
    critical_path_steps: NotRequired[int]
    total_tokens: int
    forward_prefilled: int
    forward_decoded: int
    reused: int
    drafted: NotRequired[int]
    accepted: NotRequired[int]
    # KV
    peak_kv_blocks: int
    forked_blocks: int
    copied_blocks: int
    preemptions: int
    offloaded_blocks: int
    restored_blocks: int
    spliced_tokens: NotRequired[int]
    splice_report: NotRequired[list[dict[str, Any]]]
    text_joins: NotRequired[int]
    servers: NotRequired[Servers]
    # the grade: ``correct`` is None without an expected answer
    expected: str | None
    correct: bool | None
    grading_error: NotRequired[str | None]
    # how it was run: the settings that decide what is measured, the session (0: the run's first), when it was written
    settings: dict[str, Any]
    session: NotRequired[int]
    time: str


def read_row(value: dict[str, Any]) -> Row:
    """``value`` as a row; it may have fields that this version does not know. Raises WrongShape."""
    check_keys(Fields, value, "the row")
    if value["sample"] < 0 or "/" in value["mode"]:
        raise WrongShape(f"the row is of no job: its mode is {value['mode']!a}, its sample {value['sample']}")
    return value


def row_key(row: Row) -> str:
    """The key of the row's job."""
    return job_key(row["id"], row["mode"], row["sample"])


def job_key(id: str, mode: str, sample: int) -> str:
    return f"{id}/{mode}/{sample}"

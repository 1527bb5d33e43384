"""The run loop: jobs in order, rows to the run directory as they finish."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from types import FrameType
from typing import Any, Protocol

from rrm_engine.backends.result import Job, JobResult
from rrm_engine.bench.grading import grade, is_whole, warm_up
from rrm_engine.bench.progress import Display
from rrm_engine.bench.tasks import Task
from rrm_engine.config import RunConfig
from rrm_engine.trace.record import Row, RunDir, row_key

POLICY_GROUPS = ("graph", "memory")  # groups of settings that every row carries


class Solves(Protocol):
    """What the loop needs of a Solver."""

    @property
    def resolved(self) -> RunConfig: ...
    def progress(self) -> dict[str, Any]: ...
    def run(
        self, jobs: Iterable[Job], on_event: Callable[[dict[str, Any]], None] | None = None, concurrency: int = 1
    ) -> Iterator[JobResult]: ...


def plan(tasks: Sequence[Task], config: RunConfig, done: Iterable[Row] = ()) -> list[Job]:
    """The jobs that are missing, pair by pair; the mode that goes first alternates, so that drift hits both."""
    finished = {row_key(row) for row in done}
    jobs = []
    pairs = [(task, sample) for task in tasks for sample in range(config.samples)]
    for number, (task, sample) in enumerate(pairs):
        modes = config.modes if number % 2 == 0 else config.modes[::-1]
        jobs += [Job(task.id, task.problem, mode, sample) for mode in modes]
    return [job for job in jobs if job.key not in finished]


def execute(solver: Solves, jobs: Sequence[Job], tasks: Sequence[Task], directory: RunDir, display: Display) -> None:
    """Run ``jobs``; a row is on disk before the next result is awaited. Ctrl-C passes through between rows."""
    expected = {task.id: task.expected for task in tasks}
    if not all(map(is_whole, expected.values())):
        warm_up()
    config = solver.resolved
    policy = settings_of(config, POLICY_GROUPS)
    results = solver.run(jobs, on_event=directory.event, concurrency=config.task_concurrency)
    total = len(jobs) + len(directory.rows)
    display.start(total, directory.rows, solver.progress)
    try:
        for result in results:
            with interrupts_held():
                row = make_row(result, expected[result.job.id], policy, directory.session)
                directory.add(row)
                display.row(row)
    finally:
        display.stop()
        if close := getattr(results, "close", None):
            close()


def make_row(result: JobResult, expected: str | None, policy: Mapping[str, Any], session: int) -> Row:
    """Every field of the result, the job's spelled out, with the grade and the settings it was run under."""
    job = {f.name: getattr(result.job, f.name) for f in fields(Job)}
    measured = {f.name: getattr(result, f.name) for f in fields(JobResult) if f.name != "job"}
    graded = None if expected is None else result.error is None and grade(result.answer, expected)
    return {
        **job,
        **measured,
        "status": str(result.status),
        "expected": expected,
        "correct": graded,
        "settings": dict(policy),
        "session": session,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }


def settings_of(config: RunConfig, groups: Sequence[str]) -> dict[str, Any]:
    """The settings of some of the groups."""
    return {f.name: getattr(config, f.name) for f in fields(RunConfig) if f.metadata["group"] in groups}


class interrupts_held:
    """Ctrl-C waits for the end of the block, so that a finished row is not lost on its way to the disk."""

    def __enter__(self) -> None:
        self._pending = False
        self._previous: Any = None
        self._active = threading.current_thread() is threading.main_thread()
        if self._active:
            self._previous = signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._pending = True

    def __exit__(self, *exception: object) -> None:
        if self._active:
            signal.signal(signal.SIGINT, self._previous)
            if self._pending and callable(self._previous):
                self._previous(signal.SIGINT, None)

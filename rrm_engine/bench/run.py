"""The run loop: jobs in order, rows to the run directory as they finish."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import fields
from typing import Any, Protocol

from rrm_engine.bench.progress import Display
from rrm_engine.bench.rows import RowWriter
from rrm_engine.bench.tasks import Task
from rrm_engine.command import check_interrupt
from rrm_engine.config import IN_PROCESS_ONLY, SERVERS_ONLY, Resolved, RunConfig
from rrm_engine.runs.directory import RunDir
from rrm_engine.runs.rows import Row, row_key
from rrm_engine.solver.result import Job, JobResult

POLICY_GROUPS = ("graph", "memory")  # groups of settings that every row carries


class Solves(Protocol):
    """What the loop needs of a Solver."""

    @property
    def resolved(self) -> Resolved: ...
    def progress(self) -> dict[str, Any]: ...
    def run(
        self, jobs: Iterable[Job], on_event: Callable[[dict[str, Any]], None] | None = None, concurrency: int = 1
    ) -> Generator[JobResult, None, None]: ...


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
    """Run ``jobs``. Rows are graded and written beside the batch; all that are finished are on disk at the end,
    however it comes.
    """
    expected = {task.id: task.expected for task in tasks}
    config = solver.resolved
    display.start(len(jobs) + len(directory.rows), directory.rows, solver.progress)
    try:
        with RowWriter(directory, display, expected, settings_of(config, POLICY_GROUPS)) as rows:

            def on_event(event: dict[str, Any]) -> None:
                rows.check()
                directory.event(event)
                display.event(event)

            with closing(solver.run(jobs, on_event=on_event, concurrency=config.task_concurrency)) as results:
                for result in results:
                    rows.put(result)
                    check_interrupt()
    finally:
        display.stop()


def settings_of(config: RunConfig, groups: Sequence[str]) -> dict[str, Any]:
    """The settings of some of the groups, without those that its backend knows nothing of."""
    foreign = SERVERS_ONLY if config.backend == "local" else IN_PROCESS_ONLY
    names = [f.name for f in fields(RunConfig) if f.metadata["group"] in groups and f.name not in foreign]
    return {name: getattr(config, name) for name in names}

"""What solves tasks over any backend: one thing at a time, as results or as a stream of events."""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from threading import Lock
from typing import Any, Protocol

from rrm_engine.config import Resolved
from rrm_engine.errors import RrmError
from rrm_engine.graph.types import Limits
from rrm_engine.protocol.style import Style
from rrm_engine.solver.backend import Backend
from rrm_engine.solver.events import Emit, Events
from rrm_engine.solver.loop import run_jobs
from rrm_engine.solver.result import Job, JobResult
from rrm_engine.solver.runtime import Runtime


class ShownBackend(Backend, Protocol):
    """A backend that says what it is doing."""

    def progress(self) -> dict[str, Any]:
        """What is going on now: nodes that run, tokens per second over the last seconds, and what else it has."""


class Solving:
    """Solves tasks, directly or recursively, over ``backend``; ``config`` is the resolved one.

    It does one thing at a time: while a ``run`` or a ``stream`` is not at its end and not closed, another one is
    refused, whichever thread asks for it.
    """

    backend: ShownBackend

    def __init__(self, backend: ShownBackend, style: Style, config: Resolved) -> None:
        self._runtime = Runtime(
            backend,
            style,
            Limits(config.max_depth, config.max_sibling_width, config.max_nodes, solves_afresh=style.solves_afresh),
            config.child_context,
            config.max_row_tokens,
            config.max_row_seconds,
        )
        self._started = 0
        self._busy = Lock()
        self._closed = False

    def solve(self, task: str, mode: str = "rrm", on_event: Emit | None = None) -> JobResult:
        """Solve one task; ``mode`` is ``rrm`` or ``direct``. Otherwise as ``run``."""
        with closing(self.run([self._job(task, mode)], on_event)) as results:
            return next(results)

    def stream(self, task: str, mode: str = "rrm") -> Iterator[dict[str, Any]]:
        """Solve one task and yield its events as they happen.

        Besides the events of ``trace.jsonl`` there is ``{"event": "text", "node": ..., "text": ...}`` for all that
        is written, and last ``{"event": "result", "result": JobResult}``. Otherwise as ``run``.
        """
        job = self._job(task, mode)
        self._refuse_unless_free()
        return self._stream(job)

    def run(
        self, jobs: Iterable[Job], on_event: Emit | None = None, concurrency: int = 1
    ) -> Generator[JobResult, None, None]:
        """Solve jobs, ``concurrency`` at a time; yields each result when it is there.

        ``on_event`` is called with every event as a JSON-ready dict. A job that fails has its error in its result, and
        the others go on. Closing the generator, or an exception such as KeyboardInterrupt, cancels what runs; so does
        an exception in ``on_event``, which is not called again then and comes out of the generator.

        Raises RrmError, at the call, for what is no Job, two jobs with one key, a concurrency below 1, a closed solver
        and one in use.
        """
        jobs = _checked(jobs)
        if type(concurrency) is not int or concurrency < 1:
            raise RrmError(f"concurrency must be a whole number, at least 1, not {concurrency!r}")
        if on_event is not None and not callable(on_event):
            raise RrmError(f"on_event must be something to call, not {on_event!r}")
        self._refuse_unless_free()
        return self._results(jobs, on_event, concurrency)

    def progress(self) -> dict[str, Any]:
        """What is going on now: sequences, blocks, tokens per second over the last seconds."""
        return self.backend.progress()

    def close(self) -> None:
        """From now on nothing can be solved. Raises RrmError while something runs."""
        if not self._closed:
            self._refuse_unless_free()
        self._closed = True

    def _refuse_unless_free(self) -> None:
        if self._closed:
            raise RrmError("this Solver is closed: load another one")
        if self._busy.locked():
            raise RrmError(
                "this Solver is in use: take all results of the run or stream that goes on, or close() that, before "
                "the next one begins"
            )

    def _job(self, task: str, mode: str) -> Job:
        return Job(f"task{self._started}", task, mode)

    def _results(self, jobs: list[Job], emit: Emit | None, concurrency: int) -> Generator[JobResult, None, None]:
        with closing(self._drive(jobs, emit, concurrency)) as drive:
            for result in drive:
                if result is not None:
                    yield result

    def _stream(self, job: Job) -> Iterator[dict[str, Any]]:
        events: deque[dict[str, Any]] = deque()
        with closing(self._drive([job], events.append, 1, texts=True)) as drive:
            for result in drive:
                while events:
                    yield events.popleft()
                if result is not None:
                    yield {"event": "result", "result": result}

    def _drive(
        self, jobs: Iterable[Job], emit: Emit | None, concurrency: int, *, texts: bool = False
    ) -> Generator[JobResult | None, None, None]:
        """What `run_jobs` yields, for as long as nothing else is going on here."""
        self._refuse_unless_free()  # something else may have begun since the call
        with (
            self._busy,
            closing(
                run_jobs(
                    self._runtime, self._noted(jobs), Events(emit), concurrency, first=self._started + 1, texts=texts
                )
            ) as results,
        ):
            yield from results

    def _noted(self, jobs: Iterable[Job]) -> Iterator[Job]:
        """The jobs, counted as they begin."""
        for job in jobs:
            self._started += 1
            yield job


def _checked(jobs: Iterable[Job]) -> list[Job]:
    """The jobs to run. Raises RrmError for what is none, and for two with one key: their noise would be the same."""
    if not isinstance(jobs, Iterable):
        raise RrmError(f"run takes Jobs, in a list for example, not {jobs!r}")
    found: dict[str, Job] = {}
    for job in jobs:
        if not isinstance(job, Job):
            raise RrmError(f"run takes Jobs, not {job!r}")
        if found.setdefault(job.key, job) is not job:
            raise RrmError(f"two jobs have the key {job.key!r}: give them different ids or samples")
    return list(found.values())

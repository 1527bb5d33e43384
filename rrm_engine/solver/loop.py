"""The loop of a run: several jobs at once on one backend."""

from collections.abc import Generator, Iterable
from contextlib import closing

from rrm_engine.solver.backend import Backend, Written
from rrm_engine.solver.events import Events
from rrm_engine.solver.job import JobRun
from rrm_engine.solver.result import Job, JobResult
from rrm_engine.solver.runtime import Runtime


def run_jobs(
    runtime: Runtime, jobs: Iterable[Job], events: Events, concurrency: int, *, first: int = 1, texts: bool = False
) -> Generator[JobResult | None, None, None]:
    """Start jobs up to ``concurrency``, step the backend, and yield results. Yields None after every step.

    ``first`` is the rank of the first job. Jobs still running when the generator is closed are cancelled.
    """
    pending, rank = iter(jobs), first
    runs: list[JobRun] = []
    try:
        while True:
            while len(runs) < concurrency and (job := next(pending, None)) is not None:
                runs.append(JobRun(runtime, job, rank, events, texts=texts))
                rank += 1
                runs[-1].start()
            if not runs:
                return
            step(runtime.backend, runs)
            for run in runs:
                run.keep_limits()
            for run in [r for r in runs if r.result is not None]:
                runs.remove(run)
                run.release()
                yield run.result
            yield None
    finally:
        for run in runs:  # first free what they hold, because writing the events of a cancellation may fail
            run.release()
        for run in runs:
            run.cancel("cancelled")


def step(backend: Backend, runs: Iterable[JobRun]) -> None:
    """One step of the backend for all of ``runs``."""
    by_job = {run.job.key: run for run in runs}
    with closing(_written(backend, list(by_job.values()))) as written:
        for one in written:
            by_job[one.job].on_written(one)


def _written(backend: Backend, runs: Iterable[JobRun]) -> Generator[Written, None, None]:
    """What a step wrote. An error in the step fails every running job, because their nodes' KV may be wrong."""
    try:
        yield from backend.step()
    except Exception as error:
        for run in runs:
            run.fail(error, backend.explain(error, run.job.key))

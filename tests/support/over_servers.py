"""One task over servers and on the engine in this process, and what is compared of it."""

from typing import Any

from served import Server
from short_task import TASK

from rrm_engine.backends.http.solver import HttpSolver
from rrm_engine.config import RunConfig
from rrm_engine.solver.result import Job, JobResult

JOB = Job("t", TASK)
Events = list[dict[str, Any]]


def run(solver: Any, job: Job = JOB) -> tuple[JobResult, Events]:
    events: Events = []
    (result,) = solver.run([job], events.append)
    return result, events


def over(*servers: Server | str, job: Job = JOB, **settings: Any) -> tuple[JobResult, Events]:
    urls = tuple(one if isinstance(one, str) else one.url for one in servers)
    solver = HttpSolver.load(RunConfig(**{"backend": "openai", "base_urls": urls, "request_timeout": 20.0, **settings}))
    try:
        return run(solver, job)
    finally:
        solver.close()


def tokens(events: Events) -> dict[str, Any]:
    """Of every node its tokens, and which of them it wrote."""
    ended = [e for e in events if e["event"] in ("concluded", "cancelled")]
    return {e["node"]: (list(e["token_ids"]), [tuple(one) for one in e["sampled"]]) for e in ended}


def graph(result: JobResult) -> Any:
    return result.status, result.answer, result.nodes, result.resumes, result.finish_reasons

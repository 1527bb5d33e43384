"""Recursive reasoning in one process: a Transformers engine with batched KV continuation.

Solve a task in five lines::

    from rrm_engine import RunConfig, Solver

    solver = Solver.load(RunConfig(model="embedded"))
    result = solver.solve("...", mode="rrm")
    print(result.answer, result.latency_s, result.critical_path_tokens)

``Solver.stream`` yields every event while it happens, ``Solver.run`` solves many jobs in one batch. What cannot be done
is refused with an ``RrmError``, in one sentence.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rrm_engine.config import RunConfig
from rrm_engine.errors import RrmError

if TYPE_CHECKING:
    from rrm_engine.backends.local import Solver
    from rrm_engine.backends.result import Job, JobResult

__all__ = ["Job", "JobResult", "RrmError", "RunConfig", "Solver"]

_LAZY = {
    "Solver": "rrm_engine.backends.local",
    "Job": "rrm_engine.backends.result",
    "JobResult": "rrm_engine.backends.result",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something that needs them is asked for."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

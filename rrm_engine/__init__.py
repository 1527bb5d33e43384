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

if TYPE_CHECKING:
    from rrm_engine.backends.local import Solver
    from rrm_engine.config import RunConfig
    from rrm_engine.errors import RrmError
    from rrm_engine.solver.result import Job, JobResult

    __version__: str

__all__ = ["Job", "JobResult", "RrmError", "RunConfig", "Solver", "__version__"]

_LAZY = {
    "Solver": "rrm_engine.backends.local",
    "Job": "rrm_engine.solver.result",
    "JobResult": "rrm_engine.solver.result",
    "RunConfig": "rrm_engine.config",
    "RrmError": "rrm_engine.errors",
}


def __getattr__(name: str) -> Any:
    """Import what is asked for and nothing before: torch takes seconds, in which a command must hear Ctrl-C."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name == "__version__":
        return _version()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    """Of the installed package; a checkout that is not installed has none."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("rrm-engine")
    except PackageNotFoundError:
        return "(not installed)"

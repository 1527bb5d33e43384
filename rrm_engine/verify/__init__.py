"""Recorded runs checked against plain transformers.

::

    from rrm_engine.verify import verify_run

    for check in verify_run("runs/aime"):
        print(check.key, check.verdict, check.agreement, check.logit_difference)

The command is ``python -m rrm_engine.verify RUN_DIR``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rrm_engine.verify.check import Divergence, NodeCheck
    from rrm_engine.verify.recording import VerifyError
    from rrm_engine.verify.run import verify_run

__all__ = ["Divergence", "NodeCheck", "VerifyError", "verify_run"]

_LAZY = {
    "Divergence": "rrm_engine.verify.check",
    "NodeCheck": "rrm_engine.verify.check",
    "VerifyError": "rrm_engine.verify.recording",
    "verify_run": "rrm_engine.verify.run",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers only when something that needs them is asked for."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Names for the compiled CPU kernels in a profile. torch does not see them, and most of a step's time is theirs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from rrm_kernels.native import NativeAttention, NativeLayer
from rrm_kernels.products import NativeLinear
from torch.profiler import record_function

from rrm_engine.models.lean import Stage

KERNELS = (
    ("rrm::linear", NativeLinear, "__call__"),
    ("rrm::paged_attention", NativeAttention, "__call__"),
    ("rrm::norm", NativeLayer, "norm"),
    ("rrm::add_norm", NativeLayer, "add_norm"),
    ("rrm::rope_store", NativeLayer, "rope_store"),
    ("rrm::silu_mul", NativeLayer, "silu_mul"),
)
# An operator rather than a range, and a tenth of its cost; torch-internal, so its absence is a normal case.
_OPERATOR = getattr(torch._C._profiler, "_RecordFunctionFast", record_function)


@contextmanager
def named_kernels() -> Iterator[None]:
    """While this lasts, torch's profiler sees each call of a compiled kernel under the name above.

    The methods are exchanged for it, so that at any other time a call costs nothing more; and layers are not run in one
    call, which would have one name.
    """
    in_one_call = Stage.in_one_call
    originals = [(owner, method, getattr(owner, method)) for _, owner, method in KERNELS]
    try:
        Stage.in_one_call = False
        for name, owner, method in KERNELS:
            setattr(owner, method, _named(name, getattr(owner, method)))
        yield
    finally:
        Stage.in_one_call = in_one_call
        for owner, method, original in originals:
            setattr(owner, method, original)


def _named(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(call)
    def named(*args: Any, **kwargs: Any) -> Any:
        with _OPERATOR(name):
            return call(*args, **kwargs)

    return named

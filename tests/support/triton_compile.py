"""Compiles every Triton kernel for an H100 without one, called as the package calls them. Run by its test."""

import sys
from typing import Any

import torch
import triton
import triton.language as tl
from rrm_kernels.batch import Scores
from rrm_kernels.buffers import batch_of
from rrm_kernels.ragged import ragged_attention
from rrm_kernels.sharing import SharingCost, find_shared_runs
from rrm_kernels.triton_layer import TritonLayer
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver


@triton.jit
def _broken_kernel(out):
    """Fine for the interpreter, not for the compiler: a variable changes its type in a branch."""
    value = tl.load(out)
    if value > 0:
        value = value.to(tl.float64)
    tl.store(out, value)


compiled: dict[str, int] = {}


class Absent:
    """The driver of a device that can be compiled for, not run on."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(launch: Any) -> Any:
    def run(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        kernel = launch(self, *args, warmup=True, **options)
        assert kernel.asm["cubin"]
        compiled[self.fn.__name__] = compiled.get(self.fn.__name__, 0) + 1
        return kernel

    return run


def attention(dtype: torch.dtype) -> None:
    tables = [[1, 2, 3], [1, 2, 4]]
    pool = torch.zeros(9, 16, 2, 64, dtype=dtype)
    plan = find_shared_runs(tables, [32, 32], 16, SharingCost(0, 0))
    decodes = batch_of([1, 1], [40, 45], tables, 16, torch.device("cpu"), plan)
    query = torch.zeros(2, 10, 64, dtype=dtype)
    ragged_attention(query, pool, pool, decodes, Scores(0.1, sinks=torch.zeros(10)), splits=2)
    prefill = batch_of([20], [40], tables[:1], 16, torch.device("cpu"))
    query = torch.zeros(20, 10, 64, dtype=dtype)
    ragged_attention(query, pool, pool[..., :40].contiguous(), prefill, Scores(0.1, 7, 30.0, torch.zeros(10)))


def others(dtype: torch.dtype) -> None:
    slots = torch.zeros(2, dtype=torch.int64)
    pool = torch.zeros(9, 16, 2, 64, dtype=dtype)
    tables = (torch.zeros(9, 16), torch.zeros(9, 16))
    layer = TritonLayer()
    row, weight = torch.zeros(2, 5120, dtype=dtype), torch.zeros(5120, dtype=dtype)
    layer.norm(row, weight, 1e-6, row)
    layer.add_norm(row, row, weight, 1e-6, row)
    layer.silu_mul(row, torch.zeros(2, 2560, dtype=dtype))
    query, qkv = torch.zeros(2, 10, 64, dtype=dtype), torch.zeros(2, 14 * 64, dtype=dtype)
    for norms in (None, (weight[:64], weight[:64])):
        layer.rope_store(qkv, norms, 1e-6, tables, slots, slots, query, pool, pool)


if __name__ == "__main__":
    driver.set_active(Absent())
    JITFunction.run = compile_only(JITFunction.run)
    if sys.argv[1:] == ["broken"]:
        _broken_kernel[(1,)](torch.zeros(1))
    for name in sys.argv[1:]:
        attention(getattr(torch, name))
    others(torch.bfloat16)
    print(*sorted(compiled.items()), sep="\n")

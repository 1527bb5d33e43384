"""The row-wise parts of a decoder layer in Triton against transformers' own modules."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux)")
from rrm_kernels.tile import INTERPRETED
from rrm_kernels.triton_layer import TritonLayer

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYER = TritonLayer()


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def norm_of(weight: torch.Tensor, eps: float = 1e-6) -> Any:
    norm = Qwen3RMSNorm(len(weight), eps).to(DEVICE)
    norm.weight.data = weight
    return norm


def close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within two units in the last place, where sums may be done in another order.

    Triton's interpreter cuts bf16 off where a GPU rounds it: one more unit for each of up to four roundings.
    """
    truncates = INTERPRETED and result.dtype == torch.bfloat16
    eps = (6 if truncates else 2) * torch.finfo(result.dtype).eps
    return result.shape == expected.shape and torch.allclose(result, expected, rtol=eps, atol=eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 40, 1100])
def test_residual_and_norm(dtype: torch.dtype, width: int) -> None:
    x, weight = random(3, width, dtype=dtype), random(width, dtype=dtype)
    residual = x.flip(0)
    out = torch.empty_like(x)
    LAYER.norm(x, weight, 1e-6, out)
    assert close(out, norm_of(weight)(x))
    LAYER.norm(x, weight, 0.1, out)  # negative control
    assert not close(out, norm_of(weight)(x))
    expected = residual + x
    LAYER.add_norm(x, residual, weight, 1e-6, out)
    assert close(residual, expected)
    assert close(out, norm_of(weight)(expected))
    assert not close(out, norm_of(weight)(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # e^200, which is right
@pytest.mark.parametrize("width", [24, 1030])
def test_silu_mul(dtype: torch.dtype, width: int) -> None:
    gate_up = 4 * random(3, 2 * width, dtype=dtype)
    gate_up[0, 0] = -200.0
    out = torch.empty(3, width, dtype=dtype, device=DEVICE)
    LAYER.silu_mul(gate_up, out)
    gate, up = gate_up.chunk(2, -1)
    assert close(out, F.silu(gate) * up)
    assert not close(out, F.silu(up) * gate)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "half", "normed"), [(6, 2, 16, 8, True), (4, 4, 20, 4, False), (5, 1, 12, 6, True)]
)
def test_norm_rope_and_store(
    dtype: torch.dtype, heads: int, kv_heads: int, width: int, half: int, normed: bool
) -> None:
    rows = 4
    qkv = random(rows, (heads + 2 * kv_heads) * width, dtype=dtype)
    norms = (random(width, dtype=dtype), random(width + 1, dtype=dtype)[1:].contiguous()) if normed else None
    angle = torch.arange(50)[:, None] * 1e4 ** -(torch.arange(half) / half)
    # Rounded to the model's type, as transformers does.
    cosines, sines = (t.to(DEVICE, dtype).float().contiguous() for t in (angle.cos(), angle.sin()))
    tables = cosines, sines
    positions = torch.tensor([0, 7, 49, 3], device=DEVICE)
    slots = torch.tensor([5, 2, -1, 11], device=DEVICE)
    pools = [random(4, 3, kv_heads, width, dtype=dtype) for _ in range(2)]
    before = [pool.clone() for pool in pools]
    query = torch.empty(rows, heads, width, dtype=dtype, device=DEVICE)
    LAYER.rope_store(qkv, norms, 1e-6, tables, positions, slots, query, *pools)

    q, k, v = qkv.view(rows, -1, width).split([heads, kv_heads, kv_heads], dim=1)
    if norms:
        q, k = norm_of(norms[0])(q), norm_of(norms[1])(k)
    cos, sin = (torch.cat([t[positions]] * 2, -1).to(dtype)[None] for t in tables)
    rotated = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    q, k = (t[0].transpose(0, 1) for t in rotated)
    assert close(query, q)
    keys, values = (pool.flatten(0, 1) for pool in pools)
    stored = slots >= 0
    assert close(keys[slots[stored]], k[stored])
    assert torch.equal(values[slots[stored]], v[stored])
    untouched = torch.ones(12, dtype=torch.bool, device=DEVICE)
    untouched[slots[stored]] = False  # the padding row went nowhere
    for pool, old in zip(pools, before, strict=True):
        assert torch.equal(pool.flatten(0, 1)[untouched], old.flatten(0, 1)[untouched])
    LAYER.rope_store(qkv, norms, 1e-6, tables, positions.flip(0), slots, query, *pools)  # negative control
    assert not close(query, q)
    assert not close(keys[slots[stored]], k[stored])

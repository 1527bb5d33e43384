"""Torch references of what runs on static buffers: a layer's row-wise operations, and attention from a batch's buffers.

Slow and simple. They read the same buffers as the kernels and treat padding in the same way, so that padded steps can
be tested without a GPU.
"""

import torch
import torch.nn.functional as F

from rrm_kernels.batch import PagedAttention, PagedBatch, Scores
from rrm_kernels.reference import attend_chunk, chunk_mask


class ReferenceLayer:
    """The methods of ``triton_layer.TritonLayer`` in torch, rounded in the same places."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        """``out = rms_norm(x) * weight``; ``x`` and ``out`` ``[rows, width]``."""
        out.copy_(_norm(x, weight, eps))

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        """``residual += x``, then ``out = rms_norm(residual) * weight``; all ``[rows, width]``."""
        residual += x
        self.norm(residual, weight, eps, out)

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """``out = silu(gate) * up``; ``gate_up`` ``[rows, 2 * width]``, ``out`` ``[rows, width]``."""
        gate, up = gate_up.chunk(2, -1)
        out.copy_(F.silu(gate) * up)

    def rope_store(
        self,
        qkv: torch.Tensor,
        norms: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
        tables: tuple[torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        slots: torch.Tensor,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
    ) -> None:
        """As ``TritonLayer.rope_store``, but waits for the device, because the host leaves out negative slots."""
        rows, heads, width = query.shape
        kv_heads = key_cache.shape[2]
        q, k, v = qkv.view(rows, -1, width).split([heads, kv_heads, kv_heads], dim=1)
        if norms is not None:
            q, k = _norm(q, norms[0], eps), _norm(k, norms[1], eps)
        cos, sin = (table[positions].to(qkv.dtype)[:, None] for table in tables)
        query.copy_(_rotate(q, cos, sin))
        stored = slots >= 0
        for cache, new in ((key_cache, _rotate(k, cos, sin)), (value_cache, v)):
            cache.view(-1, kv_heads, width)[slots[stored]] = new[stored]


class ReferenceRagged(PagedAttention):
    """Attention computed from the batch's device buffers alone. Rows that belong to no sequence become NaN."""

    name = "sdpa"
    capturable = True

    def __call__(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, batch: PagedBatch, scores: Scores
    ) -> torch.Tensor:
        """See ``PagedAttention``. Shared runs are ignored, and each sequence reads all its blocks."""
        starts, lengths = batch.query_start.tolist(), batch.context_len.tolist()
        out = query.new_full((*query.shape[:2], value_cache.shape[3]), float("nan"))
        for i in range(int(batch.num_seqs)):
            start, stop, length = starts[i], starts[i + 1], lengths[i]
            if stop > start:
                mask = chunk_mask(stop - start, length, scores.window, query)
                table = batch.block_table[i : i + 1]
                given = (query[start:stop], key_cache, value_cache, table, length, mask, scores)
                out[start:stop] = attend_chunk(*given)
        return out


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype) * weight


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

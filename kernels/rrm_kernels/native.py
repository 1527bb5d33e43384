"""The compiled CPU kernels: decode attention that reads K and V in place, and a layer's operations between its
products.

Where they cannot be compiled, the loaders raise NativeUnavailable and callers fall back to torch.
"""

import ctypes

import torch

from rrm_kernels import reference
from rrm_kernels.batch import PagedAttention, PagedBatch, Scores
from rrm_kernels.build import NativeUnavailable, load_library

__all__ = ["NativeAttention", "NativeLayer", "NativeUnavailable", "load_native", "load_native_layer"]

DTYPES = (torch.float32, torch.bfloat16)
POINTER, NUMBER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class NativeAttention(PagedAttention):
    """``reference.paged_attention``, with decodes computed by the compiled kernel."""

    name = "native"

    def __init__(self, library: ctypes.CDLL) -> None:
        self._decode = library.rrm_paged_decode
        self._decode.restype = None
        self._decode.argtypes = [ctypes.c_int, *[POINTER] * 7, *[NUMBER] * 7, REAL, REAL, NUMBER]

    def __call__(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, batch: PagedBatch, scores: Scores
    ) -> torch.Tensor:
        """As ``reference.paged_attention``, which is called for other dtypes than fp32 and bf16."""
        if query.dtype not in DTYPES or key_cache.dtype != query.dtype or query.device.type != "cpu":
            return reference.paged_attention(query, key_cache, value_cache, batch, scores)
        query = query.contiguous()
        out = query.new_empty(query.shape[0], query.shape[1], value_cache.shape[3])
        if batch.decodes:
            self._run(query, key_cache, value_cache, out, batch, scores)
        reference.attend_chunks(out, query, key_cache, value_cache, batch, scores)
        return out

    def _run(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        out: torch.Tensor,
        batch: PagedBatch,
        scores: Scores,
    ) -> None:
        _, block_size, kv_heads, value_width = value_cache.shape
        sinks = scores.fp32_sinks()
        self._decode(
            query.dtype == torch.bfloat16,
            query.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            out.data_ptr(),
            batch.block_table.data_ptr(),
            batch.context_len.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            batch.decodes,
            batch.block_table.shape[1],
            block_size,
            query.shape[1],
            kv_heads,
            query.shape[2],
            value_width,
            scores.scale,
            scores.softcap or 0.0,
            scores.window or 0,
        )


class NativeLayer:
    """The row-wise operations of a decoder layer, rounded where transformers rounds. Tensors are fp32 or bf16,
    contiguous and on CPU.

    Arguments are not checked: ``rrm_engine.models.lean`` allocates them itself.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self._norm, self._silu, self._rope = library.rrm_norm, library.rrm_silu_mul, library.rrm_rope_store
        for function in (self._norm, self._silu, self._rope):
            function.restype = None
        self._norm.argtypes = [ctypes.c_int, *[POINTER] * 4, NUMBER, NUMBER, REAL]
        self._silu.argtypes = [ctypes.c_int, *[POINTER] * 2, NUMBER, NUMBER]
        self._rope.argtypes = [ctypes.c_int, *[POINTER] * 10, *[NUMBER] * 5, REAL]

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
        """``out = rms_norm(x) * weight``; ``x`` and ``out`` ``[rows, width]``."""
        rows, width = x.shape
        is_bf16 = x.dtype == torch.bfloat16
        self._norm(is_bf16, x.data_ptr(), None, weight.data_ptr(), out.data_ptr(), rows, width, eps)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        """``residual += x``, then ``out = rms_norm(residual) * weight``; all ``[rows, width]``."""
        rows, width = x.shape
        is_bf16, to = x.dtype == torch.bfloat16, residual.data_ptr()
        self._norm(is_bf16, x.data_ptr(), to, weight.data_ptr(), out.data_ptr(), rows, width, eps)

    def silu_mul(self, gate_up: torch.Tensor, out: torch.Tensor) -> None:
        """``out = silu(gate) * up``; ``gate_up`` ``[rows, 2 * width]``, ``out`` ``[rows, width]``."""
        rows, width = out.shape
        self._silu(out.dtype == torch.bfloat16, gate_up.data_ptr(), out.data_ptr(), rows, width)

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
        """Rotate queries into ``query`` and store rotated keys, and values, at ``slots`` of the caches.

        ``qkv`` ``[rows, (heads + 2 * kv heads) * width]``, ``query`` ``[rows, heads, width]``; ``norms``: the weights
        ``[width]`` of a per-head RMS norm of queries and of keys; ``tables``: cos and sin, fp32
        ``[positions, rotary / 2]``; ``positions`` and ``slots`` int64 ``[rows]``.
        """
        rows, heads, width = query.shape
        cos, sin = tables
        self._rope(
            qkv.dtype == torch.bfloat16,
            qkv.data_ptr(),
            None if norms is None else norms[0].data_ptr(),
            None if norms is None else norms[1].data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            positions.data_ptr(),
            slots.data_ptr(),
            query.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            rows,
            heads,
            key_cache.shape[2],
            width,
            2 * cos.shape[1],
            eps,
        )


def load_native(variant: str | None = None) -> NativeAttention:
    """Decode attention. ``variant`` and exceptions: as ``load_library``."""
    return NativeAttention(load_library(variant))


def load_native_layer(variant: str | None = None) -> NativeLayer:
    """A layer's operations between its matrix products. ``variant`` and exceptions: as ``load_library``."""
    return NativeLayer(load_library(variant))

"""A decoder's layers on CPU in one call of the compiled kernels, for steps in which every row is a decode."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rrm_kernels.batch import PagedBatch, Scores
from rrm_kernels.products import NativeLinear

POINTER, NUMBER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


@dataclass(frozen=True, slots=True)
class Norm:
    """An RMS norm: ``weight`` ``[width]``."""

    weight: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One layer, all of it in fp32 or all in bf16; ``norms``: of each head's queries and keys, if there are any.

    ``keys`` and ``values`` are its pools ``[blocks, block size, kv heads, width]``; ``next_norm`` is that of the layer
    after it, or the model's last.
    """

    qkv: NativeLinear
    norms: tuple[Norm, Norm] | None
    heads: int
    scores: Scores
    keys: torch.Tensor
    values: torch.Tensor
    output: NativeLinear
    mlp_norm: Norm
    gate_up: NativeLinear
    down: NativeLinear
    next_norm: Norm


class _Layer(ctypes.Structure):
    """As in decoder.cpp."""

    _fields_ = (
        *((name, POINTER) for name in ("qkv", "output", "gate_up", "down")),
        *((name, POINTER) for name in ("q_norm", "k_norm", "mlp_norm", "next_norm")),
        *((name, POINTER) for name in ("keys", "values")),
        *((name, NUMBER) for name in ("heads", "kv_heads", "width", "gated", "window")),
        *((name, REAL) for name in ("scale", "qk_eps", "mlp_eps", "next_eps")),
    )


class NativeDecoder:
    """Runs layers over the pools that they name, bit for bit as one call of their kernels after the other."""

    def __init__(self, library: ctypes.CDLL, layers: Sequence[DecoderLayer]) -> None:
        """``library`` is that of every layer's products."""
        assert all(
            product.library is library
            for layer in layers
            for product in (layer.qkv, layer.output, layer.gate_up, layer.down)
        )
        self._kept = tuple(layers)  # what the structure below points to
        self._layers = (_Layer * len(layers))(*map(_described, layers))
        self._at = ctypes.addressof(self._layers)
        self._run = library.rrm_decode_layers
        self._run.restype = None
        self._run.argtypes = [
            *(ctypes.c_int, POINTER, NUMBER),
            *(POINTER, POINTER, NUMBER, NUMBER),
            *(POINTER, POINTER, POINTER, POINTER, NUMBER),
            *(POINTER, POINTER, NUMBER, NUMBER),
        ]

    def __call__(
        self,
        residual: torch.Tensor,
        normed: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        batch: PagedBatch,
    ) -> None:
        """``residual`` ``[rows, hidden]`` and its first norm ``normed`` become the layers' output and its last norm.

        ``tables``: cos and sin, fp32 ``[positions, rotary / 2]``; ``positions`` int64 ``[rows]``; every row of the
        batch is a decode.
        """
        rows, hidden = residual.shape
        cos, sin = tables
        self._run(
            residual.dtype == torch.bfloat16,
            self._at,
            len(self._layers),
            residual.data_ptr(),
            normed.data_ptr(),
            rows,
            hidden,
            positions.data_ptr(),
            batch.slots.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            2 * cos.shape[1],
            batch.block_table.data_ptr(),
            batch.context_len.data_ptr(),
            batch.block_table.shape[1],
            batch.block_size,
        )


def _described(layer: DecoderLayer) -> _Layer:
    norms = layer.norms
    assert layer.scores.softcap is None and layer.scores.sinks is None  # no model of this shape has them
    _, _, kv_heads, width = layer.keys.shape
    return _Layer(
        layer.qkv.address,
        layer.output.address,
        layer.gate_up.address,
        layer.down.address,
        None if norms is None else norms[0].weight.data_ptr(),
        None if norms is None else norms[1].weight.data_ptr(),
        layer.mlp_norm.weight.data_ptr(),
        layer.next_norm.weight.data_ptr(),
        layer.keys.data_ptr(),
        layer.values.data_ptr(),
        layer.heads,
        kv_heads,
        width,
        layer.down.depth,
        layer.scores.window or 0,
        layer.scores.scale,
        0.0 if norms is None else norms[0].eps,
        layer.mlp_norm.eps,
        layer.next_norm.eps,
    )

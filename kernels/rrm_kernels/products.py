"""Linear layers on CPU by the compiled kernel: ``x @ weight.T + bias`` with the weight laid out as it is read."""

import ctypes
from enum import IntEnum

import torch

from rrm_kernels.build import NativeUnavailable, load_library

POINTER, NUMBER = ctypes.c_void_p, ctypes.c_int64


class Kind(IntEnum):
    """How the kernel multiplies: what ``x`` and the weight hold. As in products.cpp."""

    FP32 = 1
    FP32_BY_BF16 = 2  # fp32 weights that bf16 holds exactly: same results from half the memory
    BF16 = 3
    BF16_DOT = 4  # with the processor's own product of pairs
    BF16_TILES = 5  # with the processor's own product of tiles


class _Linear(ctypes.Structure):
    _fields_ = (
        ("panels", POINTER),
        ("bias", POINTER),
        ("columns", NUMBER),
        ("depth", NUMBER),
        ("kind", ctypes.c_int32),
    )


class NativeLinear:
    """A packed weight; fp32 or bf16, summed up in fp32.

    Every output is one sum in the order of depth, rounded once: a row's result depends neither on the other rows nor
    on the number of threads.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, kind: Kind | None = None, variant: str | None = None
    ) -> None:
        """``weight`` ``[columns, depth]`` and ``bias`` ``[columns]``, neither is kept; ``kind``: default the fastest.

        ``variant``: of the library. Raises NativeUnavailable with the reason.
        """
        if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
            raise NativeUnavailable(f"there is no compiled product for {weight.dtype} on {weight.device}")
        self.library = library = load_library(variant)
        self.columns, self.depth = weight.shape
        self.dtype = weight.dtype
        weight = weight.detach().contiguous()
        if kind is None:
            kind = Kind(library.rrm_linear_kind(weight.dtype == torch.bfloat16))
        if kind == Kind.FP32 and torch.equal((narrow := weight.bfloat16()).float(), weight):
            kind, weight = Kind.FP32_BY_BF16, narrow
        library.rrm_linear_size.restype = NUMBER
        library.rrm_linear_size.argtypes = [NUMBER, NUMBER]
        library.rrm_linear_pack.restype = None
        library.rrm_linear_pack.argtypes = [ctypes.c_int, POINTER, POINTER, NUMBER, NUMBER]
        self._panels = weight.new_empty(library.rrm_linear_size(self.columns, self.depth))
        is_bf16 = weight.dtype == torch.bfloat16
        library.rrm_linear_pack(is_bf16, weight.data_ptr(), self._panels.data_ptr(), self.columns, self.depth)
        padding = -self.columns % library.rrm_linear_tile()
        self._bias = None if bias is None else torch.nn.functional.pad(bias.detach().float(), (0, padding))
        bias_at = None if self._bias is None else self._bias.data_ptr()
        self._linear = _Linear(self._panels.data_ptr(), bias_at, self.columns, self.depth, kind)
        self.address = ctypes.addressof(self._linear)  # what the library calls a Linear*
        self._multiply = library.rrm_linear
        self._multiply.restype = ctypes.c_bool
        self._multiply.argtypes = [POINTER, POINTER, POINTER, NUMBER]
        if not self._multiply(self.address, None, None, 0):
            raise NativeUnavailable(f"this processor or compiler has no {kind.name} product")

    @property
    def kind(self) -> Kind:
        return Kind(self._linear.kind)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` ``[..., depth]`` in the weight's dtype; returns ``[..., columns]``. Raises ValueError for another."""
        *rows, depth = x.shape
        if depth != self.depth or x.dtype != self.dtype:
            raise ValueError(f"expected [..., {self.depth}] {self.dtype}, got {list(x.shape)} {x.dtype}")
        x = x.contiguous()
        out = x.new_empty(*rows, self.columns)
        self._multiply(self.address, x.data_ptr(), out.data_ptr(), x.numel() // depth)
        return out

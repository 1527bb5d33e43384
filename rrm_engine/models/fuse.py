"""Fewer and faster operations: projections of the same input merged, weights packed on CPU, norms as one kernel."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from rrm_kernels.build import NativeUnavailable
from rrm_kernels.products import NativeLinear
from torch import nn

# Projections that read the same input, by the names transformers gives them.
MERGES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

PREPACK_FP32_WEIGHTS = 1 << 20  # weights of a linear layer from which on oneDNN gains in fp32


class PackedLinear(nn.Module):
    """``x @ weight.T + bias`` with the weight packed for the compiled kernel or for oneDNN, else ``F.linear``.

    In bf16, and with the compiled kernel in fp32, a row's result does not depend on the other rows of the batch.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        weight, bias = weight.detach(), None if bias is None else bias.detach()
        # A plain attribute, because nn.Module looks parameters up slowly, and this is read in every step.
        self.product = _native(weight, bias) or onednn_product(weight, bias) or _unpacked(weight, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)


Product = Callable[[torch.Tensor], torch.Tensor]


def _native(weight: torch.Tensor, bias: torch.Tensor | None) -> Product | None:
    try:
        return NativeLinear(weight, bias)
    except NativeUnavailable:
        return None


def onednn_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product | None:
    """The product by oneDNN with the weight in its own layout; None where that is not available or not faster.

    The operators are internal to torch and may be missing. In bf16 the result is bitwise that of ``F.linear``. In fp32
    it is faster from about a million weights on; with fewer, ``F.linear`` has less overhead.
    """
    pays = weight.dtype == torch.bfloat16 or (weight.dtype == torch.float32 and weight.numel() >= PREPACK_FP32_WEIGHTS)
    supported = weight.device.type == "cpu" and pays
    if not (supported and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    except (RuntimeError, TypeError):
        return None
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _unpacked(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    return lambda x: F.linear(x, weight, bias)


class _Merged:
    """One product for several projections of the same input; the first projection called computes it for all."""

    def __init__(self, linear: PackedLinear, sizes: Sequence[int]) -> None:
        self.linear = linear
        self.sizes = list(sizes)
        self.input: torch.Tensor | None = None
        self.outputs: list[torch.Tensor | None] = []

    def take(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if x is not self.input or self.outputs[index] is None:
            self.input = x
            self.outputs = list(self.linear(x).split(self.sizes, dim=-1))
        out = self.outputs[index]
        self.outputs[index] = None
        if not any(o is not None for o in self.outputs):
            self.input = None
        assert out is not None
        return out


class MergedPart(nn.Module):
    """Replaces a projection; its output is a slice of the merged product."""

    def __init__(self, merged: _Merged, index: int) -> None:
        super().__init__()
        self._merged = merged
        self._index = index
        self.out_features = merged.sizes[index]
        self.in_features = merged.linear.in_features

    @property
    def merged(self) -> PackedLinear:
        """The whole product."""
        return self._merged.linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._merged.take(self._index, x)


class FusedRMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, normalised in fp32 (Zhang and Sennrich 2019).

    With an fp32 weight the product is fp32 and rounded once; otherwise the normalised values are rounded before it, as
    in Llama.
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight = weight.detach()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.dtype == torch.float32:
            return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)
        return F.rms_norm(x.float(), self.weight.shape, None, self.eps).to(x.dtype) * self.weight


class _Watched(nn.Linear):
    """A linear layer that adds itself to ``seen`` when its parameters are read other than by its own forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        return F.linear(x, weight, bias)

    def __getattr__(self, name: str) -> Any:  # Python calls it for parameters, because they are not in __dict__
        if name in self._parameters:
            self.__dict__["seen"].add(self)
        return super().__getattr__(name)


@contextmanager
def parameters_read(model: nn.Module) -> Iterator[set[nn.Module]]:
    """The linear layers of ``model`` whose weight or bias other modules read while in this context: these cannot be
    replaced by a packed one.
    """
    seen: set[nn.Module] = set()
    watched = [module for module in model.modules() if type(module) is nn.Linear]
    for module in watched:
        module.__class__, module.__dict__["seen"] = _Watched, seen
    try:
        yield seen
    finally:
        for module in watched:
            module.__class__ = nn.Linear
            del module.__dict__["seen"]


def fuse(model: nn.Module, kept: Collection[nn.Module] = ()) -> None:
    """Merge and pack the linear layers of ``model`` and fuse its RMS norms, in place.

    Only modules of exactly the type ``nn.Linear``, and norms that compute the same, are replaced; not those ``kept``,
    nor those with hooks of accelerate.
    """
    with torch.no_grad():
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if (fused := _fused_norm(child)) is not None:
                    setattr(module, name, fused)
        for module in list(model.modules()):
            for names in MERGES:
                parts = [getattr(module, name, None) for name in names]
                if all(_plain_linear(part, kept) for part in parts) and _mergeable(parts):  # type: ignore[arg-type]
                    _merge(module, names, parts)  # type: ignore[arg-type]
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and _plain_linear(child, kept) and child.weight.device.type == "cpu":
                    setattr(module, name, PackedLinear(child.weight, child.bias))


def _fused_norm(module: nn.Module) -> FusedRMSNorm | None:
    """A fused norm with the results of this RMS norm on a random input, if there is one; None for other modules."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not type(module).__name__.endswith("RMSNorm") or weight is None or eps is None or hasattr(module, "_hf_hook"):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *weight.shape, generator=generator).to(weight.device, weight.dtype)
    expected = module(x)
    if expected.dtype != x.dtype:
        return None
    # Some families store the weight minus one, and some multiply by it before they round.
    scales = (weight.clone(), 1 + weight, weight.float(), 1 + weight.float())
    candidates = [FusedRMSNorm(scale, float(eps)) for scale in scales]
    best = min(candidates, key=lambda candidate: _distance(candidate(x), expected))
    return best if torch.allclose(best(x), expected, rtol=_ulps(x.dtype), atol=1e-6) else None


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def _ulps(dtype: torch.dtype) -> float:
    """A relative difference of about two units in the last place."""
    return 2 * torch.finfo(dtype).eps


def _plain_linear(module: nn.Module | None, kept: Collection[nn.Module]) -> bool:
    return type(module) is nn.Linear and module not in kept and not hasattr(module, "_hf_hook")


def _mergeable(parts: Sequence[nn.Linear]) -> bool:
    first = parts[0]
    return all(
        p.in_features == first.in_features
        and p.weight.dtype == first.weight.dtype
        and p.weight.device == first.weight.device
        and (p.bias is None) == (first.bias is None)
        for p in parts
    )


def _merge(module: nn.Module, names: Sequence[str], parts: Sequence[nn.Linear]) -> None:
    weight = torch.cat([p.weight for p in parts])
    bias = None if parts[0].bias is None else torch.cat([p.bias for p in parts])
    merged = _Merged(PackedLinear(weight, bias), [p.out_features for p in parts])
    for index, name in enumerate(names):
        setattr(module, name, MergedPart(merged, index))

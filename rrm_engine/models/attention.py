"""The attention function transformers calls for every layer: store the new KV, attend over the blocks."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from rrm_kernels.batch import PagedAttention, PagedBatch, Scores
from rrm_kernels.flash import FlashUnavailable, load_flash
from rrm_kernels.native import DTYPES, NativeUnavailable, load_native
from rrm_kernels.reference import paged_attention, store_kv
from rrm_kernels.triton_attention import TritonUnavailable, load_triton
from rrm_kernels.varlen import load_varlen
from transformers import AttentionInterface

from rrm_engine.device.transfer import hand_over
from rrm_engine.errors import RrmError
from rrm_engine.kv.cache import KVCache

ATTENTION_NAME = "rrm_paged"


class Exchange(Protocol):
    """A hook by which the check at load inspects a forward: called with the tensor ``found`` at a place of it,
    ``[copies, tokens, ...]``, it returns the tensor to continue with, of the same shape.

    A packed run has one copy, with the tokens in the order of the step.
    """

    def __call__(self, what: str, layer: int, found: torch.Tensor) -> torch.Tensor: ...


@dataclass(slots=True)
class PagedForward:
    """What the attention of one forward needs; passed through the model as the keyword ``rrm_forward``."""

    cache: KVCache
    batch: PagedBatch
    attend: PagedAttention
    brought: dict[Any, Any] = field(default_factory=dict)  # copies on other devices than the batch's, made in this step
    exchange: Exchange | None = None  # only in the check at load

    def attention(
        self, layer: int, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """A layer's attention ``[tokens, query heads, value width]``. The new KV must be in the pools already."""
        batch = self.batch_on(query.device)
        if self.exchange is None:
            return self.attend(query, keys, values, batch, scores)
        query = self.exchange("queries", layer, query[None])[0]
        for what, pool in (("keys", keys), ("values", values)):
            slots = pool.view(-1, *pool.shape[2:])
            slots[batch.slots] = self.exchange(what, layer, slots[batch.slots][None])[0]
        return self.exchange("attention", layer, self.attend(query, keys, values, batch, scores)[None])[0]

    def batch_on(self, device: torch.device) -> PagedBatch:
        """The batch on one of the model's devices, copied there once a step."""
        if device == self.batch.slots.device:
            return self.batch
        if device not in self.brought:
            self.brought[device] = self.batch.on(device, hand_over)
        batch: PagedBatch = self.brought[device]
        return batch

    def bring(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A tensor of this step on another device, copied there once for all layers."""
        if tensor.device == device:
            return tensor
        key = (id(tensor), device)
        if key not in self.brought:
            self.brought[key] = tensor, hand_over(tensor, device)  # the original is kept, so that its id is not reused
        there: torch.Tensor = self.brought[key][1]
        return there


class Forward(Protocol):
    """A model as the runner calls it: packed ``token_ids`` and ``positions`` int64 ``[tokens]``.

    Returns the logits ``[rows, vocabulary]`` of the rows ``sampled`` int64 ``[rows]``.
    """

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, sampled: torch.Tensor, paged: PagedForward
    ) -> torch.Tensor: ...


def transformers_forward(model: Any, output: torch.device | None = None) -> Forward:
    """A causal LM of transformers, whose attention is ours, as a ``Forward``.

    ``output`` is the device of its last layer, if that is not where its inputs go.
    """

    def forward(
        token_ids: torch.Tensor, positions: torch.Tensor, sampled: torch.Tensor, paged: PagedForward
    ) -> torch.Tensor:
        out = model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=sampled if output is None else hand_over(sampled, output),
            rrm_forward=paged,
        )
        logits: torch.Tensor = out.logits[0]
        return logits

    return forward


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    rrm_forward: PagedForward,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Query ``[1, query heads, tokens, width]``, key and value ``[1, kv heads, tokens, width]``, already rotated.

    Returns ``[1, tokens, query heads, value width]``. ``attention_mask`` is always None, because no mask function is
    registered under our name: causality and windows follow from the lengths in the batch.
    """
    new_key, new_value = key[0].transpose(0, 1), value[0].transpose(0, 1)
    key_pool, value_pool = rrm_forward.cache.layer(module.layer_idx, new_key, new_value)  # type: ignore[arg-type]
    batch = rrm_forward.batch_on(query.device)
    store_kv(key_pool, new_key, batch.slots)
    store_kv(value_pool, new_value, batch.slots)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    scores = Scores(scale, sliding_window, softcap, s_aux)
    out = rrm_forward.attention(module.layer_idx, query[0].transpose(0, 1), key_pool, value_pool, scores)  # type: ignore[arg-type]
    return out[None], None


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[str, PagedAttention]:
    """The attention backend that ``--attention`` asks for: what it is, in words, and the backend.

    ``auto`` is the compiled kernel on CPU and Triton's on CUDA if it is available, else the torch reference, and the
    words say why. Raises RrmError if a backend that is asked for by name is not available.
    """
    wanted = {"cpu": "native", "cuda": "triton"}.get(device.type) if name == "auto" else name
    reason = ""
    try:
        if wanted == "native":
            return "compiled CPU kernel", _native(device, dtype)
        if wanted == "triton":
            kernels = load_triton(device)
            return "Triton kernels, interpreted" if kernels.interpreted else "Triton kernels", kernels
        if wanted == "varlen":
            return "torch's FlashAttention", load_varlen(device)
        if wanted == "flash":
            return "flash-attn", load_flash(device)
    except (NativeUnavailable, TritonUnavailable, FlashUnavailable) as error:
        if name != "auto":
            raise RrmError(f"--attention {name}: {error}; --attention sdpa works everywhere") from error
        reason = f" ({error})"
    return f"torch reference{reason}", paged_attention


def _native(device: torch.device, dtype: torch.dtype) -> PagedAttention:
    """Raises NativeUnavailable, or RrmError if ``RRM_CPU_KERNELS`` names a variant that does not run here."""
    if device.type != "cpu":
        raise NativeUnavailable(f"it runs on CPU only, not on {device}")
    if dtype not in DTYPES:
        raise NativeUnavailable(f"the compiled kernel takes float32 and bfloat16, not {str(dtype).split('.')[-1]}")
    try:
        return load_native()
    except ValueError as error:
        raise RrmError(str(error)) from error


class OnOwnDevice(PagedAttention):
    """An attention called with CUDA's current device set to that of its arguments, which Triton's and the
    FlashAttention kernels need.
    """

    def __init__(self, attend: PagedAttention) -> None:
        self.attend, self.name = attend, attend.name
        self.block_multiple, self.capturable, self.sharing = attend.block_multiple, attend.capturable, attend.sharing

    def __call__(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, batch: PagedBatch, scores: Scores
    ) -> torch.Tensor:
        with torch.cuda.device(query.device) if query.device.type == "cuda" else nullcontext():
            return self.attend(query, key_cache, value_cache, batch, scores)


def register_attention() -> None:
    """Make ``attn_implementation="rrm_paged"`` known to transformers; repeating it is harmless."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)

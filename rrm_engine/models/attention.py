"""The attention function transformers calls for every layer: store the new KV, attend over the blocks."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from rrm_kernels.native import NativeUnavailable, load_native
from rrm_kernels.reference import PagedAttention, PagedBatch, paged_attention, store_kv
from rrm_kernels.triton_attention import TritonUnavailable, load_triton
from transformers import AttentionInterface

from rrm_engine.kv.cache import KVCache

ATTENTION_NAME = "rrm_paged"


@dataclass(slots=True)
class PagedForward:
    """What one forward needs to know; travels through the model as the keyword ``rrm_forward``."""

    cache: KVCache
    batch: PagedBatch
    attend: PagedAttention


class Forward(Protocol):
    """A model as the runner calls it: packed ``token_ids`` and ``positions`` int64 ``[tokens]``.

    Returns the logits ``[rows, vocabulary]`` of the rows ``sampled`` int64 ``[rows]``.
    """

    def __call__(
        self, token_ids: torch.Tensor, positions: torch.Tensor, sampled: torch.Tensor, paged: PagedForward
    ) -> torch.Tensor: ...


def transformers_forward(model: Any) -> Forward:
    """A causal LM of transformers, whose attention is ours, as a ``Forward``."""

    def forward(
        token_ids: torch.Tensor, positions: torch.Tensor, sampled: torch.Tensor, paged: PagedForward
    ) -> torch.Tensor:
        out = model(
            input_ids=token_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=sampled,
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

    Returns ``[1, tokens, query heads, value width]``. ``attention_mask`` is None by construction (no mask function
    is registered under our name): causality and windows come from the block tables' lengths.
    """
    new_key, new_value = key[0].transpose(0, 1), value[0].transpose(0, 1)
    key_pool, value_pool = rrm_forward.cache.layer(module.layer_idx, new_key, new_value)  # type: ignore[arg-type]
    store_kv(key_pool, new_key, rrm_forward.batch.slots)
    store_kv(value_pool, new_value, rrm_forward.batch.slots)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = rrm_forward.attend(
        query[0].transpose(0, 1),
        key_pool,
        value_pool,
        rrm_forward.batch,
        scale,
        sliding_window,
        softcap,
        s_aux,
    )
    return out[None], None


def choose_attention(name: str, device: torch.device) -> tuple[str, PagedAttention]:
    """The attention backend ``auto``, ``native``, ``triton`` or ``sdpa``, and what it turned out to be, in words.

    ``auto`` is the compiled kernel on CPU and Triton's on CUDA where it can be had, else the torch reference. Raises
    ValueError if a backend is asked for by name and cannot be had.
    """
    wanted = {"cpu": "native", "cuda": "triton"}.get(device.type) if name == "auto" else name
    try:
        if wanted == "native" and device.type != "cpu":
            raise NativeUnavailable(f"it runs on CPU only, not on {device}")
        if wanted == "native":
            return "compiled CPU kernel", load_native()
        if wanted == "triton":
            kernels = load_triton(device)
            return kernels.name, kernels
    except (NativeUnavailable, TritonUnavailable) as error:
        if name != "auto":
            raise ValueError(f"--attention {name}: {error}; --attention sdpa works everywhere") from error
    return "torch reference", paged_attention


def register_attention() -> None:
    """Make ``attn_implementation="rrm_paged"`` known to transformers; repeating it is harmless."""
    AttentionInterface.register(ATTENTION_NAME, paged_attention_forward)

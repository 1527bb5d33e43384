"""Attention by torch's own FlashAttention, ``torch.nn.attention.varlen``, in versions that take block tables."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from rrm_kernels.batch import PagedAttention, PagedBatch, Scores
from rrm_kernels.flash import FLASH_BLOCK, FlashUnavailable, FlashUnsupported, check_supported

NEEDED = {"block_table", "seqused_k", "enable_gqa", "window_size", "scale"}


class VarlenAttention(PagedAttention):
    """As ``reference.paged_attention``, without sinks and soft-caps. ``function`` is torch's ``varlen_attn``."""

    name = "varlen"

    def __init__(self, function: Callable[..., Any], block_multiple: int = FLASH_BLOCK) -> None:
        self._function = function
        self.block_multiple = block_multiple

    def __call__(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, batch: PagedBatch, scores: Scores
    ) -> torch.Tensor:
        if scores.softcap is not None:
            raise FlashUnsupported("soft-capped scores are not supported by it")
        check_supported(query, value_cache, scores.sinks, self.block_multiple)
        size = batch.capacity
        out: torch.Tensor = self._function(
            query.contiguous(),
            key_cache,
            value_cache,
            cu_seq_q=batch.query_start[: size.seqs + 1],
            cu_seq_k=batch.context_start[: size.seqs + 1] if self.block_multiple > 1 else None,  # FA3 wants none
            max_q=size.queries,
            max_k=size.blocks * batch.block_size,
            scale=scores.scale,
            window_size=(-1 if scores.window is None else scores.window - 1, 0),
            enable_gqa=query.shape[1] != key_cache.shape[2],
            seqused_k=batch.context_len[: size.seqs],
            block_table=batch.block_table[: size.seqs],
        )
        return out


def load_varlen(device: torch.device) -> VarlenAttention:
    """torch's kernels. Raises FlashUnavailable with the reason."""
    if device.type != "cuda":
        raise FlashUnavailable(f"it runs on CUDA only, not on {device}")
    try:
        from torch.nn import attention
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise FlashUnavailable(f"torch {torch.__version__} has no varlen_attn: a newer torch has") from error
    if missing := sorted(NEEDED - inspect.signature(varlen_attn).parameters.keys()):
        raise FlashUnavailable(
            f"varlen_attn of torch {torch.__version__} does not take {', '.join(missing)}: a newer torch does"
        )
    activated = getattr(attention, "current_flash_attention_impl", lambda: None)()
    return VarlenAttention(varlen_attn, 1 if activated in ("FA3", "FA4") else FLASH_BLOCK)

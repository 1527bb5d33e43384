"""Attention by the flash-attn package (optional): FlashAttention-2, reading K and V through block tables.

FlashAttention-2: Dao 2023. Importable without the package; ``load_flash`` says what is missing.
"""

from collections.abc import Callable
from importlib import import_module

import torch

from rrm_kernels.batch import PagedAttention, PagedBatch, Scores

FLASH_BLOCK = 256  # tokens: FlashAttention-2 reads K and V in tiles that must not cross a block
DTYPES = (torch.float16, torch.bfloat16)
MOST_WIDTH = 256


class FlashUnavailable(RuntimeError):
    """The kernels are not available here; the message says what to install or to use."""


class FlashUnsupported(ValueError):
    """The kernels cannot compute what this model needs; the message says what that is."""


def check_supported(
    query: torch.Tensor, value_cache: torch.Tensor, sinks: torch.Tensor | None, block_multiple: int
) -> None:
    """Raises FlashUnsupported for inputs that FlashAttention's paged kernels refuse or compute wrongly."""
    reason = None
    if sinks is not None:
        reason = "attention sinks are not supported by it"
    elif query.dtype not in DTYPES:
        reason = f"it computes in float16 and bfloat16, not in {str(query.dtype).removeprefix('torch.')}"
    elif query.shape[2] != value_cache.shape[3] or query.shape[2] > MOST_WIDTH:
        reason = f"heads must be of one width up to {MOST_WIDTH}"
    elif value_cache.shape[1] % block_multiple:
        reason = f"KV blocks must be a multiple of {block_multiple} tokens: use --block-size {block_multiple}"
    if reason:
        raise FlashUnsupported(reason)


class FlashAttention(PagedAttention):
    """As ``reference.paged_attention``, without sinks. ``function`` is ``flash_attn.flash_attn_varlen_func``."""

    name = "flash"
    block_multiple = FLASH_BLOCK

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        self._function = function

    def __call__(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, batch: PagedBatch, scores: Scores
    ) -> torch.Tensor:
        check_supported(query, value_cache, scores.sinks, self.block_multiple)
        size = batch.capacity
        return self._function(
            query.contiguous(),
            key_cache,
            value_cache,
            cu_seqlens_q=batch.query_start[: size.seqs + 1],
            cu_seqlens_k=batch.context_start[: size.seqs + 1],
            max_seqlen_q=size.queries,
            max_seqlen_k=size.blocks * batch.block_size,
            softmax_scale=scores.scale,
            causal=True,
            window_size=(-1, -1) if scores.window is None else (scores.window - 1, 0),
            softcap=scores.softcap or 0.0,
            block_table=batch.block_table[: size.seqs],
        )


def load_flash(device: torch.device) -> FlashAttention:
    """The package's kernels. Raises FlashUnavailable with the reason."""
    if device.type != "cuda":
        raise FlashUnavailable(f"it runs on CUDA only, not on {device}")
    try:
        return FlashAttention(import_module("flash_attn").flash_attn_varlen_func)
    except (ImportError, AttributeError) as error:
        raise FlashUnavailable(
            f"flash-attn cannot be imported ({error}); pip install 'rrm-engine[flash]' --no-build-isolation"
        ) from error

"""Paged attention in plain torch: the reference every kernel is tested against, and the CPU path.

Caches are ``[blocks, block_size, kv heads, width]``; K and V may differ in width. Tokens of a step are packed:
first one query token for each decoding sequence, then the prefill chunks one after another.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from rrm_kernels.metadata import RaggedMetadata

CAUSAL_PIECE = 128  # rows of a prefill chunk that are attended at once


@dataclass(slots=True)
class DecodeGroup:
    """Sequences of similar length with one query token each: rows ``start`` to ``stop`` of the packed batch.

    ``tables`` int64 ``[rows, blocks]`` padded with the null block, ``lengths`` int64 ``[rows]`` (tokens attended).
    """

    start: int
    stop: int
    tables: torch.Tensor
    lengths: torch.Tensor
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class PrefillChunk:
    """Rows ``start`` to ``stop`` are the last ``stop - start`` of a sequence's ``length`` tokens.

    ``table`` int64 ``[blocks]``.
    """

    start: int
    stop: int
    table: torch.Tensor
    length: int
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class PagedBatch:
    """Where the packed tokens' KV goes (``slots`` int64 ``[tokens]``) and what each of them attends to.

    No token's position is ``longest`` or beyond. ``ragged`` is the same for kernels that take a step as a whole;
    a step that was packed for them has no groups and no chunks, else their backend makes it from these.
    """

    slots: torch.Tensor
    groups: list[DecodeGroup]
    chunks: list[PrefillChunk]
    longest: int = 0
    ragged: "RaggedMetadata | None" = None
    host: "PagedBatch | None" = None


@dataclass(frozen=True, slots=True)
class Scores:
    """How a layer's scores are made: products times ``scale``, with a ``window`` of keys less than so many tokens back.

    ``softcap`` is tanh capping, ``sinks`` ``[query heads]`` one extra score a head that takes part in the softmax and
    adds no value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None

    def fp32_sinks(self) -> torch.Tensor | None:
        """``sinks`` as kernels read them."""
        return None if self.sinks is None else self.sinks.float().contiguous()


class PagedAttention(Protocol):
    """What every attention backend is: see ``paged_attention``, the reference."""

    def __call__(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, batch: PagedBatch, scores: Scores
    ) -> torch.Tensor: ...


def store_kv(cache: torch.Tensor, new: torch.Tensor, slots: torch.Tensor) -> None:
    """Write ``new`` ``[tokens, heads, width]`` to the token slots of ``cache``."""
    cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, new)


def paged_attention(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, batch: PagedBatch, scores: Scores
) -> torch.Tensor:
    """Causal grouped-query attention of packed queries over their sequences' blocks.

    ``query`` is ``[tokens, query heads, width]``; the result ``[tokens, query heads, value width]``. A token at
    position i attends to positions j <= i, with a window to j > i - window.
    """
    tokens, heads, width = query.shape
    kv_heads, value_width = value_cache.shape[2], value_cache.shape[3]
    per_kv = heads // kv_heads
    out = query.new_empty(tokens, heads, value_width)
    for group in batch.groups:
        rows = group.stop - group.start
        q = query[group.start : group.stop].view(rows, kv_heads, per_kv, width)
        k, v = (_gather(cache, group.tables) for cache in (key_cache, value_cache))
        result = _attend(q, k, v, _decode_mask(group, k.shape[2], scores.window, query), scores)
        out[group.start : group.stop] = result.reshape(rows, heads, value_width)
    attend_chunks(out, query, key_cache, value_cache, batch.chunks, scores)
    return out


def attend_chunks(
    out: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    chunks: list[PrefillChunk],
    scores: Scores,
) -> None:
    """The prefill chunks' part of ``paged_attention``, written to their rows of ``out``."""
    _, heads, width = query.shape
    kv_heads, value_width = value_cache.shape[2], value_cache.shape[3]
    per_kv = heads // kv_heads
    for chunk in chunks:
        keys, values = (_gather(cache, chunk.table[None])[:, :, : chunk.length] for cache in (key_cache, value_cache))
        mask = _chunk_mask(chunk, scores.window, query)
        for start in range(chunk.start, chunk.stop, CAUSAL_PIECE):
            stop = min(start + CAUSAL_PIECE, chunk.stop)
            # What no row of the piece sees is left out: keys behind the last row's, and before the first one's window.
            end = chunk.length - (chunk.stop - stop)
            first = max(0, end - (stop - start) + 1 - scores.window) if scores.window else 0
            k, v = keys[:, :, first:end], values[:, :, first:end]
            seen = mask[start - chunk.start : stop - chunk.start, first:end].repeat(per_kv, 1)
            q = query[start:stop].view(-1, kv_heads, per_kv, width).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, width)
            out[start:stop] = _attend(q, k, v, seen, scores).view(heads, -1, value_width).transpose(0, 1)


def _gather(cache: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """``[rows, kv heads, blocks * block_size, width]`` of the blocks in ``tables`` ``[rows, blocks]``."""
    rows = tables.shape[0]
    flat = cache.index_select(0, tables.reshape(-1))
    return flat.view(rows, -1, *cache.shape[2:]).transpose(1, 2)


def _decode_mask(group: DecodeGroup, span: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    if window not in group.masks:
        position = torch.arange(span, device=like.device)
        seen = position < group.lengths[:, None]
        if window is not None:
            seen &= position >= group.lengths[:, None] - window
        group.masks[window] = _additive(seen, like)[:, None, None, :]
    return group.masks[window]


def _chunk_mask(chunk: PrefillChunk, window: int | None, like: torch.Tensor) -> torch.Tensor:
    if window not in chunk.masks:
        key = torch.arange(chunk.length, device=like.device)
        query = key[chunk.length - (chunk.stop - chunk.start) :, None]
        seen = key <= query
        if window is not None:
            seen &= key > query - window
        chunk.masks[window] = _additive(seen, like)
    return chunk.masks[window]


def _additive(seen: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Attention of ``q`` ``[rows, kv heads, queries, width]``; queries of one kv head are ordered head-major."""
    softcap, sinks = scores.softcap, scores.sinks
    if softcap is None and sinks is None and v.shape[-1] == k.shape[-1]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scores.scale)
    products = (q @ k.transpose(2, 3)).float() * scores.scale
    if softcap is not None:
        products = softcap * torch.tanh(products / softcap)
    products = products + mask.float()
    if sinks is not None:
        kv_heads, queries = q.shape[1], q.shape[2]
        per_head = sinks.float().view(kv_heads, -1)
        extra = per_head.repeat_interleave(queries // per_head.shape[1], dim=1)
        products = torch.cat([products, extra[None, :, :, None].expand(q.shape[0], -1, -1, 1)], dim=-1)
    weights = products.softmax(-1)
    if sinks is not None:
        weights = weights[..., :-1]
    return weights.to(v.dtype) @ v

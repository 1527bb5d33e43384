"""Paged attention in plain torch, which runs everywhere: the reference that every kernel is tested against."""

import torch
import torch.nn.functional as F

from rrm_kernels.batch import PagedAttention, PagedBatch, Scores

CAUSAL_PIECE = 128  # queries of a prefill chunk that are computed at once


def store_kv(cache: torch.Tensor, new: torch.Tensor, slots: torch.Tensor) -> None:
    """Write ``new`` ``[tokens, heads, width]`` to the token slots of ``cache``."""
    cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, new)


class ReferenceAttention(PagedAttention):
    """Decodes of similar length together, prefill chunks one by one."""

    name = "sdpa"

    def __call__(
        self, query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, batch: PagedBatch, scores: Scores
    ) -> torch.Tensor:
        """See ``PagedAttention``."""
        tokens, heads, width = query.shape
        kv_heads, value_width = value_cache.shape[2], value_cache.shape[3]
        out = query.new_empty(tokens, heads, value_width)
        for start, stop, blocks in groups(batch):
            q = query[start:stop].view(stop - start, kv_heads, -1, width)
            k, v = (_gather(cache, batch.block_table[start:stop, :blocks]) for cache in (key_cache, value_cache))
            mask = _decode_mask(batch, start, stop, k.shape[2], scores.window, query)
            out[start:stop] = _attend(q, k, v, mask, scores).reshape(stop - start, heads, value_width)
        attend_chunks(out, query, key_cache, value_cache, batch, scores)
        return out


paged_attention = ReferenceAttention()


def groups(batch: PagedBatch) -> list[tuple[int, int, int]]:
    """The decodes as groups (first, stop, blocks) that are computed together, padded to the most ``blocks`` of a group.
    A new group begins where that would waste too much.
    """
    blocks = [-(-length // batch.block_size) for length in batch.context_lens[: batch.decodes]]
    found, start = [], 0
    for stop in range(1, len(blocks) + 1):
        if stop == len(blocks) or blocks[stop] > 2 * blocks[start] + 8:
            found.append((start, stop, max(blocks[start:stop])))
            start = stop
    return found


def attend_chunks(
    out: torch.Tensor,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: PagedBatch,
    scores: Scores,
) -> None:
    """Attention of all sequences after the decodes, written to their rows of ``out``."""
    stop = batch.decodes
    for i in range(batch.decodes, len(batch.query_lens)):
        start, stop = stop, stop + batch.query_lens[i]
        length = batch.context_lens[i]
        table = batch.block_table[i : i + 1, : -(-length // batch.block_size)]
        mask = _chunk_mask(batch, i, scores.window, query)
        out[start:stop] = attend_chunk(query[start:stop], key_cache, value_cache, table, length, mask, scores)


def attend_chunk(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    table: torch.Tensor,
    length: int,
    mask: torch.Tensor,
    scores: Scores,
) -> torch.Tensor:
    """Attention of a sequence's last queries over its ``length`` tokens. ``table`` ``[1, blocks]``, ``mask`` of
    ``chunk_mask``.
    """
    count, heads, width = query.shape
    kv_heads, value_width = value_cache.shape[2], value_cache.shape[3]
    per_kv = heads // kv_heads
    keys, values = (_gather(cache, table)[:, :, :length] for cache in (key_cache, value_cache))
    out = query.new_empty(count, heads, value_width)
    for start in range(0, count, CAUSAL_PIECE):
        stop = min(start + CAUSAL_PIECE, count)
        # Leave out keys that no row of the piece sees: those after its last row, and before its first row's window.
        end = length - (count - stop)
        first = max(0, end - (stop - start) + 1 - scores.window) if scores.window else 0
        k, v = keys[:, :, first:end], values[:, :, first:end]
        seen = mask[start:stop, first:end].repeat(per_kv, 1)
        q = query[start:stop].view(-1, kv_heads, per_kv, width).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, width)
        out[start:stop] = _attend(q, k, v, seen, scores).view(heads, -1, value_width).transpose(0, 1)
    return out


def _gather(cache: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """``[rows, kv heads, blocks * block_size, width]`` of the blocks in ``tables`` ``[rows, blocks]``."""
    rows = tables.shape[0]
    flat = cache.index_select(0, tables.reshape(-1))
    return flat.view(rows, -1, *cache.shape[2:]).transpose(1, 2)


def _decode_mask(
    batch: PagedBatch, start: int, stop: int, span: int, window: int | None, like: torch.Tensor
) -> torch.Tensor:
    """The mask of decodes ``start`` to ``stop`` over ``span`` keys; computed once a step."""
    key = (start, window)
    if key not in batch.derived:
        lengths = batch.context_len[start:stop, None]
        position = torch.arange(span, device=like.device)
        seen = position < lengths
        if window is not None:
            seen &= position >= lengths - window
        batch.derived[key] = _additive(seen, like)[:, None, None, :]
    mask: torch.Tensor = batch.derived[key]
    return mask


def _chunk_mask(batch: PagedBatch, i: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """The mask of sequence ``i``; computed once a step."""
    key = (i, window)
    if key not in batch.derived:
        batch.derived[key] = chunk_mask(batch.query_lens[i], batch.context_lens[i], window, like)
    mask: torch.Tensor = batch.derived[key]
    return mask


def chunk_mask(queries: int, length: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """The additive mask ``[queries, length]`` of the last ``queries`` of ``length`` tokens: 0 where one attends, else
    -inf.
    """
    key = torch.arange(length, device=like.device)
    query = key[length - queries :, None]
    seen = key <= query
    if window is not None:
        seen &= key > query - window
    return _additive(seen, like)


def _additive(seen: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scores: Scores) -> torch.Tensor:
    """Attention of ``q`` ``[rows, kv heads, queries, width]``; a kv head's queries are ordered by query head first."""
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

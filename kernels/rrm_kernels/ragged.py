"""Ragged paged attention in Triton: prefill chunks and decodes of a step in one launch.

A program computes a tile of one sequence's query tokens and one kv head. If these are too few programs to fill the
device, the keys are split over several (flash-decoding, Dao et al. 2023), and a second kernel merges their partial
results by log-sum-exp. It also merges results over leading keys that several sequences share (shared.py).
"""

import torch
import triton
import triton.language as tl

from rrm_kernels.batch import PagedBatch, Scores
from rrm_kernels.shared import attend_shared
from rrm_kernels.tile import LOG2_E, Attention, Tile, attend_tile, load_query, padded, store_partial, store_rows

MAX_SPLITS = 32
SPLIT_KEYS = 256  # the fewest keys worth a program of their own
FEWEST_SEQS = 64  # a program searches at least this many sequences for its own, so that few sizes are compiled


def ragged_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    batch: PagedBatch,
    scores: Scores,
    splits: int | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """``reference.paged_attention`` of the sequences in ``batch``: ``[tokens, heads, value width]``.

    ``query`` may have more rows than are live; the results of these rows are undefined. ``splits`` and ``tile`` are
    chosen from the capacity if not given. Shared runs are used in layers without a window.
    """
    call = Attention(query, key_cache, value_cache, scores)
    capacity, window = batch.capacity, scores.window
    tile = tile or call.tile(capacity.queries)
    queries = tile.rows // call.per_kv
    # Sequence i's tiles start at number query_start[i] // queries + i. That leaves each at least as many as it needs,
    # and a program finds its sequence from query_start alone.
    tiles = capacity.tokens // queries + capacity.seqs
    longest = capacity.blocks * batch.block_size
    splits = splits or _splits(tiles * call.kv_heads, min(longest, window or longest), query.device)
    shares = capacity.pieces > 0 and window is None
    partials = splits + capacity.partials if shares else splits
    rows = (query.shape[0], call.heads)
    out = query.new_empty(*rows, call.value_width)
    sinks = scores.fp32_sinks()
    partial = lse = None
    if partials > 1:
        partial = query.new_empty(partials, *rows, call.value_width, dtype=torch.float32)
        lse = query.new_full((partials, *rows), float("-inf"), dtype=torch.float32)
    _ragged_kernel[(tiles, call.kv_heads, splits)](
        out=out,
        partial=partial,
        lse=lse,
        sinks=sinks if partials == 1 else None,
        query_start=batch.query_start,
        context_len=batch.context_len,
        first_key=batch.first_key if shares else None,
        block_table=batch.block_table,
        num_seqs=batch.num_seqs,
        table_width=batch.block_table.shape[1],
        tokens=query.shape[0],
        WINDOW=window or 0,
        SEQS=max(FEWEST_SEQS, triton.next_power_of_2(capacity.seqs)),
        QUERIES=queries,
        SPLITS=splits,
        **call.arguments(tile),
    )
    if partial is not None and lse is not None:
        if shares:
            attend_shared(call, batch, partial, lse, splits)
        _merge(out, partial, lse, sinks, batch, call.kv_heads)
    return out


def _splits(programs: int, keys: int, device: torch.device) -> int:
    """Over how many programs to split the keys, so that there are two programs for each multiprocessor.

    A power of two, because each number is compiled separately.
    """
    if device.type != "cuda":
        return 1
    wanted = triton.cdiv(2 * torch.cuda.get_device_properties(device).multi_processor_count, programs)
    most = max(1, min(wanted, keys // SPLIT_KEYS, MAX_SPLITS))
    return 1 << (most.bit_length() - 1)


def _merge(
    out: torch.Tensor,
    partial: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor | None,
    batch: PagedBatch,
    kv_heads: int,
) -> None:
    partials, tokens, heads, width = partial.shape
    _merge_kernel[(min(tokens, batch.capacity.tokens), kv_heads)](
        out=out,
        partial=partial,
        lse=lse,
        sinks=sinks,
        query_start=batch.query_start,
        num_seqs=batch.num_seqs,
        tokens=tokens,
        HEADS=heads,
        KV_HEADS=kv_heads,
        PADDED_PER_KV=triton.next_power_of_2(heads // kv_heads),
        PARTIALS=partials,
        PADDED_PARTIALS=triton.next_power_of_2(partials),
        VALUE_WIDTH=width,
        PADDED_VALUE=padded(width),
    )


@triton.jit
def _ragged_kernel(
    out,
    partial,
    lse,
    query,
    key_cache,
    value_cache,
    sinks,
    query_start,
    context_len,
    first_key,
    block_table,
    num_seqs,
    table_width,
    tokens,
    query_token,
    query_head,
    scale,
    softcap,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PADDED_KEY: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SEQS: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    PER_KV: tl.constexpr = HEADS // KV_HEADS
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)

    # This tile's sequence: the last one whose first tile does not come after it.
    number = tl.arange(0, SEQS)
    exists = number < tl.load(num_seqs)
    starts = tl.load(query_start + number, mask=exists, other=0)
    seq = tl.sum((exists & (starts // QUERIES + number <= tile)).to(tl.int32), 0) - 1
    if seq < 0:
        return
    first_query = tl.load(query_start + seq)
    queries = tl.load(query_start + seq + 1) - first_query
    offset = (tile - first_query // QUERIES - seq) * QUERIES
    if offset >= queries:
        return

    row = tl.arange(0, ROWS)
    nth = offset + row // PER_KV
    head = kv_head * PER_KV + row % PER_KV
    live = (row < QUERIES * PER_KV) & (nth < queries)
    before = tl.load(context_len + seq) - queries
    position = before + nth
    token = first_query + nth

    first = 0
    if first_key is not None:
        first = tl.load(first_key + seq)
    if WINDOW > 0:
        first = tl.maximum(first, before + offset - WINDOW + 1)
    stop = before + tl.minimum(offset + QUERIES, queries)
    if SPLITS > 1:
        share = (stop - first + SPLITS * KEYS - 1) // (SPLITS * KEYS) * KEYS
        first = first + split * share
        stop = tl.minimum(stop, first + share)

    if sinks is None:
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.full([ROWS], 0.0, tl.float32)
    else:  # one more score, without a value
        top = tl.load(sinks + head, mask=live, other=0.0) * LOG2_E
        total = tl.full([ROWS], 1.0, tl.float32)
    q = load_query(query, token, head, live, query_token, query_head, KEY_WIDTH, PADDED_KEY)
    acc, top, total = attend_tile(
        q,
        key_cache,
        value_cache,
        block_table + seq.to(tl.int64) * table_width,
        kv_head,
        position,
        first,
        stop,
        top,
        total,
        scale,
        softcap,
        KV_HEADS,
        BLOCK_SIZE,
        KEY_WIDTH,
        VALUE_WIDTH,
        PADDED_KEY,
        PADDED_VALUE,
        WINDOW,
        SOFTCAP,
        ROWS,
        KEYS,
    )
    if partial is None:
        total = tl.where(live, total, 1.0)
        store_rows(out, acc / total[:, None], token, head, live, HEADS, VALUE_WIDTH, PADDED_VALUE)
    else:
        store_partial(partial, lse, acc, top, total, split, tokens, token, head, live, HEADS, VALUE_WIDTH, PADDED_VALUE)


@triton.jit
def _merge_kernel(
    out,
    partial,
    lse,
    sinks,
    query_start,
    num_seqs,
    tokens,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PADDED_PER_KV: tl.constexpr,
    PARTIALS: tl.constexpr,
    PADDED_PARTIALS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
):
    """out = sum of partial[i] * 2^lse[i] / sum of 2^lse[i], the sink among the latter."""
    PER_KV: tl.constexpr = HEADS // KV_HEADS
    token, kv_head = tl.program_id(0), tl.program_id(1)
    if token >= tl.load(query_start + tl.load(num_seqs)):
        return
    row = tl.arange(0, PADDED_PER_KV)
    live = row < PER_KV
    head = kv_head * PER_KV + row
    dim = tl.arange(0, PADDED_VALUE)
    index = tl.arange(0, PADDED_PARTIALS)
    line = (index.to(tl.int64) * tokens + token) * HEADS
    scores = tl.load(
        lse + line[:, None] + head[None, :], mask=(index < PARTIALS)[:, None] & live[None, :], other=float("-inf")
    )
    top = tl.max(scores, 0)
    if sinks is not None:
        sink = tl.load(sinks + head, mask=live, other=0.0) * LOG2_E
        top = tl.maximum(top, sink)
    top = tl.where(live, top, 0.0)
    total = tl.sum(tl.exp2(scores - top[None, :]), 0)
    if sinks is not None:
        total += tl.exp2(sink - top)
    acc = tl.full([PADDED_PER_KV, PADDED_VALUE], 0.0, tl.float32)
    for i in range(PARTIALS):
        at = (tl.cast(i, tl.int64) * tokens + token) * HEADS + head
        score = tl.load(lse + at, mask=live, other=float("-inf"))
        written = score > float("-inf")  # only that may be read: the rest of the buffer can hold NaN
        part = tl.load(
            partial + at[:, None] * VALUE_WIDTH + dim[None, :],
            mask=written[:, None] & (dim < VALUE_WIDTH)[None, :],
            other=0.0,
        )
        acc += part * tl.exp2(score - top)[:, None]
    total = tl.where(live, total, 1.0)
    store_rows(out, acc / total[:, None], token + row * 0, head, live, HEADS, VALUE_WIDTH, PADDED_VALUE)

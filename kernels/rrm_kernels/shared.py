"""Shared-prefix (tree) attention in Triton: a run of blocks that several sequences share is read once for all of them.

The runs come from sharing.py, cut into pieces. A program computes one piece for one kv head and a tile of its members'
query tokens, and writes a partial result for each; ragged.py merges these with the results over the members' own
blocks.
"""

import torch
import triton
import triton.language as tl

from rrm_kernels.batch import PagedBatch
from rrm_kernels.tile import Attention, attend_tile, load_query, store_partial


def attend_shared(
    call: Attention, batch: PagedBatch, partial: torch.Tensor, lse: torch.Tensor, first_partial: int
) -> None:
    """Write the pieces' results to ``partial`` and ``lse``, from index ``first_partial`` on."""
    capacity = batch.capacity
    tile = call.tile(capacity.run_members)
    queries = tile.rows // call.per_kv
    grid = (capacity.pieces, triton.cdiv(capacity.run_members, queries), call.kv_heads)
    _shared_kernel[grid](
        partial=partial,
        lse=lse,
        pieces=batch.pieces,
        members=batch.members,
        num_pieces=batch.num_pieces,
        block_table=batch.block_table,
        table_width=batch.block_table.shape[1],
        tokens=partial.shape[1],
        first_partial=first_partial,
        QUERIES=queries,
        **call.arguments(tile),
    )


@triton.jit
def _shared_kernel(
    partial,
    lse,
    query,
    key_cache,
    value_cache,
    pieces,
    members,
    num_pieces,
    block_table,
    table_width,
    tokens,
    first_partial,
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
    SOFTCAP: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    PER_KV: tl.constexpr = HEADS // KV_HEADS
    piece, tile, kv_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if piece >= tl.load(num_pieces):
        return
    first_member = tl.load(pieces + piece * 6)
    count = tl.load(pieces + piece * 6 + 1)
    if tile * QUERIES >= count:
        return
    owner = tl.load(pieces + piece * 6 + 2)
    first = tl.load(pieces + piece * 6 + 3)
    stop = tl.load(pieces + piece * 6 + 4)
    index = tl.load(pieces + piece * 6 + 5) + first_partial

    row = tl.arange(0, ROWS)
    member = tile * QUERIES + row // PER_KV
    head = kv_head * PER_KV + row % PER_KV
    live = (row < QUERIES * PER_KV) & (member < count)
    token = tl.load(members + first_member + member, mask=live, other=0)
    q = load_query(query, token, head, live, query_token, query_head, KEY_WIDTH, PADDED_KEY)
    acc, top, total = attend_tile(
        q,
        key_cache,
        value_cache,
        block_table + owner.to(tl.int64) * table_width,
        kv_head,
        tl.full([ROWS], 2147483647, tl.int32),  # every member comes after the whole run: nothing is masked
        first,
        stop,
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.full([ROWS], 0.0, tl.float32),
        scale,
        softcap,
        KV_HEADS,
        BLOCK_SIZE,
        KEY_WIDTH,
        VALUE_WIDTH,
        PADDED_KEY,
        PADDED_VALUE,
        0,
        SOFTCAP,
        ROWS,
        KEYS,
    )
    store_partial(partial, lse, acc, top, total, index, tokens, token, head, live, HEADS, VALUE_WIDTH, PADDED_VALUE)

"""The inner loop that all attention kernels share: one tile of query rows over a range of one sequence's keys.

Rows of a tile are query tokens times the query heads of one kv head, so that K and V are read once for all of them.
The softmax is computed online (Milakov and Gimelshein 2018; Dao et al. 2022), in base 2, because the hardware computes
exp2. Sums are fp32 whatever the inputs are.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from rrm_kernels.batch import Scores

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2_E = tl.constexpr(math.log2(math.e))


@dataclass(frozen=True, slots=True)
class Tile:
    """``rows`` of queries (tokens times heads) and ``keys`` in each iteration, both powers of two of at least 16."""

    rows: int
    keys: int


@dataclass(frozen=True, slots=True)
class Attention:
    """The tensors and constants of one attention call."""

    query: torch.Tensor  # [tokens, heads, key width], last dimension contiguous
    key_cache: torch.Tensor  # [blocks, block_size, kv heads, key width], contiguous
    value_cache: torch.Tensor  # [blocks, block_size, kv heads, value width], contiguous
    scores: Scores

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key_cache.shape[2]

    @property
    def per_kv(self) -> int:
        return self.heads // self.kv_heads

    @property
    def value_width(self) -> int:
        return self.value_cache.shape[3]

    def tile(self, queries: int) -> Tile:
        """The tile for at most ``queries`` query tokens of a sequence or run; large tiles only pay in long prefills."""
        rows = max(16, self.per_kv, min(64, queries * self.per_kv))
        wide = max(self.query.shape[2], self.value_width) > 128
        return Tile(triton.next_power_of_2(rows), 32 if wide else 64)

    def arguments(self, tile: Tile) -> dict[str, Any]:
        """The kernels' common keyword arguments."""
        scale, softcap = self.scores.scale, self.scores.softcap
        return {
            "query": self.query,
            "key_cache": self.key_cache,
            "value_cache": self.value_cache,
            "scale": scale / softcap if softcap else scale * LOG2_E.value,
            "softcap": (softcap or 0.0) * LOG2_E.value,
            "query_token": self.query.stride(0),
            "query_head": self.query.stride(1),
            "HEADS": self.heads,
            "KV_HEADS": self.kv_heads,
            "BLOCK_SIZE": self.key_cache.shape[1],
            "KEY_WIDTH": self.query.shape[2],
            "VALUE_WIDTH": self.value_width,
            "PADDED_KEY": padded(self.query.shape[2]),
            "PADDED_VALUE": padded(self.value_width),
            "SOFTCAP": softcap is not None,
            "ROWS": tile.rows,
            "KEYS": tile.keys,
        }


def padded(width: int) -> int:
    """The smallest width that ``tl.dot`` accepts for ``width``: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(width))


@triton.jit
def load_query(query, token, head, live, query_token, query_head, KEY_WIDTH: tl.constexpr, PADDED_KEY: tl.constexpr):
    """``[ROWS, PADDED_KEY]``: row r is head ``head[r]`` of packed token ``token[r]``, zeros where not live."""
    dim = tl.arange(0, PADDED_KEY)
    at = token.to(tl.int64) * query_token + head * query_head
    return tl.load(query + at[:, None] + dim[None, :], mask=live[:, None] & (dim < KEY_WIDTH)[None, :], other=0.0)


@triton.jit
def attend_tile(
    q,
    key_cache,
    value_cache,
    table,
    kv_head,
    position,
    first,
    stop,
    top,
    total,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PADDED_KEY: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Attend to the keys ``first`` to ``stop`` of ``table``; a row sees those up to its ``position``, within the
    window.

    ``top`` and ``total``: running maximum and sum of the softmax to start from. Returns the weighted sum of values
    ``[ROWS, PADDED_VALUE]``, not divided by the total yet, and the new ``top`` and ``total``.
    """
    key_dim = tl.arange(0, PADDED_KEY)
    value_dim = tl.arange(0, PADDED_VALUE)
    acc = tl.full([ROWS, PADDED_VALUE], 0.0, tl.float32)
    if INTERPRETED:
        q = q.to(tl.float32)
    for start in range(first, stop, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < stop
        block = tl.load(table + key // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)  # pools exceed 2^31 elements
        line = (block * BLOCK_SIZE + key % BLOCK_SIZE) * KV_HEADS + kv_head
        k = tl.load(
            key_cache + line[:, None] * KEY_WIDTH + key_dim[None, :],
            mask=inside[:, None] & (key_dim < KEY_WIDTH)[None, :],
            other=0.0,
        )
        if INTERPRETED:  # the interpreter's bf16 products are wrong
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if SOFTCAP:
            scores = softcap * (1.0 - 2.0 / (tl.exp2(scores * (2 * LOG2_E)) + 1.0))  # tanh, without NaN at infinity
        seen = inside[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (key[None, :] > position[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # where no key was seen yet: -inf - -inf is NaN
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(top - base)
        v = tl.load(
            value_cache + line[:, None] * VALUE_WIDTH + value_dim[None, :],
            mask=inside[:, None] & (value_dim < VALUE_WIDTH)[None, :],
            other=0.0,
        )
        total = total * fade + tl.sum(weights, 1)
        weights = weights.to(v.dtype)
        if INTERPRETED:
            weights = weights.to(tl.float32)
            v = v.to(tl.float32)
        acc = acc * fade[:, None] + tl.dot(weights, v, input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def store_rows(out, acc, token, head, live, HEADS: tl.constexpr, VALUE_WIDTH: tl.constexpr, PADDED_VALUE: tl.constexpr):
    """Store rows to ``out`` ``[tokens, HEADS, VALUE_WIDTH]``."""
    dim = tl.arange(0, PADDED_VALUE)
    at = (token.to(tl.int64) * HEADS + head) * VALUE_WIDTH
    mask = live[:, None] & (dim < VALUE_WIDTH)[None, :]
    tl.store(out + at[:, None] + dim[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def store_partial(
    partial,
    lse,
    acc,
    top,
    total,
    index,
    tokens,
    token,
    head,
    live,
    HEADS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    PADDED_VALUE: tl.constexpr,
):
    """Store a partial result, and its log-sum-exp in base 2, at ``index`` of ``partial``
    ``[partials, tokens, HEADS, VALUE_WIDTH]`` and ``lse`` ``[partials, tokens, HEADS]``, both fp32.
    """
    saw_any = total > 0
    total = tl.where(saw_any, total, 1.0)
    row = index * tokens + token
    weight = tl.where(saw_any, top + tl.log2(total), float("-inf"))
    tl.store(lse + row.to(tl.int64) * HEADS + head, weight, mask=live)
    store_rows(partial, acc / total[:, None], row, head, live, HEADS, VALUE_WIDTH, PADDED_VALUE)

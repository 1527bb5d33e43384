"""KV cache operations in Triton: store a step's keys and values, copy blocks, move keys to other positions."""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

CHUNK = 1024  # words that one program of a block copy moves
WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


def store_kv(
    key_cache: torch.Tensor, value_cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write ``key`` and ``value`` ``[tokens, kv heads, width]`` to the token ``slots`` of their pools, in one launch.

    A negative slot is skipped: padding of a step whose buffers have a fixed size.
    """
    key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
    tokens, heads, key_width = key.shape
    value_width = value.shape[2]
    _store_kernel[(tokens,)](
        key_cache=key_cache,
        value_cache=value_cache,
        key=key,
        value=value,
        slots=slots,
        key_token=key.stride(0),
        key_head=key.stride(1),
        value_token=value.stride(0),
        value_head=value.stride(1),
        HEADS=heads,
        KEY_WIDTH=key_width,
        VALUE_WIDTH=value_width,
        KEY_LINE=triton.next_power_of_2(heads * key_width),
        VALUE_LINE=triton.next_power_of_2(heads * value_width),
    )


def copy_blocks(
    sources: Sequence[torch.Tensor], destinations: Sequence[torch.Tensor], pairs: Sequence[tuple[int, int]]
) -> None:
    """Copy block a of ``sources[i]`` to block b of ``destinations[i]`` for every pool i and pair (a, b), in one launch.

    The pools ``[blocks, ...]`` are contiguous, on one device, and may differ in all but the size of their blocks, pool
    for pool. Every source is read before any destination is written, so a block may be both.
    """
    if not pairs or not sources:
        return
    device = sources[0].device
    read, written = {a for a, _ in pairs}, {b for _, b in pairs}
    if read & written and any(s.data_ptr() == d.data_ptr() for s, d in zip(sources, destinations, strict=True)):
        first, last = torch.tensor(pairs, device=device).unbind(1)
        for source, destination in zip(sources, destinations, strict=True):
            destination.index_copy_(0, last, source.index_select(0, first))
        return
    sizes = [source[0].nbytes for source in sources]
    if sizes != [destination[0].nbytes for destination in destinations]:
        raise ValueError("the blocks of source and destination pools differ in size")
    word = math.gcd(8, *sizes)
    pools = [[s.data_ptr(), d.data_ptr(), n // word] for s, d, n in zip(sources, destinations, sizes, strict=True)]
    grid = (len(pairs), len(pools), triton.cdiv(max(sizes) // word, CHUNK))
    _copy_kernel[grid](
        pools=torch.tensor(pools, device=device),
        pairs=torch.tensor(pairs, device=device),
        WORD=WORDS[word],
        CHUNK=CHUNK,
    )


def rerotate_keys(
    key_cache: torch.Tensor,
    slots: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    sources: torch.Tensor | None = None,
) -> None:
    """``rope.rerotate`` of the keys at ``slots`` ``[tokens]`` of a pool, in place.

    ``cos`` and ``sin`` fp32 ``[tokens, rotary / 2]`` come from ``rope.rotation``, once for all layers. With ``sources``
    the keys are read from those slots instead and left as they are there; no source may be another token's slot.
    """
    _, _, heads, width = key_cache.shape
    half = cos.shape[1]
    _rerotate_kernel[(len(slots),)](
        cache=key_cache,
        slots=slots,
        sources=slots if sources is None else sources,
        cos=cos,
        sin=sin,
        HEADS=heads,
        WIDTH=width,
        HALF=half,
        PADDED_HEADS=triton.next_power_of_2(heads),
        PADDED_HALF=triton.next_power_of_2(half),
        PADDED_REST=triton.next_power_of_2(max(1, width - 2 * half)),
    )


@triton.jit
def _store_kernel(
    key_cache,
    value_cache,
    key,
    value,
    slots,
    key_token,
    key_head,
    value_token,
    value_head,
    HEADS: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    KEY_LINE: tl.constexpr,
    VALUE_LINE: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    at = tl.arange(0, KEY_LINE)
    inside = at < HEADS * KEY_WIDTH
    line = tl.load(key + token * key_token + at // KEY_WIDTH * key_head + at % KEY_WIDTH, mask=inside)
    tl.store(key_cache + slot * (HEADS * KEY_WIDTH) + at, line, mask=inside)
    at = tl.arange(0, VALUE_LINE)
    inside = at < HEADS * VALUE_WIDTH
    line = tl.load(value + token * value_token + at // VALUE_WIDTH * value_head + at % VALUE_WIDTH, mask=inside)
    tl.store(value_cache + slot * (HEADS * VALUE_WIDTH) + at, line, mask=inside)


@triton.jit
def _copy_kernel(pools, pairs, WORD: tl.constexpr, CHUNK: tl.constexpr):
    """``pools`` int64 ``[pools, 3]``: addresses of source and destination, words of a block."""
    pair, pool, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    source = tl.load(pools + pool * 3).to(tl.pointer_type(WORD))
    destination = tl.load(pools + pool * 3 + 1).to(tl.pointer_type(WORD))
    words = tl.load(pools + pool * 3 + 2)
    first = tl.load(pairs + pair * 2)
    last = tl.load(pairs + pair * 2 + 1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    tl.store(destination + last * words + at, tl.load(source + first * words + at, mask=at < words), mask=at < words)


@triton.jit
def _rerotate_kernel(
    cache,
    slots,
    sources,
    cos,
    sin,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PADDED_REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    source = cache + tl.load(sources + token).to(tl.int64) * (HEADS * WIDTH)
    destination = cache + tl.load(slots + token).to(tl.int64) * (HEADS * WIDTH)
    head = tl.arange(0, PADDED_HEADS)[:, None]
    dim = tl.arange(0, PADDED_HALF)[None, :]
    at = head * WIDTH + dim
    inside = (head < HEADS) & (dim < HALF)
    c = tl.load(cos + token * HALF + dim, mask=dim < HALF, other=0.0)
    s = tl.load(sin + token * HALF + dim, mask=dim < HALF, other=0.0)
    x = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(source + at + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(destination + at, (x * c - y * s).to(cache.dtype.element_ty), mask=inside)
    tl.store(destination + at + HALF, (y * c + x * s).to(cache.dtype.element_ty), mask=inside)
    if 2 * HALF < WIDTH:  # not rotated
        dim = 2 * HALF + tl.arange(0, PADDED_REST)[None, :]
        at = head * WIDTH + dim
        inside = (head < HEADS) & (dim < WIDTH)
        tl.store(destination + at, tl.load(source + at, mask=inside), mask=inside)

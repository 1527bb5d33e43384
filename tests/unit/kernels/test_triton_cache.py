"""KV cache operations in Triton against the torch reference."""

import pytest
import torch
from rrm_kernels import reference
from rrm_kernels.rope import rerotate, rotation

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux)")
from rrm_kernels.cache_ops import copy_blocks, rerotate_keys, store_kv
from rrm_kernels.tile import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "widths"), [(2, (16, 16)), (3, (20, 7)), (1, (5, 8))])
def test_stored_keys_and_values_equal_the_reference(dtype: torch.dtype, heads: int, widths: tuple[int, int]) -> None:
    slots = torch.tensor([17, 3, 4, 0, 26, 9], device=DEVICE)
    pools = [random(9, 3, heads, width, dtype=dtype) for width in widths]
    expected = [pool.clone() for pool in pools]
    new = [random(heads, 6, width, dtype=dtype).transpose(0, 1) for width in widths]  # strided, as transformers gives
    for pool, rows in zip(expected, new, strict=True):
        reference.store_kv(pool, rows, slots)
    store_kv(*pools, *new, slots)
    assert all(torch.equal(pool, e) for pool, e in zip(pools, expected, strict=True))
    slots[2] = 5  # negative control: every slot counts
    store_kv(*pools, *new, slots)
    assert not any(torch.equal(pool, e) for pool, e in zip(pools, expected, strict=True))


def test_padding_is_not_stored() -> None:
    key, value = random(4, 2, 1, 8), random(4, 2, 1, 8)
    before = key.clone()
    new = random(3, 1, 8)
    store_kv(key, value, new, new, torch.tensor([-1, 6, -1], device=DEVICE))
    assert torch.equal(key.view(8, 1, 8)[6], new[1])
    key.view(8, 1, 8)[6] = before.view(8, 1, 8)[6]
    assert torch.equal(key, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pairs", [[(1, 4), (2, 5), (1, 6)], [(1, 2), (2, 3), (3, 1)]])  # apart; a cycle
def test_block_copies_of_many_pools_at_once(dtype: torch.dtype, pairs: list[tuple[int, int]]) -> None:
    shapes = [(9, 3, 2, 5), (9, 3, 2, 16), (7, 3, 130, 4)]
    pools = [random(*shape, dtype=dtype) for shape in shapes]
    expected = [pool.clone() for pool in pools]
    first, last = torch.tensor(pairs, device=DEVICE).unbind(1)
    for pool in expected:
        reference.copy_blocks(pool, first, last)
    copy_blocks(pools, pools, pairs)
    assert all(torch.equal(pool, e) for pool, e in zip(pools, expected, strict=True))
    copy_blocks(pools, pools, pairs[:0])
    copy_blocks(pools, pools, [(1, 2)])  # negative control
    assert not any(torch.equal(pool, e) for pool, e in zip(pools, expected, strict=True))


def test_block_copies_between_pools() -> None:
    here, there = random(5, 4, 2, 8), random(11, 4, 2, 8)
    expected = there.clone()
    expected[[10, 2]] = here[[2, 4]]
    copy_blocks([here], [there], [(2, 10), (4, 2)])
    assert torch.equal(there, expected)
    with pytest.raises(ValueError, match="differ in size"):
        copy_blocks([here], [random(5, 4, 2, 4)], [(1, 1)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width", "half"), [(2, 16, 8), (3, 20, 4), (1, 12, 6)])
def test_moved_keys_equal_the_reference(dtype: torch.dtype, heads: int, width: int, half: int) -> None:
    pool = random(8, 4, heads, width, dtype=dtype)
    before = pool.clone()
    inv_freq = (1e4 ** -(torch.arange(half) / half)).to(DEVICE)
    delta = torch.tensor([0, 5, -900, 12_345], device=DEVICE)
    slots = torch.tensor([30, 6, 7, 11], device=DEVICE)
    expected = pool.clone()
    reference.store_kv(expected, rerotate(pool.flatten(0, 1)[slots], delta, inv_freq), slots)
    bound = 1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    rerotate_keys(pool, slots, *rotation(delta, inv_freq))
    assert torch.allclose(pool, expected, rtol=bound, atol=bound)
    assert torch.equal(pool[0], before[0])
    assert torch.equal(pool.flatten(0, 1)[30], before.flatten(0, 1)[30])  # moved by 0
    rerotate_keys(pool, slots, *rotation(-delta - 1, inv_freq))  # negative control: not quite back
    assert not torch.allclose(pool, before, rtol=0.01, atol=0.01)

    pool = before.clone()
    sources, free = slots, torch.tensor([1, 2, 3, 4], device=DEVICE)
    rerotate_keys(pool, free, *rotation(delta, inv_freq), sources)
    assert torch.allclose(pool.flatten(0, 1)[free], expected.flatten(0, 1)[slots], rtol=bound, atol=bound)
    assert torch.equal(pool.flatten(0, 1)[5:], before.flatten(0, 1)[5:])

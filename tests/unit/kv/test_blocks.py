"""Whose blocks are whose, told in short stories with the very block ids. Blocks hold two tokens here."""

import pytest

from rrm_engine.kv.host import HostSpace
from rrm_engine.kv.pool import BlockPool, OutOfBlocks
from rrm_engine.kv.table import BlockTable


def table_of(pool: BlockPool, tokens: list[int], space: HostSpace | None = None) -> BlockTable:
    """A table whose KV is computed and offered to the prefix cache."""
    table = BlockTable(pool, space)
    table.append(len(tokens))
    table.register(tokens)
    return table


def test_two_sequences_come_and_one_goes() -> None:
    pool = BlockPool(4, 2, prefix_cache=False)
    first, second = BlockTable(pool), BlockTable(pool)
    first.append(3)
    second.append(2)
    assert (first.blocks, second.blocks) == ([1, 2], [3])
    first.append(1)  # the second token of block 2
    assert first.blocks == [1, 2] and first.slots(0, 4) == [2, 3, 4, 5]
    first.release()
    second.append(3)  # the block that came free last is the first to be taken
    assert second.blocks == [3, 1, 2] and pool.num_free == 1
    with pytest.raises(OutOfBlocks):
        second.append(4)
    assert second.blocks == [3, 1, 2]


def test_a_child_shares_its_parents_blocks_until_it_writes() -> None:
    pool = BlockPool(6, 2, prefix_cache=False)
    parent = BlockTable(pool)
    parent.append(3)
    child = parent.fork(3)
    assert child.blocks == [1, 2] and (pool.refs(1), pool.refs(2)) == (2, 2)
    assert child.append(1) == [(2, 3)]  # block 2 is half full and the parent's too: it is copied
    assert (parent.blocks, child.blocks) == ([1, 2], [1, 3]) and (pool.refs(1), pool.refs(2)) == (2, 1)
    assert parent.append(1) == []  # now block 2 is its own
    parent.release()
    assert pool.refs(1) == 1 and pool.num_used == 2


def test_a_prompt_is_found_again_until_its_blocks_are_needed() -> None:
    pool = BlockPool(4, 2)
    table_of(pool, [1, 2, 3, 4, 5]).release()  # blocks 1 and 2 are full and stay findable, 3 is free
    assert pool.match([1, 2, 3, 4, 9]) == [1, 2] and pool.num_free == 4
    again = BlockTable(pool)
    assert again.reuse([1, 2, 7]) == 2 and again.blocks == [1]
    other = BlockTable(pool)
    other.append(6)  # 3, 4, and then one that is cached and not held
    assert sorted(other.blocks) == [2, 3, 4]
    assert pool.match([1, 2, 3, 4, 9]) == [1], "block 2 holds something else now"
    pool.check([again.blocks, other.blocks])


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    pool = BlockPool(4, 2)
    table_of(pool, [1, 2, 3, 4]).release()
    assert pool.match([1, 2, 3, 4]) == [1]


def test_a_tail_goes_to_the_host_and_comes_back_elsewhere() -> None:
    pool, space = BlockPool(4, 2, prefix_cache=False), HostSpace(2)
    table = BlockTable(pool, space)
    table.append(5)
    child = table.fork(2)
    assert table.first_own == 1  # block 1 is the child's too
    assert table.offload(1) is not None
    assert table.blocks == [1] and pool.num_free == 3
    with pytest.raises(ValueError, match="comes back before"):
        table.append(1)
    BlockTable(pool).append(2)
    table.restore()
    assert len(table.blocks) == 3 and table.blocks[0] == 1 and pool.num_free == 0
    assert child.blocks == [1] and pool.refs(1) == 2
    assert table.offload(0) is None, "the host has room for two blocks"


def test_what_nobody_holds_is_not_given_back_or_shared() -> None:
    pool = BlockPool(2, 2)
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(ValueError, match="block 1 is released more often than it was taken"):
        pool.release(block)
    with pytest.raises(KeyError):
        pool.share([block])

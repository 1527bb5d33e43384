"""The block table of one sequence: which blocks hold the KV of its first ``length`` tokens."""

from collections.abc import Sequence

from rrm_engine.kv.pool import ROOT_UID, BlockPool, OutOfBlocks

BlockCopy = tuple[int, int]  # (source block, destination block), to be done before the next write


class BlockTable:
    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.blocks: list[int] = []
        self.length = 0  # tokens whose KV is stored
        self._uids: list[int] = []  # of the leading full blocks that were offered to the prefix cache

    def blocks_needed(self, count: int) -> int:
        """Blocks that ``append(count)`` would allocate, the copy of a shared partial block included."""
        size = self.pool.block_size
        new = -(-(self.length + count) // size) - len(self.blocks)
        tail_is_shared = self.length % size and self.pool.refs(self.blocks[-1]) > 1
        return new + (1 if tail_is_shared and count else 0)

    def append(self, count: int) -> list[BlockCopy]:
        """Make room for ``count`` more tokens. A shared partial tail is replaced by a copy of its own.

        Returns the copies to do before anything is written. Raises OutOfBlocks before changing anything.
        """
        pool, size = self.pool, self.pool.block_size
        needed = self.blocks_needed(count)
        if needed > pool.num_free:
            raise OutOfBlocks(f"{needed} blocks needed, {pool.num_free} free")
        copies: list[BlockCopy] = []
        if count and self.length % size:
            tail = self.blocks[-1]
            if not pool.writable(tail):
                own = pool.allocate()
                copies.append((tail, own))
                pool.release(tail)
                self.blocks[-1] = own
        self.length += count
        while len(self.blocks) * size < self.length:
            self.blocks.append(pool.allocate())
        return copies

    def slots(self, start: int, stop: int) -> list[int]:
        """Pool slots (block id x block size + offset) of the tokens ``start`` to ``stop``."""
        size, blocks = self.pool.block_size, self.blocks
        return [blocks[i // size] * size + i % size for i in range(start, stop)]

    def reuse(self, tokens: Sequence[int]) -> int:
        """Fill an empty table from the prefix cache; returns the number of tokens whose KV it now has."""
        if self.blocks:
            raise ValueError("only an empty table can start from the prefix cache")
        if not self.pool.prefix_cache:
            return 0
        blocks = self.pool.match(tokens)
        for block in blocks:
            self.pool.share(block)
        self.blocks = blocks
        self._uids = [self.pool.uid(block) for block in blocks]
        self.length = len(blocks) * self.pool.block_size
        return self.length

    def register(self, tokens: Sequence[int]) -> None:
        """Offer full blocks to the prefix cache; ``tokens`` are the sequence's, at least ``length`` of them."""
        if not self.pool.prefix_cache:
            return
        size = self.pool.block_size
        for i in range(len(self._uids), self.length // size):
            parent = self._uids[-1] if self._uids else ROOT_UID
            key = tuple(tokens[i * size : (i + 1) * size])
            self._uids.append(self.pool.register(self.blocks[i], parent, key))

    def fork(self, length: int) -> "BlockTable":
        """A table over the first ``length`` tokens that shares every block, the partial tail included."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot fork {length} of {self.length} tokens")
        child = BlockTable(self.pool)
        child.blocks = self.blocks[: -(-length // self.pool.block_size)]
        for block in child.blocks:
            self.pool.share(block)
        child.length = length
        child._uids = self._uids[: length // self.pool.block_size]
        return child

    def truncate(self, length: int) -> None:
        """Forget the KV behind ``length`` tokens."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate {self.length} tokens to {length}")
        keep = -(-length // self.pool.block_size)
        for block in reversed(self.blocks[keep:]):
            self.pool.release(block)
        del self.blocks[keep:]
        self.length = length
        del self._uids[length // self.pool.block_size :]

    def release(self) -> None:
        """Give all blocks back, the tail first, so that the prefix cache evicts ends before beginnings."""
        self.truncate(0)

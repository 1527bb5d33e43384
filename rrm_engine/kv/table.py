"""The block table of one sequence: which blocks hold the KV of its first ``length`` tokens."""

from collections.abc import Sequence

from rrm_engine.kv.host import HostCopy, HostSpace, SwapIn, SwapOut
from rrm_engine.kv.pool import ROOT_UID, BlockPool, OutOfBlocks

BlockCopy = tuple[int, int]  # (source block, destination block), to be done before the next write


class BlockTable:
    """``blocks`` hold the KV of the first ``length`` tokens, ``host`` that of the tokens after them.

    ``approximate_from``, if not None, is the first token whose KV was attached instead of computed. From there on KV is
    not what the tokens would give, so the prefix cache must not find it.
    """

    def __init__(self, pool: BlockPool, space: HostSpace | None = None) -> None:
        self.pool = pool
        self.space = space or HostSpace()
        self.blocks: list[int] = []
        self.length = 0  # tokens whose KV is in ``blocks``
        self.stored = 0  # those in host memory included
        self.host: list[HostCopy] = []
        self.approximate_from: int | None = None
        self._uids: list[int] = []  # of the leading full blocks that were offered to the prefix cache

    def blocks_needed(self, count: int) -> int:
        """Blocks that ``append(count)`` would allocate, with one for the copy of a shared partial block."""
        size = self.pool.block_size
        new = -(-(self.length + count) // size) - len(self.blocks)
        tail_is_shared = self.length % size and self.pool.refs(self.blocks[-1]) > 1
        return new + (1 if tail_is_shared and count else 0)

    def append(self, count: int, exact: bool = True) -> list[BlockCopy]:
        """Make room for ``count`` more tokens. A partly filled last block that is shared is replaced by a copy.

        ``exact`` is False for KV that is attached instead of computed.
        Returns the copies to do before anything is written. Raises OutOfBlocks before changing anything.
        """
        pool, size = self.pool, self.pool.block_size
        if self.host:
            raise ValueError("what is in host memory comes back before more is appended")
        needed = self.blocks_needed(count)
        if needed > pool.num_free:
            raise OutOfBlocks(f"{needed} blocks needed, {pool.num_free} free")
        if not exact and self.approximate_from is None:
            self.approximate_from = self.length
        copies: list[BlockCopy] = []
        if count and self.length % size:
            tail = self.blocks[-1]
            if not pool.take_for_writing(tail):
                own = pool.allocate()
                copies.append((tail, own))
                pool.release(tail)
                self.blocks[-1] = own
        self.length += count
        self.stored = self.length
        while len(self.blocks) * size < self.length:
            self.blocks.append(pool.allocate())
        return copies

    def slots(self, start: int, stop: int) -> list[int]:
        """Pool slots (block id x block size + offset) of the tokens ``start`` to ``stop``."""
        size, blocks = self.pool.block_size, self.blocks
        return [blocks[i // size] * size + i % size for i in range(start, stop)]

    def reuse(self, tokens: Sequence[int]) -> int:
        """Fill an empty table from the prefix cache; returns the number of tokens whose KV it now has."""
        if self.blocks or self.host:
            raise ValueError("only an empty table can start from the prefix cache")
        if not self.pool.prefix_cache:
            return 0
        blocks = self.pool.match(tokens)
        self.pool.share(blocks)
        self.blocks = blocks
        self._uids = [self.pool.uid(block) for block in blocks]
        self.length = self.stored = len(blocks) * self.pool.block_size
        return self.length

    def register(self, tokens: Sequence[int]) -> None:
        """Offer full blocks of exact KV to the prefix cache, as far as the sequence's ``tokens`` are known."""
        if not self.pool.prefix_cache:
            return
        size = self.pool.block_size
        exact = self.length if self.approximate_from is None else self.approximate_from
        for i in range(len(self._uids), min(exact, len(tokens)) // size):
            parent = self._uids[-1] if self._uids else ROOT_UID
            key = tuple(tokens[i * size : (i + 1) * size])
            self._uids.append(self.pool.register(self.blocks[i], parent, key))

    def fork(self, length: int) -> "BlockTable":
        """A table over the first ``length`` tokens that shares all their blocks, a partly filled last one included."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot fork {length} of {self.length} tokens")
        child = BlockTable(self.pool, self.space)
        child.blocks = self.blocks[: -(-length // self.pool.block_size)]
        self.pool.share(child.blocks)
        child.length = child.stored = length
        child._uids = self._uids[: length // self.pool.block_size]
        if self.approximate_from is not None and self.approximate_from < length:
            child.approximate_from = self.approximate_from
        return child

    def truncate(self, length: int) -> None:
        """Forget the KV past the first ``length`` tokens."""
        if not 0 <= length <= self.stored:
            raise ValueError(f"cannot truncate {self.stored} tokens to {length}")
        self._cut(length, keep_cached=True)

    def release(self) -> None:
        """Give all blocks back, the last first, so that the prefix cache evicts ends before beginnings."""
        self._cut(0, keep_cached=True)

    def discard(self) -> None:
        """Give all blocks back, and take those that no other table holds out of the prefix cache."""
        self._cut(0, keep_cached=False)

    @property
    def first_own(self) -> int:
        """Index of the first of the trailing blocks that no other table holds."""
        first = len(self.blocks)
        while first and self.pool.refs(self.blocks[first - 1]) == 1:
            first -= 1
        return first

    def offload(self, first: int) -> SwapOut | None:
        """Move the blocks from index ``first`` on to host memory; None, and nothing changed, if that has no room."""
        count = len(self.blocks) - first
        if count < 1 or not self.space.take(count):
            return None
        copy = HostCopy(count)
        blocks, stored = tuple(self.blocks[first:]), self.stored
        rest, self.host, approximate_from = self.host, [], self.approximate_from
        self._cut(first * self.pool.block_size, keep_cached=False)
        self.host, self.stored, self.approximate_from = [copy, *rest], stored, approximate_from
        return copy, blocks

    def restore(self) -> list[SwapIn]:
        """Take blocks for everything in host memory. Raises OutOfBlocks before changing anything."""
        needed = sum(copy.count for copy in self.host)
        if needed > self.pool.num_free:
            raise OutOfBlocks(f"{needed} blocks needed, {self.pool.num_free} free")
        swaps = []
        for copy in self.host:
            blocks = tuple(self.pool.allocate() for _ in range(copy.count))
            self.blocks += blocks
            swaps.append((copy, blocks))
        self.space.give(needed)
        self.host, self.length = [], self.stored
        return swaps

    def _cut(self, length: int, keep_cached: bool) -> None:
        size = self.pool.block_size
        blocks = -(-length // size)
        while self.host and blocks < len(self.blocks) + sum(copy.count for copy in self.host):
            self.space.give(1)
            self.host[-1].count -= 1
            if not self.host[-1].count:
                self.host.pop()
        for block in reversed(self.blocks[blocks:]):
            self.pool.release(block, keep_cached)
        del self.blocks[blocks:]
        self.length = min(self.length, length)
        self.stored = length
        if self.approximate_from is not None and self.approximate_from >= length:
            self.approximate_from = None
        del self._uids[length // size :]

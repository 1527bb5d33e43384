"""Reference-counted blocks and the prefix cache over them. Bookkeeping only, no tensors.

Block 0 is the null block: it belongs to no sequence, and padding may read or write it. Invariant of every method: a
block is written only if it has exactly one reference and the prefix cache cannot find it.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

NULL_BLOCK = 0
ROOT_UID = 0


class OutOfBlocks(Exception):
    """No block is free and none can be evicted; the scheduler must reclaim before it allocates."""


class BlockPool:
    """``num_blocks`` usable blocks of ``block_size`` tokens, ids 1..num_blocks.

    The prefix cache finds a full block by (uid of the block before it, its tokens). Uids are never reused, so a key
    stands for one exact prefix; unlike with hashes there are no collisions.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_cache: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"a pool needs at least one block of one token, not {num_blocks} of {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._refs = [0] * (num_blocks + 1)
        self._free = list(range(num_blocks, 0, -1))  # never cached; a stack
        self._evictable: OrderedDict[int, None] = OrderedDict()  # cached, unreferenced; oldest first
        self._cached: dict[tuple[int, tuple[int, ...]], int] = {}
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._uid_of: dict[int, int] = {}
        self._next_uid = ROOT_UID + 1
        self.peak_used = 0

    @property
    def num_free(self) -> int:
        """Blocks that ``allocate`` can hand out, evictable cached ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def refs(self, block: int) -> int:
        return self._refs[block]

    def uid(self, block: int) -> int:
        """The uid of a cached block, a part of the key of blocks after it. Raises KeyError if it is not cached."""
        return self._uid_of[block]

    def allocate(self) -> int:
        """A block with one reference and undefined content: a free one, else the least recently used cached one.

        Raises OutOfBlocks.
        """
        if self._free:
            block = self._free.pop()
        elif self._evictable:
            block, _ = self._evictable.popitem(last=False)
            self._forget(block)
        else:
            raise OutOfBlocks(f"all {self.num_blocks} blocks are referenced")
        self._refs[block] = 1
        self.peak_used = max(self.peak_used, self.num_used)
        return block

    def share(self, blocks: Sequence[int]) -> None:
        """Add a reference to each of ``blocks``, which must be held or cached."""
        refs = self._refs
        for block in blocks:
            if refs[block] == 0:
                del self._evictable[block]  # KeyError: a free block has no content to share
            refs[block] += 1
        self.peak_used = max(self.peak_used, self.num_used)

    def release(self, block: int, keep_cached: bool = True) -> None:
        """Drop a reference. Without any left the block is free, or evictable if it is cached and ``keep_cached``."""
        if self._refs[block] < 1:
            raise ValueError(f"block {block} is released more often than it was taken")
        self._refs[block] -= 1
        if self._refs[block] == 0:
            if block in self._key_of and keep_cached:
                self._evictable[block] = None
                return
            if block in self._key_of:
                self._forget(block)
            self._free.append(block)

    def take_for_writing(self, block: int) -> bool:
        """Whether the holder of ``block`` may write it in place; if so, takes it out of the prefix cache."""
        if self._refs[block] != 1:
            return False
        if block in self._key_of:
            self._forget(block)
        return True

    def register(self, block: int, parent_uid: int, tokens: tuple[int, ...]) -> int:
        """Let the prefix cache find a full block; returns its uid, to register the next block with.

        If equal content is cached already, that block stays the one that is found, and its uid is returned.
        """
        if not self.prefix_cache:
            return ROOT_UID
        key = (parent_uid, tokens)
        if key in self._cached:
            return self._uid_of[self._cached[key]]
        self._cached[key] = block
        self._key_of[block] = key
        self._uid_of[block] = self._next_uid
        self._next_uid += 1
        return self._uid_of[block]

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The cached blocks of the longest prefix of ``tokens``; adds no reference.

        At least the last token is not matched, because its logits have to be computed.
        """
        blocks: list[int] = []
        uid = ROOT_UID
        for i in range((len(tokens) - 1) // self.block_size):
            block = self._cached.get((uid, tuple(tokens[i * self.block_size : (i + 1) * self.block_size])))
            if block is None:
                break
            blocks.append(block)
            uid = self._uid_of[block]
        return blocks

    def _forget(self, block: int) -> None:
        del self._cached[self._key_of.pop(block)]
        del self._uid_of[block]

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Recount every reference from the block lists of all tables; raises AssertionError on any difference."""
        held = Counter(block for table in tables for block in table)
        for block in range(1, self.num_blocks + 1):
            if self._refs[block] != held[block]:
                raise AssertionError(f"block {block}: {self._refs[block]} references kept, {held[block]} counted")
        free, evictable = set(self._free), set(self._evictable)
        idle = {b for b in range(1, self.num_blocks + 1) if self._refs[b] == 0}
        if len(free) != len(self._free) or free & evictable or free | evictable != idle:
            raise AssertionError("the free lists are not exactly the unreferenced blocks")
        if NULL_BLOCK in held or evictable - self._key_of.keys() or free & self._key_of.keys():
            raise AssertionError("null block held, or cache entries do not fit the free lists")
        if {b: k for k, b in self._cached.items()} != self._key_of or self._uid_of.keys() != self._key_of.keys():
            raise AssertionError("the prefix cache's two directions disagree")

"""KV of some consecutive tokens, held to be attached to another sequence. Bookkeeping only, no tensors."""

from collections.abc import Sequence

from rrm_engine.kv.table import BlockTable


class Span:
    """References to the blocks that hold the KV of the tokens ``start`` to ``stop`` of a table.

    The table may be extended, truncated or released meanwhile: shared blocks are never written, so a span's KV stays as
    it was. When memory runs out a span may be released; then ``live`` is False and its tokens have to be prefilled.
    """

    def __init__(self, table: BlockTable, start: int, stop: int, tokens: Sequence[int]) -> None:
        """``tokens`` are those from ``start`` to ``stop``. Raises ValueError if the table does not have their KV."""
        if not 0 <= start < stop <= table.length or len(tokens) != stop - start:
            raise ValueError(f"there is KV of {table.length} tokens, and {start} to {stop} were asked for")
        size = table.pool.block_size
        self.pool = table.pool
        self.start = start
        self.tokens = tuple(tokens)
        self.blocks = table.blocks[start // size : -(-stop // size)]
        self.pool.share(self.blocks)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def live(self) -> bool:
        return bool(self.blocks)

    @property
    def slots(self) -> list[int]:
        """Pool slots (block id x block size + offset) of its tokens."""
        size = self.pool.block_size
        first = self.start % size
        return [self.blocks[i // size] * size + i % size for i in range(first, first + len(self))]

    def release(self) -> None:
        """Give the references back; repeating it is harmless."""
        for block in self.blocks:
            self.pool.release(block)
        self.blocks = []

"""Host memory for KV that was moved off the device. Bookkeeping only; the contents are opaque here."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

COPIES_PER_ROUND_TRIP = 2  # out and back in


@dataclass(slots=True, eq=False)
class HostCopy:
    """Consecutive blocks of one sequence, ``count`` of them. ``payload`` is set where the swap is carried out."""

    count: int
    payload: Any = None


SwapOut = tuple[HostCopy, tuple[int, ...]]  # to fill, and the device blocks to read
SwapIn = tuple[HostCopy, tuple[int, ...]]  # to read, and the device blocks to write


class HostSpace:
    """Counts the blocks in host memory, which has room for ``num_blocks``."""

    def __init__(self, num_blocks: int = 0) -> None:
        self.num_blocks = num_blocks
        self.num_used = 0
        self.peak_used = 0

    def take(self, count: int) -> bool:
        """Reserve ``count`` blocks; False if there is no room."""
        if self.num_used + count > self.num_blocks:
            return False
        self.num_used += count
        self.peak_used = max(self.peak_used, self.num_used)
        return True

    def give(self, count: int) -> None:
        self.num_used -= count

    def check(self, copies: Iterable[HostCopy]) -> None:
        """Recount from the copies of all tables; raises AssertionError on any difference."""
        held = sum(copy.count for copy in copies)
        if held != self.num_used or not 0 <= held <= self.num_blocks:
            raise AssertionError(f"{self.num_used} host blocks kept of {self.num_blocks}, {held} counted")


@dataclass(frozen=True, slots=True)
class SwapCosts:
    """Measured seconds to copy one block between device and host, one way, and to prefill one token."""

    copy_block_s: float
    prefill_token_s: float

    def offload_is_cheaper(self, blocks: int, tokens: int) -> bool:
        """Whether moving ``blocks`` out and back costs less than computing their ``tokens`` again."""
        return COPIES_PER_ROUND_TRIP * blocks * self.copy_block_s < tokens * self.prefill_token_s

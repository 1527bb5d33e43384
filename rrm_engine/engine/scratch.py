"""Running tokens on a cache of its own, without an engine: to check a model, inspect it or time it."""

import torch
from rrm_kernels.batch import PagedAttention

from rrm_engine.engine.packing import PackedStep
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.scheduler import Work
from rrm_engine.engine.sequence import Sequence
from rrm_engine.kv.cache import KVCache
from rrm_engine.kv.pool import BlockPool
from rrm_engine.kv.table import BlockTable
from rrm_engine.models.attention import Exchange, Forward, PagedForward


class Scratch:
    """Sequences over the blocks of a cache. None of them is ever finished: to use the blocks again, make another
    ``Scratch``.
    """

    def __init__(self, cache: KVCache) -> None:
        self.pool = BlockPool(cache.num_blocks, cache.block_size, prefix_cache=False)

    def sequence(self, tokens: list[int], stored: int = 0, key: str = "scratch") -> Sequence:
        """A sequence whose first ``stored`` tokens count as run: their KV is whatever the cache holds there."""
        sequence = Sequence(key, tokens, BlockTable(self.pool), SamplingParams(), noise_key=0, budget=1)
        sequence.table.append(stored)
        return sequence

    def next(self, sequence: Sequence, count: int) -> Work:
        """Run its next ``count`` tokens, and sample after the last of them."""
        start = sequence.table.length
        sequence.table.append(count)
        return Work(sequence, start, count, samples=True)


@torch.inference_mode()
def run_packed(
    step: PackedStep, cache: KVCache, forward: Forward, attend: PagedAttention, exchange: Exchange | None = None
) -> torch.Tensor:
    """The logits ``[rows, vocabulary]`` of the step's ``sampled`` rows."""
    paged = PagedForward(cache, step.batch, attend, exchange=exchange)
    return forward(step.token_ids, step.positions, step.sampled, paged)

"""One packed forward for everything a step runs: prefill chunks and decodes of all sequences together."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from rrm_kernels.reference import DecodeGroup, PagedAttention, PagedBatch, PrefillChunk, paged_attention

from rrm_engine.engine.ranges import Ranges
from rrm_engine.engine.scheduler import SchedulerOutput, Splice, Work
from rrm_engine.kv.cache import KVCache
from rrm_engine.kv.pool import NULL_BLOCK
from rrm_engine.models.attention import Forward, PagedForward


@dataclass(slots=True)
class PackedStep:
    """A step's inputs: decodes first (by length), then chunks. ``sampled`` are the rows whose logits are needed."""

    token_ids: torch.Tensor  # int64 [tokens]
    positions: torch.Tensor  # int64 [tokens]
    batch: PagedBatch
    sampled: torch.Tensor  # int64 [rows]
    order: list[Work]  # the work items that sample, in the order of ``sampled``


class ModelRunner:
    """Runs a model on one device over one cache."""

    def __init__(
        self, forward: Forward, cache: KVCache, device: torch.device, attend: PagedAttention = paged_attention
    ) -> None:
        self.attend = attend
        self.forward = forward
        self.cache = cache
        self.device = device
        self.ranges = Ranges()
        self.rotary: Mapping[int, torch.Tensor] = {}  # what splices need: see engine/rotary.py

    @torch.inference_mode()
    def run(self, step: SchedulerOutput) -> tuple[torch.Tensor, list[Work]]:
        """Logits ``[rows, vocabulary]`` of the work items that sample, and those items in row order."""
        if step.swap_outs or step.swap_ins:
            with self.ranges("offload", step.swapped):
                for copy, blocks in step.swap_outs:
                    self.cache.swap_out(copy, blocks)
                for copy, blocks in step.swap_ins:
                    self.cache.swap_in(copy, blocks)
        if step.copies:
            copied = {destination for _, destination in step.copies}
            with self.ranges("fork copy", (w for w in step.work if copied & {*w.sequence.table.blocks})):
                self.cache.copy(list(step.copies))
        if step.splices:
            with self.ranges("splice", (s.sequence for s in step.splices)):
                self._splice(step.splices)
        with self.ranges("pack", step.work):
            packed = pack(step.work, self.cache.block_size, self.device)
        with self.ranges.forward(step.work):
            paged = PagedForward(self.cache, packed.batch, self.attend)
            logits = self.forward(packed.token_ids, packed.positions, packed.sampled, paged)
        return logits, packed.order

    def _splice(self, splices: tuple[Splice, ...]) -> None:
        sources, destinations, moves = [], [], []
        for splice in splices:
            span, position = splice.span, splice.position
            sources += span.slots
            destinations += splice.sequence.table.slots(position, position + len(span))
            moves += [position - span.start] * len(span)
        self.cache.splice(sources, destinations, moves, self.rotary)


def pack(work: tuple[Work, ...], block_size: int, device: torch.device) -> PackedStep:
    """Lay a step's tokens side by side and say where each one's KV goes and what it attends to."""
    decodes = sorted((w for w in work if w.count == 1), key=lambda w: len(w.sequence.table.blocks))
    prefills = [w for w in work if w.count > 1]
    tokens = [w.sequence.tokens[w.start] for w in decodes]
    positions = [w.start for w in decodes]
    slots = [w.sequence.table.blocks[w.start // block_size] * block_size + w.start % block_size for w in decodes]
    sampled = [row for row, w in enumerate(decodes) if w.samples]
    order = [w for w in decodes if w.samples]
    chunks = []
    for w in prefills:
        first, stop = len(tokens), w.start + w.count
        tokens += w.sequence.tokens[w.start : stop]
        positions += range(w.start, stop)
        slots += w.sequence.table.slots(w.start, stop)
        table = torch.tensor(w.sequence.table.blocks, device=device)
        chunks.append(PrefillChunk(first, len(tokens), table, stop))
        if w.samples:
            sampled.append(len(tokens) - 1)
            order.append(w)
    batch = PagedBatch(_tensor(slots, device), _group(decodes, device), chunks)
    return PackedStep(_tensor(tokens, device), _tensor(positions, device), batch, _tensor(sampled, device), order)


def _tensor(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64)).to(device)


def _group(decodes: list[Work], device: torch.device) -> list[DecodeGroup]:
    """Decoding sequences, already in order of length, cut where padding to the longest would waste too much."""
    groups = []
    start = 0
    for stop in range(1, len(decodes) + 1):
        shortest = len(decodes[start].sequence.table.blocks)
        if stop == len(decodes) or len(decodes[stop].sequence.table.blocks) > 2 * shortest + 8:
            rows = [w.sequence.table.blocks for w in decodes[start:stop]]
            width = len(rows[-1])
            tables = np.full((len(rows), width), NULL_BLOCK, dtype=np.int64)
            for row, blocks in enumerate(rows):
                tables[row, : len(blocks)] = blocks
            lengths = _tensor([w.start + 1 for w in decodes[start:stop]], device)
            groups.append(DecodeGroup(start, stop, torch.from_numpy(tables).to(device), lengths))
            start = stop
    return groups

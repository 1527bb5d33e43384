"""One packed forward for everything a step runs: prefill chunks and decodes of all sequences together."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from rrm_kernels.reference import DecodeGroup, PagedAttention, PagedBatch, PrefillChunk, paged_attention

from rrm_engine.device.transfer import integers
from rrm_engine.engine.packing import Drawn, lay_out
from rrm_engine.engine.ranges import Ranges
from rrm_engine.engine.scheduler import SchedulerOutput, Splice, Work
from rrm_engine.engine.static_steps import static_steps
from rrm_engine.kv.cache import KVCache
from rrm_engine.kv.pool import NULL_BLOCK
from rrm_engine.models.attention import Forward, PagedForward, batch_on


@dataclass(slots=True)
class PackedStep:
    """A step's inputs: decodes first (by length), then chunks. ``sampled`` are the rows whose logits are needed."""

    token_ids: torch.Tensor  # int64 [tokens]
    positions: torch.Tensor  # int64 [tokens]
    batch: PagedBatch
    sampled: torch.Tensor  # int64 [rows]
    order: list[Work]  # the work items that sample, in the order of ``sampled``


class ModelRunner:
    """Runs a model over one cache; ``device`` is where its layers begin.

    Nothing here waits for a device, and steps are given to the devices one after the other: what a step writes on a
    device comes behind everything that earlier steps read there. That is why blocks of a step in flight may be
    released, cached, forked, offloaded and given to others as soon as it has been launched.
    """

    def __init__(
        self,
        forward: Forward,
        cache: KVCache,
        device: torch.device,
        attend: PagedAttention = paged_attention,
        eager: bool = False,
    ) -> None:
        """``eager``: launch every step's kernels one by one, where they could be captured and replayed."""
        self.static = static_steps(forward, attend, cache, device, eager)
        self.attend = attend
        self.forward = forward
        self.cache = cache
        self.device = device
        self.ranges = Ranges()
        self.rotary: Mapping[int, torch.Tensor] = {}  # what splices need: see loading/rotary.py

    @torch.inference_mode()
    def run(self, step: SchedulerOutput, drawn: Drawn | None = None) -> tuple[torch.Tensor, list[Work]]:
        """Logits ``[rows, vocabulary]`` of the work items that sample, and those items in row order.

        A step without work only moves blocks. ``drawn`` are the tokens of the step before, if they are in flight.
        """
        if step.swap_outs:
            with self.ranges("offload", step.swapped):
                for copy, blocks in step.swap_outs:
                    self.cache.swap_out(copy, blocks)
        if step.copies:
            copied = {destination for _, destination in step.copies}
            with self.ranges("fork copy", (w for w in step.work if copied & {*w.sequence.table.blocks})):
                self.cache.copy(list(step.copies))
        if step.swap_ins:
            with self.ranges("offload", step.swapped):
                for copy, blocks in step.swap_ins:
                    self.cache.swap_in(copy, blocks)
        if step.splices:
            with self.ranges("splice", (s.sequence for s in step.splices)):
                self._splice(step.splices)
        if not step.work:
            return torch.empty(0, 0), []
        if self.static is not None:
            with self.ranges("pack", step.work):
                packed_step = self.static.pack(step.work, drawn)
            with self.ranges.forward(step.work):
                return self.static.run(packed_step), packed_step.order
        with self.ranges("pack", step.work):
            packed = pack(step.work, self.cache.block_size, self.device, drawn)
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


def pack(work: tuple[Work, ...], block_size: int, device: torch.device, drawn: Drawn | None = None) -> PackedStep:
    """Lay a step's tokens side by side and say where each one's KV goes and what it attends to.

    Tokens that nobody knows yet are taken from ``drawn``.
    """
    decodes = sorted((w for w in work if w.count == 1), key=lambda w: w.start)  # its table may reach further
    layout = lay_out([*decodes, *(w for w in work if w.count > 1)], block_size)
    chunks, stop = [], len(decodes)
    for i in range(len(decodes), len(layout.tables)):
        start, stop = stop, stop + layout.query_lens[i]
        chunks.append(PrefillChunk(start, stop, integers(layout.tables[i]), layout.context_lens[i]))
    groups = _groups(layout.tables[: len(decodes)], layout.context_lens)
    batch = batch_on(PagedBatch(integers(layout.slots), groups, chunks, max(layout.context_lens)), device)
    token_ids = integers(layout.token_ids, device)
    if drawn is not None and layout.ahead:
        drawn.fill(token_ids, integers(layout.drawn_rows(drawn, len(token_ids)), device))
    positions, sampled = integers(layout.positions, device), integers(layout.sampled, device)
    return PackedStep(token_ids, positions, batch, sampled, layout.order)


def _groups(tables: list[list[int]], lengths: list[int]) -> list[DecodeGroup]:
    """Decoding sequences, already in order of length, cut where padding to the longest would waste too much."""
    groups = []
    start = 0
    for stop in range(1, len(tables) + 1):
        if stop == len(tables) or len(tables[stop]) > 2 * len(tables[start]) + 8:
            padded = np.full((stop - start, len(tables[stop - 1])), NULL_BLOCK, dtype=np.int64)
            for row, blocks in enumerate(tables[start:stop]):
                padded[row, : len(blocks)] = blocks
            groups.append(DecodeGroup(start, stop, torch.from_numpy(padded), integers(lengths[start:stop])))
            start = stop
    return groups

"""A step's inputs: its tokens packed into one row, where the KV of each goes and what it attends to."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from rrm_kernels.batch import Capacity, PagedBatch
from rrm_kernels.buffers import BatchBuffers, StepShape
from rrm_kernels.sharing import SharingCost, plan_sharing

from rrm_engine.device.transfer import hand_over
from rrm_engine.engine.scheduler import Work
from rrm_engine.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Drawn:
    """Tokens int64 ``[rows]`` sampled by steps in flight, on the device, and the row of each sequence."""

    tokens: torch.Tensor
    rows: dict[Sequence, int]

    def fill(self, token_ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Put ``tokens[rows[i]]`` into ``token_ids[i]`` where ``rows[i]`` is not negative; both int64 ``[n]``."""
        token_ids.copy_(torch.where(rows < 0, token_ids, self.tokens[rows.clamp(min=0)]))


@dataclass(slots=True)
class Layout:
    """The packed work items of a step. Item i has ``query_lens[i]`` tokens, the last ones of its context."""

    token_ids: list[int] = field(default_factory=list)
    ahead: list[tuple[int, Sequence]] = field(default_factory=list)  # rows whose token the host does not know yet
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)  # rows whose logits are needed
    order: list[Work] = field(default_factory=list)  # the work items that sample, in the order of ``sampled``
    query_lens: list[int] = field(default_factory=list)
    context_lens: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)

    def drawn_rows(self, drawn: Drawn | None, count: int) -> list[int]:
        """For each of the first ``count`` rows the row of its token in ``drawn``, -1 where the token is known."""
        rows = [-1] * count
        for row, sequence in self.ahead:
            assert drawn is not None
            rows[row] = drawn.rows[sequence]
        return rows


def lay_out(work: Iterable[Work], block_size: int) -> Layout:
    """The layout of work items: decodes first, shortest context first, then prefill chunks."""
    layout = Layout()
    token_ids, slots = layout.token_ids, layout.slots
    for item in sorted(work, key=lambda item: (item.count > 1, item.start if item.count == 1 else 0)):
        sequence, start, count = item.sequence, item.start, item.count
        stop, blocks = start + count, sequence.table.blocks
        if item.drafted is not None:
            token_ids.append(item.drafted)
        elif item.ahead and sequence.probe.forced:
            token_ids.append(sequence.probe.forced[0])
        elif item.ahead:
            layout.ahead.append((len(token_ids), sequence))
            token_ids.append(0)
        else:
            token_ids += sequence.tokens[start:stop]
        if count == 1:
            slots.append(blocks[start // block_size] * block_size + start % block_size)
        else:
            slots += sequence.table.slots(start, stop)
        layout.positions += range(start, stop)
        layout.query_lens.append(count)
        layout.context_lens.append(stop)
        layout.tables.append(blocks[: -(-stop // block_size)])
        if item.samples:
            layout.sampled.append(len(token_ids) - 1)
            layout.order.append(item)
    return layout


@dataclass(slots=True)
class PackedStep:
    """A step's inputs on one device. ``sampled`` are the rows whose logits are needed."""

    token_ids: torch.Tensor  # int64 [tokens]
    positions: torch.Tensor  # int64 [tokens]
    sampled: torch.Tensor  # int64 [rows]
    batch: PagedBatch
    order: list[Work]  # the work items that sample, in the order of ``sampled``


class StepBuffers:
    """Buffers for steps of at most some capacity, reused from step to step; each step is uploaded in one transfer."""

    def __init__(self, capacity: Capacity, block_size: int, device: torch.device) -> None:
        rows = ("token_ids", "positions", "drawn")
        of_rows = dict.fromkeys(rows, ((capacity.tokens,), torch.int64))
        self.batch = BatchBuffers(capacity, block_size, device, of_rows | {"sampled": ((capacity.seqs,), torch.int64)})
        self.staging = self.batch.staging
        self.uploaded = 0  # bytes of the last step

    def fill(self, layout: Layout, drawn: Drawn | None = None, sharing: SharingCost | None = None) -> StepShape:
        """Write a step and send it to the device, where tokens that the host does not know yet are taken from
        ``drawn``.

        If ``sharing`` finds more shared runs than the buffers have room for, none is used.
        """
        host, there, live = self.staging.host, self.staging.device, len(layout.token_ids)
        self.staging.begin()
        shape = self._shape(layout, sharing)
        self.batch.write(shape, layout.slots)
        for name, values in (
            ("token_ids", layout.token_ids),
            ("positions", layout.positions),
            ("sampled", layout.sampled),
        ):
            host[name][: len(values)] = values
            host[name][len(values) :] = 0
        if layout.ahead:
            host["drawn"][:live] = layout.drawn_rows(drawn, live)
        self.uploaded = self.batch.upload(shape)
        if drawn is not None and layout.ahead:
            drawn.fill(there["token_ids"][:live], there["drawn"][:live])
        return shape

    def step(
        self, layout: Layout, device: torch.device, launches: Capacity, rows: int, sampled: int, longest: int
    ) -> PackedStep:
        """What ``fill`` wrote, on ``device``, cut to ``rows`` tokens and ``sampled`` rows; kernels are launched for the
        size ``launches`` and for contexts of at most ``longest`` tokens.
        """
        staging = self.staging.on(device, hand_over)
        there, lens = staging.device, (layout.query_lens, layout.context_lens)
        batch = PagedBatch.over(staging, launches, self.batch.block_size, *lens, rows=rows, longest=longest)
        token_ids, positions = there["token_ids"][:rows], there["positions"][:rows]
        return PackedStep(token_ids, positions, there["sampled"][:sampled], batch, layout.order)

    def _shape(self, layout: Layout, sharing: SharingCost | None) -> StepShape:
        tables, size = layout.tables, self.batch.block_size
        lens = layout.query_lens, layout.context_lens
        host = self.batch.write_tables(tables)
        if sharing is not None:
            rows = [host[i, : len(table)] for i, table in enumerate(tables)]
            shape = StepShape(*lens, rows, size, plan_sharing(*lens, rows, size, sharing))
            if self.batch.capacity.holds(shape.size()):
                return shape
        return StepShape(*lens, tables, size)


def pack(work: Iterable[Work], block_size: int, device: torch.device, drawn: Drawn | None = None) -> PackedStep:
    """A step in buffers of its own, exactly as large as it needs."""
    layout = lay_out(work, block_size)
    size = StepShape(layout.query_lens, layout.context_lens, layout.tables, block_size).size()
    buffers = StepBuffers(size, block_size, device)
    buffers.fill(layout, drawn)
    return buffers.step(layout, device, size, size.tokens, len(layout.sampled), max(layout.context_lens))

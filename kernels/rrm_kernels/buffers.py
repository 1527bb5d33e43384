"""Buffers of fixed capacity in which one step after another is described, and brought to the device in one transfer."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from rrm_kernels.batch import Capacity, PagedBatch
from rrm_kernels.sharing import SharingPlan, Tables
from rrm_kernels.staging import Arrays, Staging

PIECE = 1024  # tokens of a shared run that one program reads; a longer run is cut, so that it fills the device
PADDING_SLOT = -1  # stores nothing


class StepShape:
    """A step's sequences and shared runs, these cut into pieces, as the buffers describe them."""

    def __init__(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        tables: Tables,
        block_size: int,
        sharing: SharingPlan | None = None,
    ) -> None:
        self.query_lens = query_lens
        self.context_lens = context_lens
        self.blocks = max((len(t) for t in tables), default=0)
        self.starts = [0, *accumulate(query_lens)]
        self.first_keys = [n * block_size for n in sharing.private_from] if sharing else [0] * len(tables)
        self.pieces: list[tuple[int, ...]] = []
        self.members: list[int] = []
        covering = [0] * len(tables)  # pieces that cover a sequence so far
        for run in sharing.runs if sharing else ():
            first_member, owner = len(self.members), run.members[0]
            for member in run.members:
                self.members += range(self.starts[member], self.starts[member + 1])
            count = len(self.members) - first_member
            stop = run.stop * block_size
            for key in range(run.first * block_size, stop, PIECE):
                # The same number for all members: they are in the same runs before this one.
                self.pieces.append((first_member, count, owner, key, min(key + PIECE, stop), covering[owner]))
                for member in run.members:
                    covering[member] += 1
        self.partials = max(covering, default=0)

    def size(self) -> Capacity:
        """What exactly this step takes."""
        return Capacity(
            seqs=len(self.query_lens),
            tokens=self.starts[-1],
            queries=max(self.query_lens, default=0),
            blocks=self.blocks,
            pieces=len(self.pieces),
            members=len(self.members),
            run_members=max((piece[1] for piece in self.pieces), default=0),
            partials=self.partials,
        )


class BatchBuffers:
    """Where batches within a capacity lie, one after the other. ``before`` are a step's other arrays."""

    def __init__(self, capacity: Capacity, block_size: int, device: torch.device, before: Arrays | None = None) -> None:
        self.capacity = capacity
        self.block_size = block_size
        self.staging = Staging({**(before or {}), **capacity.arrays()}, device)
        self._rows: list[list[int]] = []  # what stands in the host's block table

    def update(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        tables: Tables,
        sharing: SharingPlan | None = None,
    ) -> PagedBatch:
        """Describe the next step, whose tokens are stored nowhere. Raises ValueError if it exceeds the capacity."""
        shape = StepShape(query_lens, context_lens, tables, self.block_size, sharing)
        for name, wanted in asdict(shape.size()).items():
            if wanted > (most := getattr(self.capacity, name)):
                raise ValueError(f"this step has {wanted} {name}, the buffers were made for {most}")
        self.staging.begin()
        self.write_tables(tables)
        self.write(shape)
        self.upload(shape)
        longest = max(context_lens, default=0)
        rows = self.capacity.tokens
        lens = query_lens, context_lens
        return PagedBatch.over(self.staging, self.capacity, self.block_size, *lens, rows=rows, longest=longest)

    def write_tables(self, tables: Tables) -> npt.NDArray[np.integer]:
        """Write the block tables on the host, of each only what was not there in the step before; the null block after
        each.
        """
        host = self.staging.host["block_table"]
        for i, table in enumerate(tables):
            row = self._rows[i] if i < len(self._rows) else []
            known = len(row)
            if not isinstance(table, list):
                table, known = [int(block) for block in table], 0
            elif table[:known] != row:
                known = 0
            if known < len(table):
                host[i, known : len(table)] = table[known:]
            host[i, len(table) : len(row)] = 0
            if i == len(self._rows):
                self._rows.append([])
            if known < len(table) or known < len(row):
                self._rows[i] = list(table)
        return host

    def write(self, shape: StepShape, slots: Sequence[int] = ()) -> None:
        """Write everything but the block tables on the host."""
        host, seqs = self.staging.host, len(shape.query_lens)
        starts = host["query_start"], host["context_start"]
        for array, sums in zip(starts, (shape.starts, [0, *accumulate(shape.context_lens)]), strict=True):
            array[: seqs + 1] = sums
            array[seqs + 1 :] = sums[-1]
        host["context_len"][:seqs] = shape.context_lens
        host["context_len"][seqs:] = 0
        host["first_key"][:seqs] = shape.first_keys
        host["slots"][: len(slots)] = slots
        host["slots"][len(slots) :] = PADDING_SLOT
        if shape.pieces:
            host["pieces"][: len(shape.pieces)] = shape.pieces
            host["members"][: len(shape.members)] = shape.members
        host["num_pieces"][0] = len(shape.pieces)
        host["num_seqs"][0] = seqs

    def upload(self, shape: StepShape) -> int:
        """Send what was written to the device, block tables as far as they are live. Returns the bytes."""
        return self.staging.upload("block_table", len(shape.query_lens))


def batch_of(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    tables: Tables,
    block_size: int,
    device: torch.device,
    sharing: SharingPlan | None = None,
) -> PagedBatch:
    """One step, in buffers of the size that it takes; its tokens are stored nowhere."""
    capacity = StepShape(query_lens, context_lens, tables, block_size, sharing).size()
    return BatchBuffers(capacity, block_size, device).update(query_lens, context_lens, tables, sharing)

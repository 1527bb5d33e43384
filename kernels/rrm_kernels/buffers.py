"""Buffers of fixed capacity, filled anew for each step and uploaded to the device in one transfer."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from rrm_kernels.batch import Capacity, PagedBatch
from rrm_kernels.sharing import SharingPlan, Tables
from rrm_kernels.staging import Arrays, Staging

PIECE = 1024  # tokens of a shared run that one program reads; longer runs are cut, to keep the whole device busy
PADDING_SLOT = -1  # kernels store nothing for it


class StepShape:
    """A step's sequences and its shared runs, cut into pieces, in the form that the buffers hold."""

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
        covering = [0] * len(tables)  # how many pieces each sequence attends to so far
        for run in sharing.runs if sharing else ():
            first_member, owner = len(self.members), run.members[0]
            for member in run.members:
                self.members += range(self.starts[member], self.starts[member + 1])
            count = len(self.members) - first_member
            stop = run.stop * block_size
            for key in range(run.first * block_size, stop, PIECE):
                # Equal for all members, because they are members of the same earlier runs.
                self.pieces.append((first_member, count, owner, key, min(key + PIECE, stop), covering[owner]))
                for member in run.members:
                    covering[member] += 1
        self.partials = max(covering, default=0)

    def size(self) -> Capacity:
        """The smallest capacity that holds this step."""
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
    """Buffers for batches within a capacity, reused from step to step. ``before`` are further arrays of a step."""

    def __init__(self, capacity: Capacity, block_size: int, device: torch.device, before: Arrays | None = None) -> None:
        self.capacity = capacity
        self.block_size = block_size
        self.staging = Staging({**(before or {}), **capacity.arrays()}, device)
        self._rows: list[list[int]] = []  # content of the host's block table

    def update(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        tables: Tables,
        sharing: SharingPlan | None = None,
    ) -> PagedBatch:
        """Write and upload a step without slots: its tokens' KV is not stored. Raises ValueError if it exceeds the
        capacity.
        """
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
        """Write the block tables to the host's array, of each only what differs from the step before. After a table's
        end the null block is written.
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
        """Write everything but the block tables to the host's arrays."""
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
        """Upload what was written, of the block tables only the live rows. Returns the number of bytes."""
        return self.staging.upload("block_table", len(shape.query_lens))


def batch_of(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    tables: Tables,
    block_size: int,
    device: torch.device,
    sharing: SharingPlan | None = None,
) -> PagedBatch:
    """A batch for one step without slots, in buffers exactly as large as it needs."""
    capacity = StepShape(query_lens, context_lens, tables, block_size, sharing).size()
    return BatchBuffers(capacity, block_size, device).update(query_lens, context_lens, tables, sharing)

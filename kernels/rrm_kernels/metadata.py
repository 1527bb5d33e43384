"""What the ragged kernels need to know of a step, in device buffers of fixed capacity."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import torch

from rrm_kernels.sharing import SharingPlan

PIECE = 1024  # tokens of a shared run that one program reads; a longer run is cut, so that it fills the device

Tables = Sequence[Sequence[int] | npt.NDArray[np.integer]]


@dataclass(frozen=True, slots=True)
class Capacity:
    """The most a step may hold. Launch grids are sized by it, so a launch can be captured once and replayed."""

    seqs: int
    tokens: int
    queries: int  # query tokens of one sequence
    blocks: int  # of one sequence
    pieces: int = 0  # of shared runs
    members: int = 0  # query tokens of all shared runs together
    run_members: int = 0  # query tokens of one shared run
    partials: int = 0  # pieces that cover one query token


@dataclass(slots=True)
class RaggedMetadata:
    """Sequence i has the packed query tokens ``query_start[i]`` to ``query_start[i + 1]``, the last of its context.

    All int32 on the device: ``num_seqs`` ``[1]``, ``query_start`` ``[seqs + 1]``, ``context_len`` ``[seqs]`` (its query
    tokens included), ``first_key`` ``[seqs]`` (keys before it are in shared runs), ``block_table`` ``[seqs, blocks]``.
    ``pieces`` ``[pieces, 6]`` of shared runs: first member, members, sequence whose table to read, first key, stop
    key, partial result to write. ``members`` ``[members]`` are packed query tokens. ``num_pieces`` ``[1]``.
    """

    capacity: Capacity
    block_size: int
    num_seqs: torch.Tensor
    query_start: torch.Tensor
    context_len: torch.Tensor
    first_key: torch.Tensor
    block_table: torch.Tensor
    num_pieces: torch.Tensor
    pieces: torch.Tensor
    members: torch.Tensor

    @classmethod
    def empty(cls, capacity: Capacity, block_size: int, device: torch.device) -> "RaggedMetadata":
        """Buffers for any step within ``capacity``."""
        c = capacity
        shapes = [(1,), (c.seqs + 1,), (c.seqs,), (c.seqs,), (c.seqs, c.blocks), (1,), (c.pieces, 6), (c.members,)]
        return cls(capacity, block_size, *(torch.zeros(s, dtype=torch.int32, device=device) for s in shapes))

    @classmethod
    def of(
        cls,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        tables: Tables,
        block_size: int,
        device: torch.device,
        sharing: SharingPlan | None = None,
    ) -> "RaggedMetadata":
        """Buffers of the size that this one step takes, filled."""
        capacity = _Step(query_lens, tables, block_size, sharing).size()
        metadata = cls.empty(capacity, block_size, device)
        metadata.update_from(query_lens, context_lens, tables, sharing)
        return metadata

    def update_from(
        self,
        query_lens: Sequence[int],
        context_lens: Sequence[int],
        tables: Tables,
        sharing: SharingPlan | None = None,
    ) -> None:
        """Describe the next step; uploads only what is live. Raises ValueError if it exceeds the capacity."""
        step = _Step(query_lens, tables, self.block_size, sharing)
        for name, wanted in asdict(step.size()).items():
            if wanted > (most := getattr(self.capacity, name)):
                raise ValueError(f"this step has {wanted} {name}, the buffers were made for {most}")
        _upload(self.query_start, step.starts)
        _upload(self.context_len, np.asarray(context_lens))
        _upload(self.first_key, np.asarray(step.first_keys))
        _upload(self.block_table[:, : step.tables.shape[1]], step.tables)
        _upload(self.pieces, np.asarray(step.pieces).reshape(-1, 6))
        _upload(self.members, np.asarray(step.members))
        self.num_pieces.fill_(len(step.pieces))
        self.num_seqs.fill_(len(step.tables))


class _Step:
    """A step's buffers on the host, with shared runs cut into pieces."""

    def __init__(self, query_lens: Sequence[int], tables: Tables, block_size: int, sharing: SharingPlan | None) -> None:
        self.query_lens = query_lens
        self.starts = np.cumsum([0, *query_lens])
        self.tables = np.zeros((len(tables), max((len(t) for t in tables), default=0)), dtype=np.int32)
        for row, table in zip(self.tables, tables, strict=True):
            row[: len(table)] = table
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
        return Capacity(
            seqs=len(self.tables),
            tokens=int(self.starts[-1]),
            queries=max(self.query_lens, default=0),
            blocks=self.tables.shape[1],
            pieces=len(self.pieces),
            members=len(self.members),
            run_members=max((piece[1] for piece in self.pieces), default=0),
            partials=self.partials,
        )


def _upload(buffer: torch.Tensor, values: npt.NDArray[np.integer]) -> None:
    """Overwrite the leading rows of ``buffer``."""
    if values.size:
        buffer[: len(values)].copy_(torch.from_numpy(values.astype(np.int32, copy=False)))

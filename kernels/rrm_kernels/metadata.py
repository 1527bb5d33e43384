"""What the ragged kernels need to know of a step, in device buffers of fixed capacity that one transfer fills."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from rrm_kernels.sharing import SharingPlan
from rrm_kernels.staging import Arrays, Staging

PIECE = 1024  # tokens of a shared run that one program reads; a longer run is cut, so that it fills the device

Table = Sequence[int] | npt.NDArray[np.integer]
Tables = Sequence[Table]
INT = torch.int32


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

    def holds(self, step: "Capacity") -> bool:
        return all(wanted <= most for wanted, most in zip(asdict(step).values(), asdict(self).values(), strict=True))


@dataclass(slots=True)
class RaggedMetadata:
    """Sequence i has the packed query tokens ``query_start[i]`` to ``query_start[i + 1]``, the last of its context.

    All int32 on the device: ``num_seqs`` ``[1]``, ``query_start`` ``[seqs + 1]``, ``context_len`` ``[seqs]`` (its query
    tokens included), ``context_start`` ``[seqs + 1]`` (their sums), ``first_key`` ``[seqs]`` (keys before it are in
    shared runs), ``block_table`` ``[seqs, blocks]``. Behind the live sequences there are empty ones: no queries, no
    context. ``pieces`` ``[pieces, 6]`` of shared runs: first member, members, sequence whose table to read, first key,
    stop key, partial result to write. ``members`` ``[members]`` are packed query tokens. ``num_pieces`` ``[1]``.
    """

    capacity: Capacity
    block_size: int
    staging: Staging
    num_seqs: torch.Tensor
    num_pieces: torch.Tensor
    query_start: torch.Tensor
    context_len: torch.Tensor
    context_start: torch.Tensor
    first_key: torch.Tensor
    pieces: torch.Tensor
    members: torch.Tensor
    block_table: torch.Tensor
    rows: list[list[int]] = field(default_factory=list)  # what stands in the host's block table

    @staticmethod
    def arrays(capacity: Capacity) -> Arrays:
        """What ``over`` needs of a ``Staging``; the block table last, for it is uploaded as far as it is live."""
        c = capacity
        shapes = {
            "num_seqs": (1,),
            "num_pieces": (1,),
            "query_start": (c.seqs + 1,),
            "context_len": (c.seqs,),
            "context_start": (c.seqs + 1,),
            "first_key": (c.seqs,),
            "pieces": (c.pieces, 6),
            "members": (c.members,),
            "block_table": (c.seqs, c.blocks),
        }
        return {name: (shape, INT) for name, shape in shapes.items()}

    @classmethod
    def over(cls, staging: Staging, capacity: Capacity, block_size: int) -> "RaggedMetadata":
        """Metadata in a staging area that has its ``arrays`` and maybe others before them."""
        arrays = (staging.device[name] for name in cls.arrays(capacity))
        return cls(capacity, block_size, staging, *arrays)  # type: ignore[arg-type]

    @classmethod
    def empty(cls, capacity: Capacity, block_size: int, device: torch.device) -> "RaggedMetadata":
        """Buffers for any step within ``capacity``."""
        return cls.over(Staging(cls.arrays(capacity), device), capacity, block_size)

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
        capacity = StepShape(query_lens, tables, block_size, sharing).size()
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
        """Describe the next step and upload it. Raises ValueError if it exceeds the capacity."""
        step = StepShape(query_lens, tables, self.block_size, sharing)
        for name, wanted in asdict(step.size()).items():
            if wanted > (most := getattr(self.capacity, name)):
                raise ValueError(f"this step has {wanted} {name}, the buffers were made for {most}")
        self.staging.begin()
        self.fill_tables(tables)
        self.fill(step, context_lens)
        self.upload(len(tables))

    def fill_tables(self, tables: Tables) -> npt.NDArray[np.integer]:
        """Write the block tables on the host, of each only what was not there in the step before."""
        host = self.staging.host["block_table"]
        for i, table in enumerate(tables):
            row = self.rows[i] if i < len(self.rows) else []
            known = len(row)
            if not isinstance(table, list):
                table, known = [int(block) for block in table], 0
            elif table[:known] != row:
                known = 0
            if known < len(table):
                host[i, known : len(table)] = table[known:]
            if i == len(self.rows):
                self.rows.append([])
            if known < len(table) or known < len(row):
                self.rows[i] = list(table)
        return host

    def fill(self, step: "StepShape", context_lens: Sequence[int]) -> None:
        """Write everything but the block tables on the host."""
        host, seqs = self.staging.host, step.seqs
        starts = host["query_start"], host["context_start"]
        for array, sums in zip(starts, (step.starts, np.cumsum([0, *context_lens])), strict=True):
            array[: seqs + 1] = sums
            array[seqs + 1 :] = sums[-1]
        host["context_len"][:seqs] = context_lens
        host["context_len"][seqs:] = 0
        host["first_key"][:seqs] = step.first_keys
        if step.pieces:
            host["pieces"][: len(step.pieces)] = step.pieces
            host["members"][: len(step.members)] = step.members
        host["num_pieces"][0] = len(step.pieces)
        host["num_seqs"][0] = seqs

    def upload(self, seqs: int) -> int:
        """Send what was filled and the block tables of ``seqs`` sequences to the device. Returns the bytes."""
        return self.staging.upload("block_table", seqs)

    def on(self, device: torch.device, move: Callable[[torch.Tensor, torch.device], torch.Tensor]) -> "RaggedMetadata":
        """What is there now, on another device; ``move`` brings a tensor there."""
        mirror = self.staging.mirror(device)
        mirror.follow(self.staging, move)
        there = RaggedMetadata.over(mirror, self.capacity, self.block_size)
        there.rows = self.rows
        return there

    def sized(self, capacity: Capacity) -> "RaggedMetadata":
        """The same buffers for launches of another size, within the capacity."""
        return replace(self, capacity=capacity)


class StepShape:
    """A step's sequences and shared runs, these cut into pieces, as the buffers describe them."""

    def __init__(self, query_lens: Sequence[int], tables: Tables, block_size: int, sharing: SharingPlan | None) -> None:
        self.query_lens = query_lens
        self.seqs = len(tables)
        self.blocks = max((len(t) for t in tables), default=0)
        self.starts = np.cumsum([0, *query_lens])
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
            seqs=self.seqs,
            tokens=int(self.starts[-1]),
            queries=max(self.query_lens, default=0),
            blocks=self.blocks,
            pieces=len(self.pieces),
            members=len(self.members),
            run_members=max((piece[1] for piece in self.pieces), default=0),
            partials=self.partials,
        )

"""Steps in static buffers: one upload each, and a whole forward replayed as a CUDA graph where it is small.

A small step's forward is hundreds of launches that take the host longer than the device. Captured once for a number
of tokens, they are replayed at once for every step that fits into it, decodes and mixed steps alike: what is left over
is padding, which stores nothing and belongs to no sequence. Without CUDA the same function is called on the same
buffers; steps too large to gain anything are not padded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rrm_kernels.metadata import Capacity, RaggedMetadata, StepShape
from rrm_kernels.reference import PagedAttention, PagedBatch
from rrm_kernels.sharing import SharingCost, SharingPlan
from rrm_kernels.staging import Staging
from rrm_kernels.triton_attention import plan_sharing

from rrm_engine.device.transfer import hand_over
from rrm_engine.engine.cuda_graphs import Calls, CudaGraphs, Inputs, Key, Share
from rrm_engine.engine.packing import Drawn, Layout, lay_out
from rrm_engine.engine.scheduler import Work
from rrm_engine.kv.cache import KVCache
from rrm_engine.models.attention import Forward, PagedForward
from rrm_engine.models.lean import LeanForward, Stage

# Padded numbers of tokens: no step wastes more than a third of its rows, large ones less.
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
PADDING_SLOT = -1  # stores nothing
MIXED_SEQUENCES = 64  # a mixed step is padded to this many sequences, or to a power of two above
MAX_PIECES, MAX_PARTIALS = 256, 64  # of shared runs; a step with more of them shares nothing
LONG = torch.int64


@dataclass(slots=True)
class Buffers:
    """Static buffers of one size: token ids, positions, slots, sampled and drawn rows (int64), and the metadata.

    ``mirrors`` are those of other devices that run a share of the forward.
    """

    staging: Staging
    metadata: RaggedMetadata
    mirrors: "dict[torch.device, Buffers]" = field(default_factory=dict)

    @classmethod
    def make(cls, tokens: int, seqs: int, blocks: int, block_size: int, device: torch.device) -> "Buffers":
        capacity = Capacity(seqs, tokens, tokens, blocks, MAX_PIECES, 4 * tokens, tokens, MAX_PARTIALS)
        of_rows = dict.fromkeys(("token_ids", "positions", "slots", "drawn"), ((tokens,), LONG))
        own = of_rows | {"sampled": ((seqs,), LONG)}
        staging = Staging({**own, **RaggedMetadata.arrays(capacity)}, device)
        return cls(staging, RaggedMetadata.over(staging, capacity, block_size))

    def on(self, device: torch.device) -> "Buffers":
        """These, or their mirror on another device with what is in them now."""
        if device == self.staging.place:
            return self
        if device not in self.mirrors:
            mirror = self.staging.mirror(device)
            metadata = RaggedMetadata.over(mirror, self.metadata.capacity, self.metadata.block_size)
            self.mirrors[device] = Buffers(mirror, metadata)
        mirrored = self.mirrors[device]
        mirrored.staging.follow(self.staging, hand_over)
        return mirrored

    def inputs(self, rows: int, sampled: int, longest: int, launches: Capacity) -> Inputs:
        """The first ``rows`` and ``sampled`` rows, for launches of that size."""
        there = self.staging.device
        batch = PagedBatch(there["slots"][:rows], [], [], longest, self.metadata.sized(launches))
        return Inputs(there["token_ids"][:rows], there["positions"][:rows], there["sampled"][:sampled], batch)


@dataclass(slots=True)
class StaticStep:
    """A step in the buffers of each share's device, padded to ``key`` if it has one."""

    inputs: list[Inputs]
    order: list[Work]
    longest: int  # context in it, or that its buffers can hold
    key: Key | None
    uploaded: int  # bytes


@dataclass
class StaticSteps:
    """Packs and runs a runner's steps. ``pad`` rounds small ones up to a ``Key`` and replays them by it.

    Logits are valid until the next step.
    """

    shares: list[Share]
    reserve: Callable[[int], Any]  # makes the forward ready for contexts of that many tokens
    sharing: SharingCost | None
    block_size: int
    pad: bool
    _buffers: dict[tuple[int, int, int], Buffers] = field(default_factory=dict)

    def pack(self, work: tuple[Work, ...], drawn: Drawn | None = None) -> StaticStep:
        """Write a step into its buffers and send it to the device, in one transfer.

        Tokens that nobody knows yet are taken from ``drawn``, on the device.
        """
        layout = lay_out(sorted(work, key=lambda item: item.count > 1), self.block_size)
        tokens, seqs, blocks = self._size(layout)
        padded = self.pad and tokens is not None
        live, live_seqs = len(layout.token_ids), len(layout.tables)
        rows = tokens if tokens is not None else _power_of_two(live, 1024)
        buffers = self._buffer(rows, seqs, blocks)
        metadata, host, device = buffers.metadata, buffers.staging.host, buffers.staging.device
        buffers.staging.begin()
        tables = metadata.fill_tables(layout.tables)
        step = self._shape(layout, [tables[i, : len(t)] for i, t in enumerate(layout.tables)], metadata.capacity)
        metadata.fill(step, layout.context_lens)
        sampled = len(layout.sampled)
        for name, values, rest in (
            ("token_ids", layout.token_ids, 0),
            ("positions", layout.positions, 0),
            ("slots", layout.slots, PADDING_SLOT),
            ("sampled", layout.sampled, 0),
            ("drawn", layout.drawn_rows(drawn, live), -1),
        ):
            host[name][: len(values)] = values
            host[name][len(values) :] = rest
        uploaded = metadata.upload(live_seqs)
        if drawn is not None and layout.ahead:
            drawn.fill(device["token_ids"][:live], device["drawn"][:live])
        key, launches, longest = None, step.size(), max(layout.context_lens)
        if padded:
            key = _key(rows, seqs, blocks, launches)
            launches, live, sampled, longest = _launches(key), rows, seqs, blocks * self.block_size
        inputs = [buffers.on(share.device).inputs(live, sampled, longest, launches) for share in self.shares]
        return StaticStep(inputs, layout.order, longest, key, uploaded)

    def run(self, step: StaticStep) -> torch.Tensor:
        """The logits ``[rows, vocabulary]`` of the rows that sample."""
        self.reserve(step.longest)
        out = None
        for share, inputs in zip(self.shares, step.inputs, strict=True):
            out = share.run(inputs, out, step.key)
        assert out is not None
        return out[: len(step.order)]

    def _size(self, layout: Layout) -> tuple[int | None, int, int]:
        """Rows (None: more than are padded), sequences and blocks of the buffers that a step goes into."""
        live, seqs = len(layout.token_ids), len(layout.tables)
        tokens = next((size for size in SIZES if size >= live), None)
        longest = max(len(table) for table in layout.tables)
        if tokens is not None and live == seqs:
            return tokens, tokens, _width(longest)
        room = _power_of_two(seqs, MIXED_SEQUENCES)
        return tokens, room if tokens is None else min(room, tokens), _width(longest)

    def _buffer(self, tokens: int, seqs: int, blocks: int) -> Buffers:
        size = tokens, seqs, blocks
        if size not in self._buffers:
            self._buffers[size] = Buffers.make(*size, self.block_size, self.shares[0].device)
        return self._buffers[size]

    def _shape(self, layout: Layout, tables: Any, most: Capacity) -> StepShape:
        """The step with its shared runs, or without them where they are more than the buffers hold."""
        size = self.block_size
        plan: SharingPlan | None = plan_sharing(layout.query_lens, layout.context_lens, tables, size, self.sharing)
        step = StepShape(layout.query_lens, tables, size, plan)
        return step if most.holds(step.size()) else StepShape(layout.query_lens, tables, size, None)


def static_steps(
    forward: Forward, attend: PagedAttention, cache: KVCache, device: torch.device, eager: bool = False
) -> StaticSteps | None:
    """How a runner packs its steps, or None where its attention takes groups and chunks.

    Steps are padded, and on CUDA captured, unless ``eager`` is set or the forward or the attention cannot do it.
    """
    if not getattr(attend, "ragged", False):
        return None
    pads = getattr(forward, "skips_padding", False) and getattr(attend, "capturable", False)

    def whole(inputs: Inputs, _: torch.Tensor | None) -> torch.Tensor:
        paged = PagedForward(cache, inputs.batch, attend)
        return forward(inputs.token_ids, inputs.positions, inputs.sampled, paged)

    def staged(stage: Stage, inputs: Inputs, hidden: torch.Tensor | None) -> torch.Tensor:
        paged = PagedForward(cache, inputs.batch, attend)
        return stage(inputs.token_ids, inputs.positions, inputs.sampled, hidden, paged)

    def nothing(*_: Any) -> None:
        pass

    def recorder(device: torch.device) -> Calls | CudaGraphs:
        return CudaGraphs() if device.type == "cuda" else Calls()

    if isinstance(forward, LeanForward):
        shares = [
            Share(stage.device, partial(staged, stage), partial(getattr, stage, "tables"), recorder(stage.device))
            for stage in forward.stages
        ]
        reserve: Callable[[int], Any] = forward.reserve
    else:
        shares = [Share(device, whole, nothing, recorder(device))]
        reserve = nothing
    return StaticSteps(shares, reserve, getattr(attend, "sharing", None), cache.block_size, pads and not eager)


def _key(tokens: int, seqs: int, blocks: int, step: Capacity) -> Key:
    pieces = _power_of_two(step.pieces, 8) if step.pieces else 0
    partials = _power_of_two(step.partials, 4) if step.partials else 0
    return Key(tokens, seqs, 1 if step.queries == 1 else tokens, blocks, pieces, partials)


def _launches(key: Key) -> Capacity:
    """The size of a padded step's launches."""
    members = 4 * key.tokens if key.pieces else 0
    shared = key.tokens if key.pieces else 0
    return Capacity(key.seqs, key.tokens, key.queries, key.blocks, key.pieces, members, shared, key.partials)


def _power_of_two(number: int, least: int) -> int:
    """The least power of two that is not below ``number`` or ``least``."""
    return max(least, 1 << (number - 1).bit_length())


def _width(blocks: int) -> int:
    """Blocks of a table, rounded up to a power of four: contexts grow, and every size is captured anew."""
    width = 16
    while width < blocks:
        width *= 4
    return width

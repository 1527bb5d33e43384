"""Steps in static buffers: one upload each, and small steps' forwards replayed as CUDA graphs.

A small step's forward is hundreds of kernel launches, which take the host longer than they take the device. Captured
once for a number of tokens, they are replayed together for every step that is not larger, with decodes, prefill chunks
or both; the rows left over are padding, which stores nothing and belongs to no sequence. Without CUDA the same function
is called on the same buffers. Steps that are too large to gain from it are not padded, nor is any step of a forward
that does not support padding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rrm_kernels.batch import Capacity, PagedAttention
from rrm_kernels.sharing import SharingCost

from rrm_engine.engine.cuda_graphs import Calls, CudaGraphs, Key, Share
from rrm_engine.engine.packing import Drawn, Layout, PackedStep, StepBuffers, lay_out
from rrm_engine.engine.scheduler import Work
from rrm_engine.kv.cache import KVCache
from rrm_engine.models.attention import Forward, PagedForward
from rrm_engine.models.lean import LeanForward, Stage

# Numbers of tokens that steps are padded to: at most three eighths of the rows are padding, in large steps far fewer.
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
MIXED_SEQUENCES = 64  # steps with prefill chunks are padded to this many sequences, or the next power of two
MAX_PIECES, MAX_PARTIALS = 256, 64  # room for shared runs of blocks; a step with more of them shares nothing


@dataclass(slots=True)
class StaticStep:
    """A step's inputs on each share's device, padded to ``key`` if there is one."""

    inputs: list[PackedStep]
    order: list[Work]
    longest: int  # its longest context; of a padded step, the longest that its buffers hold
    key: Key | None
    uploaded: int  # bytes


@dataclass
class StaticSteps:
    """Packs and runs a runner's steps. With ``pad`` small steps are rounded up to a ``Key``, under which their forward
    is captured and replayed. Logits are valid until the next step.
    """

    shares: list[Share]
    reserve: Callable[[int], Any]  # makes the forward ready for contexts of that many tokens
    sharing: SharingCost | None
    block_size: int
    pad: bool
    _buffers: dict[tuple[int, int, int], StepBuffers] = field(default_factory=dict)

    def pack(self, work: tuple[Work, ...], drawn: Drawn | None = None) -> StaticStep:
        """Write a step into its buffers and send it to the device, in one transfer.

        Tokens the host does not know yet are taken from ``drawn``, on the device.
        """
        layout = lay_out(work, self.block_size)
        tokens, seqs, blocks = self._size(layout)
        rows, sampled = len(layout.token_ids), len(layout.sampled)
        buffers = self._buffer(_power_of_two(rows, 1024) if tokens is None else tokens, seqs, blocks)
        launches = buffers.fill(layout, drawn, self.sharing).size()
        key, longest = None, max(layout.context_lens)
        if self.pad and tokens is not None:
            key = _key(tokens, seqs, blocks, launches)
            launches, rows, sampled, longest = _launches(key), tokens, seqs, blocks * self.block_size
        inputs = [buffers.step(layout, share.device, launches, rows, sampled, longest) for share in self.shares]
        return StaticStep(inputs, layout.order, longest, key, buffers.uploaded)

    def run(self, step: StaticStep) -> torch.Tensor:
        """The logits ``[rows, vocabulary]`` of the rows that sample."""
        self.reserve(step.longest)
        out = None
        for share, inputs in zip(self.shares, step.inputs, strict=True):
            out = share.run(inputs, out, step.key)
        assert out is not None
        return out[: len(step.order)]

    def _size(self, layout: Layout) -> tuple[int | None, int, int]:
        """Rows (None: too many to pad), sequences and blocks of the buffers that a step is written to."""
        live, seqs = len(layout.token_ids), len(layout.tables)
        tokens = next((size for size in SIZES if size >= live), None)
        longest = max(len(table) for table in layout.tables)
        if tokens is not None and live == seqs:
            return tokens, tokens, _width(longest)
        room = _power_of_two(seqs, MIXED_SEQUENCES)
        return tokens, room if tokens is None else min(room, tokens), _width(longest)

    def _buffer(self, tokens: int, seqs: int, blocks: int) -> StepBuffers:
        size = tokens, seqs, blocks
        if size not in self._buffers:
            capacity = Capacity(seqs, tokens, tokens, blocks, MAX_PIECES, 4 * tokens, tokens, MAX_PARTIALS)
            self._buffers[size] = StepBuffers(capacity, self.block_size, self.shares[0].device)
        return self._buffers[size]


def static_steps(
    forward: Forward, attend: PagedAttention, cache: KVCache, device: torch.device, eager: bool = False
) -> StaticSteps:
    """The packing and running of a runner's steps. They are padded, and on CUDA captured, unless ``eager`` is set or
    the forward or the attention does not support it.
    """

    def whole(inputs: PackedStep, _: torch.Tensor | None) -> torch.Tensor:
        paged = PagedForward(cache, inputs.batch, attend)
        return forward(inputs.token_ids, inputs.positions, inputs.sampled, paged)

    def staged(stage: Stage, inputs: PackedStep, hidden: torch.Tensor | None) -> torch.Tensor:
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
        pads = forward.skips_padding and attend.capturable
    else:
        shares = [Share(device, whole, nothing, recorder(device))]
        reserve, pads = nothing, False
    return StaticSteps(shares, reserve, attend.sharing, cache.block_size, pads and not eager)


def _key(tokens: int, seqs: int, blocks: int, step: Capacity) -> Key:
    pieces = _power_of_two(step.pieces, 8) if step.pieces else 0
    partials = _power_of_two(step.partials, 4) if step.partials else 0
    return Key(tokens, seqs, 1 if step.queries == 1 else tokens, blocks, pieces, partials)


def _launches(key: Key) -> Capacity:
    """The capacity that a padded step's kernels are launched for."""
    members = 4 * key.tokens if key.pieces else 0
    shared = key.tokens if key.pieces else 0
    return Capacity(key.seqs, key.tokens, key.queries, key.blocks, key.pieces, members, shared, key.partials)


def _power_of_two(number: int, least: int) -> int:
    """The smallest power of two that is at least ``number`` and ``least``."""
    return max(least, 1 << (number - 1).bit_length())


def _width(blocks: int) -> int:
    """Blocks of a table, rounded up to a power of four: contexts grow, and each size needs captures of its own."""
    width = 16
    while width < blocks:
        width *= 4
    return width

"""Steps in static buffers: one upload each, and a whole forward replayed as a CUDA graph where it is small.

A small step's forward is hundreds of launches that take the host longer than the device. Captured once for a number
of tokens, they are replayed at once for every step that fits into it, decodes and mixed steps alike: what is left over
is padding, which stores nothing and belongs to no sequence. Without CUDA the same function is called on the same
buffers; steps too large to gain anything are not padded.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rrm_kernels.metadata import Capacity, RaggedMetadata, StepShape
from rrm_kernels.reference import PagedAttention, PagedBatch
from rrm_kernels.sharing import SharingPlan
from rrm_kernels.staging import Staging
from rrm_kernels.triton_attention import plan_sharing

from rrm_engine.engine.layout import Drawn, Layout, lay_out
from rrm_engine.engine.scheduler import Work
from rrm_engine.kv.cache import KVCache
from rrm_engine.models.attention import Forward, PagedForward

# Padded numbers of tokens: no step wastes more than a third of its rows, large ones less.
SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
PADDING_SLOT = -1  # stores nothing
MIXED_SEQUENCES = 64  # a mixed step is padded to this many sequences, or to a power of two above
MAX_PIECES, MAX_PARTIALS = 256, 64  # of shared runs; a step with more of them shares nothing
MAX_GRAPH_BYTES = 2 << 30
LEAST_FREE_BYTES = 1 << 30  # of device memory; with less nothing is captured, for a step may need it
LONG = torch.int64


@dataclass(frozen=True, slots=True)
class Key:
    """What a graph is captured for. ``blocks``, ``pieces`` and ``partials`` are rounded up far, to be few."""

    tokens: int
    seqs: int
    queries: int  # query tokens of one sequence: 1 in a step of decodes
    blocks: int
    pieces: int
    partials: int


@dataclass(slots=True)
class Buffers:
    """Static buffers of one size: token ids, positions, slots, sampled and drawn rows (int64), and the metadata."""

    staging: Staging
    metadata: RaggedMetadata

    @classmethod
    def make(cls, tokens: int, seqs: int, blocks: int, block_size: int, device: torch.device) -> "Buffers":
        capacity = Capacity(seqs, tokens, tokens, blocks, MAX_PIECES, 4 * tokens, tokens, MAX_PARTIALS)
        of_rows = dict.fromkeys(("token_ids", "positions", "slots", "drawn"), ((tokens,), LONG))
        own = of_rows | {"sampled": ((seqs,), LONG)}
        staging = Staging({**own, **RaggedMetadata.arrays(capacity)}, device)
        return cls(staging, RaggedMetadata.over(staging, capacity, block_size))


@dataclass(slots=True)
class StaticStep:
    """A step in its buffers; the tensors are views of them, padded to ``key`` if it has one."""

    token_ids: torch.Tensor  # int64 [tokens]
    positions: torch.Tensor  # int64 [tokens]
    sampled: torch.Tensor  # int64 [rows]
    batch: PagedBatch
    order: list[Work]
    key: Key | None
    uploaded: int  # bytes


Replay = Callable[[], torch.Tensor]  # runs what was recorded, on what the buffers hold now; returns its logits


class Calls:
    """Where there are no CUDA graphs: a replay calls the function again, on the tensors it was recorded with."""

    full = False

    def has_room(self, replays: dict[Key, Replay]) -> bool:
        return True

    def record(self, call: Replay) -> Replay:
        logits: list[torch.Tensor] = []

        def replay() -> torch.Tensor:
            out = call()
            if logits:
                logits[0].copy_(out)  # in place, as a graph would
            else:
                logits.append(out)
            return logits[0]

        return replay


class CudaGraphs:
    """CUDA graphs in one memory pool, for one runs at a time.

    Where they come to hold more than ``max_bytes``, all are given up, and those still needed captured again. With too
    little memory left nothing more is captured (``full``).
    """

    def __init__(self, max_bytes: int = MAX_GRAPH_BYTES) -> None:
        self.max_bytes = max_bytes
        self.full = False
        self._bytes = 0
        self._pool: Any = None

    def has_room(self, replays: dict[Key, Replay]) -> bool:
        """Whether there is memory for one more graph; may empty ``replays`` to make some."""
        torch.cuda.synchronize()
        if self._bytes > self.max_bytes:
            replays.clear()
            self._pool, self._bytes = None, 0
        torch.cuda.empty_cache()
        self.full = self.full or torch.cuda.mem_get_info()[0] < LEAST_FREE_BYTES
        return not self.full

    def record(self, call: Replay) -> Replay:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        free = torch.cuda.mem_get_info()[0]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = call()
        self._bytes += max(0, free - torch.cuda.mem_get_info()[0])

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay


@dataclass
class StaticSteps:
    """Packs and runs a runner's steps. ``pad`` rounds small ones up to a ``Key`` and replays them by it.

    Logits are valid until the next step.
    """

    forward: Forward
    attend: PagedAttention
    cache: KVCache
    device: torch.device
    pad: bool
    recorder: Calls | CudaGraphs
    graphs: dict[Key, Replay] = field(default_factory=dict)
    captures: int = 0
    replays: int = 0
    _seen: set[Key] = field(default_factory=set)
    _buffers: dict[tuple[int, int, int], Buffers] = field(default_factory=dict)

    def pack(self, work: tuple[Work, ...], drawn: Drawn | None = None) -> StaticStep:
        """Write a step into its buffers and send it to the device, in one transfer.

        Tokens that nobody knows yet are taken from ``drawn``, on the device.
        """
        layout = lay_out(sorted(work, key=lambda item: item.count > 1), self.cache.block_size)
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
        key = None
        capacity = step.size()
        if padded:
            key = _key(rows, seqs, blocks, capacity)
            capacity = _launches(key)
            live, sampled = rows, seqs
        batch = PagedBatch(device["slots"][:live], [], [], max(layout.context_lens), metadata.sized(capacity))
        token_ids, positions = device["token_ids"][:live], device["positions"][:live]
        return StaticStep(token_ids, positions, device["sampled"][:sampled], batch, layout.order, key, uploaded)

    def run(self, step: StaticStep) -> torch.Tensor:
        """The logits ``[rows, vocabulary]`` of the rows that sample."""
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            return self._run(step)

    def _run(self, step: StaticStep) -> torch.Tensor:
        rows = len(step.order)
        if step.key is None:
            return self._call(step)[:rows]
        if (replay := self.graphs.get(step.key)) is None:
            first = step.key not in self._seen  # compiles and sets up what a capture may not
            self._seen.add(step.key)
            if first or self.recorder.full or not self.recorder.has_room(self.graphs):
                return self._call(step)[:rows]
            replay = self.graphs[step.key] = self._capture(step, step.key)
        self.replays += 1
        return replay()[:rows]

    def _call(self, step: StaticStep) -> torch.Tensor:
        paged = PagedForward(self.cache, step.batch, self.attend)
        return self.forward(step.token_ids, step.positions, step.sampled, paged)

    def _capture(self, step: StaticStep, key: Key) -> Replay:
        """Record the forward on the buffers that ``step`` lies in; it serves every step with that key."""
        step.batch.longest = key.blocks * self.cache.block_size  # what it may come to
        reserve: Callable[[int], Any] | None = getattr(self.forward, "reserve", None)
        tables = reserve(step.batch.longest) if reserve else None
        replay = self.recorder.record(partial(self._call, step))
        self.captures += 1

        def on_same_tables(_: Any = tables) -> torch.Tensor:  # the recorded launches read them: they must live on
            return replay()

        return on_same_tables

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
            self._buffers[size] = Buffers.make(*size, self.cache.block_size, self.device)
        return self._buffers[size]

    def _shape(self, layout: Layout, tables: Any, most: Capacity) -> StepShape:
        """The step with its shared runs, or without them where they are more than the buffers hold."""
        block_size = self.cache.block_size
        cost = getattr(self.attend, "sharing", None)
        plan: SharingPlan | None = plan_sharing(layout.query_lens, layout.context_lens, tables, block_size, cost)
        step = StepShape(layout.query_lens, tables, block_size, plan)
        return step if most.holds(step.size()) else StepShape(layout.query_lens, tables, block_size, None)


def static_steps(
    forward: Forward, attend: PagedAttention, cache: KVCache, device: torch.device, eager: bool = False
) -> StaticSteps | None:
    """How a runner packs its steps, or None where its attention takes groups and chunks.

    Steps are padded, and on CUDA captured, unless ``eager`` is set or the forward or the attention cannot do it.
    """
    if not getattr(attend, "ragged", False):
        return None
    pads = getattr(forward, "skips_padding", False) and getattr(attend, "capturable", False)
    recorder = CudaGraphs() if device.type == "cuda" else Calls()
    return StaticSteps(forward, attend, cache, device, pads and not eager, recorder)


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

"""Forwards captured once for a size and replayed for every step that is not larger."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from rrm_engine.device.transfer import hand_over
from rrm_engine.engine.packing import PackedStep

MAX_GRAPH_BYTES = 2 << 30
LEAST_FREE_BYTES = 1 << 30  # of device memory, which steps may need: with less of it free nothing more is captured


@dataclass(frozen=True, slots=True)
class Key:
    """What a graph is captured for. ``blocks``, ``pieces`` and ``partials`` are rounded up coarsely, so that there are
    few graphs.
    """

    tokens: int
    seqs: int
    queries: int  # query tokens of one sequence: 1 in a step of decodes
    blocks: int
    pieces: int
    partials: int


Replay = Callable[[], torch.Tensor]  # runs what was captured on the buffers' present content; returns its result


class Calls:
    """Stands in for ``CudaGraphs`` on other devices: a replay calls the function again on the same tensors."""

    full = False

    def has_room(self, replays: dict[Key, Replay]) -> bool:
        return True

    def record(self, call: Replay) -> Replay:
        result: list[torch.Tensor] = []

        def replay() -> torch.Tensor:
            out = call()
            if result:
                result[0].copy_(out)  # in place, as a graph would
            else:
                result.append(out)
            return result[0]

        return replay


class CudaGraphs:
    """CUDA graphs of the current device. They share one memory pool, because only one of them runs at a time.

    When they hold more than ``max_bytes`` all are discarded, and those still needed are captured again. Once too little
    device memory is left, nothing more is captured (``full``).
    """

    def __init__(self, max_bytes: int = MAX_GRAPH_BYTES) -> None:
        self.max_bytes = max_bytes
        self.full = False
        self._bytes = 0
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None  # torch's default belongs to the device that captured first

    def has_room(self, replays: dict[Key, Replay]) -> bool:
        """Whether there is memory for one more graph. May empty ``replays`` to make room."""
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
        self._stream = self._stream or torch.cuda.Stream()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = call()
        self._bytes += max(0, free - torch.cuda.mem_get_info()[0])

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


Call = Callable[[PackedStep, torch.Tensor | None], torch.Tensor]


@dataclass
class Share:
    """One device's share of a forward. ``call`` takes its inputs and the hidden states from the share before, which it
    may overwrite. ``constants`` returns other tensors that it reads and that may be replaced later, such as RoPE
    tables.
    """

    device: torch.device
    call: Call
    constants: Callable[[], Any]
    recorder: Calls | CudaGraphs
    graphs: dict[Key, Replay] = field(default_factory=dict)
    captures: int = 0
    replays: int = 0
    _seen: set[Key] = field(default_factory=set)
    _hidden: dict[int, torch.Tensor] = field(default_factory=dict)  # by rows: an input buffer at a fixed address

    def run(self, inputs: PackedStep, hidden: torch.Tensor | None, key: Key | None) -> torch.Tensor:
        """The result of ``call``; with a ``key`` usually by replaying it, and then valid until the next replay."""
        with self.on_device():
            if hidden is not None:
                hidden = self._bring(hidden, key)
            return self.call(inputs, hidden) if key is None else self._replayed(inputs, hidden, key)

    def on_device(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _bring(self, hidden: torch.Tensor, key: Key | None) -> torch.Tensor:
        if key is None:
            return hand_over(hidden, self.device)
        if key.tokens not in self._hidden:
            self._hidden[key.tokens] = torch.empty_like(hidden, device=self.device)
        return self._hidden[key.tokens].copy_(hand_over(hidden, self.device))

    def _replayed(self, inputs: PackedStep, hidden: torch.Tensor | None, key: Key) -> torch.Tensor:
        if (replay := self.graphs.get(key)) is None:
            first = key not in self._seen  # runs without capture, because kernels must not be compiled in one
            self._seen.add(key)
            if first or self.recorder.full or not self.recorder.has_room(self.graphs):
                return self.call(inputs, hidden)
            replay = self.graphs[key] = self._capture(inputs, hidden)
        self.replays += 1
        return replay()

    def _capture(self, inputs: PackedStep, hidden: torch.Tensor | None) -> Replay:
        """Capture the call on the buffers of ``inputs``, which every step with the same key uses."""
        constants = self.constants()
        replay = self.recorder.record(partial(self.call, inputs, hidden))
        self.captures += 1

        def on_same_constants(_: Any = constants) -> torch.Tensor:  # keeps them alive: the graph reads their memory
            return replay()

        return on_same_constants

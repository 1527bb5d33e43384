"""What emulated GPUs do in which order: memory, streams, events, copies on their way, captured graphs."""

import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


class Memory:
    """A tensor's memory on a device, and its uses: by stream the tick of its last use, and of its last write."""

    def __init__(self, machine: "Machine", stream: "Stream") -> None:
        self.machine = machine
        self.stream = stream  # that allocated it
        self.used: dict[int, int] = {}
        self.written: dict[int, int] = {}
        self.recorded = {stream.number}  # streams that giving it back waits for
        self.of_graph = False  # given back with the graph, which waits for the device

    def __del__(self) -> None:
        if self.of_graph:
            return
        done = self.machine.clock  # the host has waited for it
        used = ((s, tick) for s, tick in self.used.items() if s not in self.recorded and done[s] < tick)
        late = {s for s, tick in used if not self.stream.knows(s, tick)}
        if late:
            self.machine.errors.append(f"memory of {self.stream} is given back while {late} may still use it")


class Stream:
    numbers = itertools.count()

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.machine = Machine.current
        self.device = self.machine.device(device)
        self.number = next(self.numbers)
        self.clock: Counter[int] = Counter()
        self.time = 0.0

    def __repr__(self) -> str:
        return f"stream {self.number} of {self.device}"

    def knows(self, stream: int, tick: int) -> bool:
        return self.clock[stream] >= tick

    def wait_event(self, event: "Event") -> None:
        self.machine.not_captured(self, "waits for an event")
        _merge(self.clock, event.clock)
        self.time = max(self.time, event.time)

    def wait_stream(self, stream: "Stream") -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: "Event | None" = None) -> "Event":
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    def __init__(self, **_: Any) -> None:
        self.machine = Machine.current
        self.clock: Counter[int] = Counter()
        self.device: torch.device | None = None  # that of the first stream it is recorded on
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or self.machine.stream()
        assert self.device in (None, stream.device), f"an event of {self.device} is recorded on {stream}"
        self.device = stream.device
        self.machine.not_captured(stream, "records an event")
        self.machine.tick(stream, 0.0)
        self.clock, self.time = Counter(stream.clock), stream.time

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self.machine.stream()).wait_event(self)

    def synchronize(self) -> None:
        self.machine.host_waits(self.clock, self.time)


class Graph:
    """What was issued between the beginning and the end of a capture."""

    def __init__(self) -> None:
        self.machine = Machine.current
        self.calls: list[Callable[[], None]] = []
        self.used: dict[Memory, bool] = {}  # memory from before, and whether it is written
        self.made: list[Memory] = []
        self.kept: list[Any] = []
        self.results: list[weakref.ref[Any]] = []
        self.cost = 0.0
        self.pool: Any = None
        self.stream: Stream | None = None

    def replay(self) -> None:
        machine = self.machine
        assert self.stream is not None and self.stream.device == machine.device(None), "a graph of another device"
        stream = machine.stream()
        machine.launches += 1
        machine.begin(stream, self.used.items(), self.cost)
        for memory in self.made:
            memory.written = memory.used = {stream.number: stream.clock[stream.number]}
        with torch.inference_mode():
            for call in self.calls:
                call()
        for graph in machine.graphs:
            if graph is not self and graph.pool == self.pool:
                graph.spoil()

    def spoil(self) -> None:
        for reference in self.results:
            if (tensor := reference()) is not None:
                fill_with_rubbish(tensor.inner)


@dataclass(slots=True)
class Transfer:
    """A copy between a device and pinned memory that the host has not waited for."""

    stream: int
    tick: int
    host: torch.Tensor
    values: torch.Tensor
    to_host: bool


class Machine:
    """The devices, what the host knows of them, and what went wrong where nothing could be raised."""

    current: "Machine"

    def __init__(self, devices: int) -> None:
        Machine.current = self
        self.devices = devices
        self.now = 0  # the current device
        self.known = {torch.device("cuda", i) for i in range(devices)}
        self.clock: Counter[int] = Counter()  # what the host has waited for
        self.time = 0.0
        self.waited = 0.0  # by the host, for devices that were not done
        self.launches = 0
        self.errors: list[str] = []
        self.pending: list[Transfer] = []
        self.graphs: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.capturing: Graph | None = None
        self.capture_stream: Stream | None = None
        self.all_streams: list[Stream] = []
        self.streams = {torch.device("cuda", i): self.new_stream(i) for i in range(devices)}

    # devices and streams

    def device(self, device: Any) -> torch.device:
        if isinstance(device, torch.device) and device in self.known:
            return device
        device = torch.device("cuda", self.now) if device is None else device
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        device = torch.device("cuda", self.now) if device.index is None else device
        assert device.type == "cuda" and device.index < self.devices, device
        return device

    def new_stream(self, device: Any = None, priority: int = 0) -> Stream:
        self.all_streams.append(Stream(device, priority))
        return self.all_streams[-1]

    def stream(self, device: Any = None) -> Stream:
        return self.streams[self.device(device)]

    @contextmanager
    def on_device(self, device: Any) -> Iterator[None]:
        before, self.now = self.now, self.device(device).index
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before = self.streams[stream.device]
        with self.on_device(stream.device):
            self.streams[stream.device] = stream
            try:
                yield
            finally:
                self.streams[stream.device] = before

    def synchronize(self, device: Any = None) -> None:
        for stream in self.all_streams:
            if stream.device == self.device(device):
                stream.synchronize()

    # order

    def tick(self, stream: Stream, cost: float) -> None:
        _merge(stream.clock, self.clock)
        stream.clock[stream.number] += 1
        stream.time = max(stream.time, self.time) + cost

    def begin(self, stream: Stream, used: Iterable[tuple[Memory, bool]], cost: float = 0.0) -> None:
        """Something that uses this memory, writing it or not, is issued on a stream."""
        self.tick(stream, cost)
        for memory, writes in used:
            others = memory.used if writes else memory.written
            if late := [s for s, tick in others.items() if not stream.knows(s, tick)]:
                raise AssertionError(f"a race: {stream} and {late} use the same memory")
            memory.used[stream.number] = stream.clock[stream.number]
            if writes:
                memory.written[stream.number] = stream.clock[stream.number]

    def host_waits(self, clock: Counter[int], time: float) -> None:
        assert self.capturing is None, "the host waits for the device while a graph is captured"
        _merge(self.clock, clock)
        self.waited += max(0.0, time - self.time)
        self.time = max(self.time, time)
        arrived = [t for t in self.pending if t.tick <= self.clock[t.stream]]
        self.pending = [t for t in self.pending if t.tick > self.clock[t.stream]]
        for transfer in arrived:
            if transfer.to_host:
                with torch.inference_mode():
                    transfer.host.copy_(transfer.values)
            elif not _same(transfer.host, transfer.values):
                self.errors.append("the host has overwritten memory that a copy to the device was still reading")

    def not_captured(self, stream: Stream, what: str) -> None:
        assert self.capturing is None, f"{stream} {what} while a graph is captured"

    # capture

    @contextmanager
    def capture(self, graph: Graph, pool: Any = None, stream: Stream | None = None) -> Iterator[None]:
        self.capture_stream = self.capture_stream or self.new_stream()  # of the first device that ever captures
        stream = stream or self.capture_stream
        assert stream.device == self.device(None), "captured on a stream of another device"
        self.synchronize()
        with self.on_stream(stream):
            graph.pool, graph.stream = pool or object(), stream
            self.capturing = graph
            try:
                yield
            finally:
                self.capturing = None
        graph.spoil()  # nothing has been computed
        self.graphs.add(graph)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))  # NaN and all


def _merge(clock: Counter[int], other: Counter[int]) -> None:
    for stream, tick in other.items():
        clock[stream] = max(clock[stream], tick)


@torch.inference_mode()
def fill_with_rubbish(tensor: torch.Tensor) -> None:
    if tensor.dtype.is_floating_point:
        tensor.fill_(float("nan"))
    elif tensor.dtype is not torch.bool:
        tensor.fill_(0x5A)

"""Several CUDA devices emulated on the CPU, stricter than the real ones: real numbers, and an error for every mistake.

A tensor "on" ``cuda:N`` holds its values in host memory, and every operation on it is computed on the CPU, at once. On
top of that the rules of CUDA are kept, those that would go unnoticed on a fast machine among them:

- tensors of two devices do not mix, kernels of Triton run on the current device only;
- what is issued on a stream is ordered with what other streams do only by events and waits (vector clocks): anything
  else is a race, and so is memory that is given back while another stream may still use it;
- a copy that does not wait reads pinned memory late and writes it late: until the host has waited for it, what it
  writes is rubbish, and what it reads must not change;
- a captured graph is what was issued while it was captured, on the same memory: a replay runs no Python. While
  capturing nothing is computed and nothing may wait; a replay spoils what other graphs of the same pool left;
- fresh memory holds rubbish.

Every device has a clock that counts what is given to it (``Emulation.cost``), so that one can see what waits for what.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emulated_streams import Event, Graph, Machine, Memory, Stream, Transfer, fill_with_rubbish
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.cpp_extension import include_paths, library_paths
from triton.runtime.interpreter import InterpretedFunction

from rrm_engine.device.transfer import _copy_stream

aten = torch.ops.aten
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> guard;
static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
"""
METADATA = {aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.new_empty, aten.new_zeros}
METADATA |= {aten.new_full, aten.new_ones, aten.new_empty_strided, aten.sym_size, aten.is_pinned, aten.detach}
FRESH = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided}


class OnDevice(torch.Tensor):
    """A tensor that says it is on a CUDA device. ``inner`` has its values."""

    inner: Any  # a torch.Tensor; torch types the name as the dot product
    memory: Memory

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device, memory: Memory) -> "OnDevice":
        with torch.inference_mode(False):
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=device,
            )
        tensor.inner, tensor.memory = inner, memory
        result: OnDevice = tensor
        return result

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.inner!r}, {self.device})"

    def tolist(self) -> Any:
        Emulation.current.wait_for(self)
        return self.inner.tolist()

    def __deepcopy__(self, memo: Any) -> "OnDevice":
        copied: Any = self.clone()
        memo[id(self)] = copied
        copied._is_param = getattr(self, "_is_param", False)  # what nn.Parameter looks for
        return copied

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def record_stream(self, stream: Any) -> None:
        self.memory.recorded.add(stream.number)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} outside the emulation")


class Emulation(Machine, TorchDispatchMode):
    """While it is entered, what torch does with tensors on CUDA devices is done by a machine."""

    current: "Emulation"

    def __init__(self, devices: int) -> None:
        TorchDispatchMode.__init__(self)
        Machine.__init__(self, devices)
        self.cost: Callable[[Any, Iterable[torch.Tensor]], float] = lambda _, __: 0.0  # of an operation or a kernel
        self.transfers = 0  # between host and devices
        self.pinned: dict[int, int] = {}  # bytes, by address

    def memory(self, device: Any = None) -> tuple[int, int]:
        """Free bytes of a device, and all that it has."""
        self.device(device)
        return 8 << 30, 16 << 30

    def wait_for(self, tensor: OnDevice) -> None:
        self.begin(self.stream(tensor.device), [(tensor.memory, False)])
        self.stream(tensor.device).synchronize()

    # operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        pin = kwargs.pop("pin_memory", None)
        wanted = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.device)), None)
        tensors = _tensors((args, kwargs))
        there = [x for x in tensors if isinstance(x, OnDevice)]
        packet = func.overloadpacket
        on_cuda = wanted.type == "cuda" if wanted is not None else bool(there)
        if (on_cuda or there) and _is_made_of_others(func):
            with self:
                return func.decompose(*args, **kwargs)
        if packet is aten.copy_ and there:
            return self._copy(args[0], args[1], kwargs.get("non_blocking", args[2] if len(args) > 2 else False))
        if packet is aten._to_copy and (there or (wanted is not None and wanted.type == "cuda")):
            return self._to(func, args[0], wanted, kwargs)
        if packet is aten._local_scalar_dense and there:
            self.wait_for(args[0])
            return func(args[0].inner)
        if not on_cuda:
            assert not there or packet in METADATA, f"{func}: from {there[0].device} to {wanted}"
            out = func(*_mapped(args, _inner), **_mapped(kwargs, _inner))
            if pin:
                self.pin(out)
            return out
        assert not pin
        return self._launch(func, args, kwargs, tensors, self.device(wanted or there[0].device))

    def _launch(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], device: torch.device) -> Any:
        """An operation on one device."""
        packet = func.overloadpacket
        if packet not in METADATA:
            for tensor in tensors:
                alone = not isinstance(tensor, OnDevice) and tensor.dim() == 0 and packet is not aten.index
                assert alone or tensor.device == device, f"{func}: tensors on {device} and {tensor.device}"
        positions, names = _written(func)
        writes = {id(args[i]) for i in positions if i < len(args)}
        writes |= {id(kwargs[name]) for name in names if name in kwargs}
        inner_args, inner_kwargs = _mapped((args, kwargs), _inner)
        if "device" in inner_kwargs:
            inner_kwargs["device"] = torch.device("cpu")
        there = [t for t in tensors if isinstance(t, OnDevice)] if packet not in METADATA else []
        call = partial(func, *inner_args, **inner_kwargs)
        changed = [t for t in there if id(t) in writes]
        out = call() if func.is_view else self.issue(call, there, changed, device, self.cost(func, there))
        if changed:
            return _mapped(out, lambda _: changed[0]) if out is not None else changed[0]
        known = {t.inner.untyped_storage().data_ptr(): t.memory for t in tensors if isinstance(t, OnDevice)}
        return _mapped(out, lambda t: self.wrap(t, device, known, packet in FRESH))

    def issue(
        self, call: Callable[[], Any], tensors: list[OnDevice], changed: list[OnDevice], device: Any, cost: float
    ) -> Any:
        """Run ``call`` on the current stream of ``device``, or note it where a graph is captured there."""
        stream = self.stream(device)
        used: dict[Memory, bool] = {}
        for tensor in tensors:
            used[tensor.memory] = used.get(tensor.memory, False) or any(tensor is c for c in changed)
        graph = self.capturing
        if graph is None:
            self.launches += 1
            self.begin(stream, used.items(), cost)
            with torch.inference_mode():
                return call()
        assert graph.stream is stream, f"{stream} is not captured"
        graph.cost += cost
        for memory, writes in used.items():
            if memory not in graph.made:
                graph.used[memory] = graph.used.get(memory, False) or writes
        graph.kept += tensors
        if changed:
            graph.calls.append(lambda: (call(), None)[1])
            return None
        with torch.inference_mode():
            out = call()
        sources = {t.inner.untyped_storage().data_ptr() for t in tensors}
        fresh = _tensors(out)
        if any(t.untyped_storage().data_ptr() not in sources for t in fresh):
            graph.calls.append(partial(_again, call, fresh))
        return out

    def wrap(self, inner: torch.Tensor, device: torch.device, known: dict[int, Memory], fresh: bool) -> OnDevice:
        memory = known.get(inner.untyped_storage().data_ptr())
        if memory is None:
            stream = self.stream(device)
            memory = Memory(self, stream)
            memory.used = {stream.number: stream.clock[stream.number]}
            memory.written = dict(memory.used)
            if fresh:
                fill_with_rubbish(inner)
            if self.capturing is not None:
                memory.of_graph = True
                self.capturing.made.append(memory)
        tensor = OnDevice(inner, device, memory)
        if self.capturing is not None and memory in self.capturing.made:
            self.capturing.results.append(weakref.ref(tensor))
        return tensor

    # transfers

    def pin(self, tensor: torch.Tensor) -> None:
        self.pinned[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        weakref.finalize(tensor, self.pinned.pop, tensor.data_ptr(), None)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return any(start <= tensor.data_ptr() < start + max(1, size) for start, size in self.pinned.items())

    def pin_memory(self, tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        there = tensor.clone()
        self.pin(there)
        return there

    def _to(self, func: Any, source: torch.Tensor, wanted: torch.device | None, options: dict[str, Any]) -> Any:
        device = source.device if wanted is None else wanted
        device = self.device(device) if device.type == "cuda" else device
        dtype = options.get("dtype") or source.dtype
        if device == source.device:
            options.pop("device", None)
            return self._launch(func, (source,), options, [source], device)
        with torch.inference_mode(device.type == "cuda"):
            there = torch.empty_like(source.inner if isinstance(source, OnDevice) else source)
        target = self.wrap(there, device, {}, True) if device.type == "cuda" else there
        self._copy(target, source, options.get("non_blocking", False))
        with self:
            return target if dtype == source.dtype else target.to(dtype)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool) -> torch.Tensor:
        if target.device == source.device:
            assert isinstance(target, OnDevice) and isinstance(source, OnDevice)
            call = partial(target.inner.copy_, source.inner)
            self.issue(call, [target, source], [target], target.device, 0.0)
        elif isinstance(target, OnDevice) and isinstance(source, OnDevice):
            self._from_device_to_device(target, source)
        elif isinstance(target, OnDevice):
            self._to_device(target, source, non_blocking)
        else:
            assert isinstance(source, OnDevice)
            self._to_host(target, source, non_blocking)
        return target

    def _from_device_to_device(self, target: OnDevice, source: OnDevice) -> None:
        """On the current stream of the source; that of the target waits for it, and it for that."""
        leaving, arriving = self.stream(source.device), self.stream(target.device)
        self.not_captured(leaving, "copies to another device")
        leaving.wait_stream(arriving)
        self.begin(leaving, [(source.memory, False), (target.memory, True)])
        with torch.inference_mode():
            target.inner.copy_(source.inner)
        arriving.wait_stream(leaving)
        self.begin(arriving, [(target.memory, True)])

    def _to_device(self, target: OnDevice, source: torch.Tensor, non_blocking: bool) -> None:
        stream = self.stream(target.device)
        self.not_captured(stream, "copies from the host")
        self.transfers += 1
        self.begin(stream, [(target.memory, True)])
        values = self._on_the_host(source, stream)
        with torch.inference_mode():
            target.inner.copy_(values)
        if non_blocking and self.is_pinned(source):
            self.pending.append(Transfer(stream.number, stream.clock[stream.number], source, values, False))
        elif source.dim():
            stream.synchronize()

    def _on_the_host(self, source: torch.Tensor, stream: Stream) -> torch.Tensor:
        """What a stream finds in host memory, to which another one may have copied what the host cannot read yet."""
        for transfer in self.pending:
            if transfer.to_host and transfer.host.data_ptr() == source.data_ptr():
                assert stream.knows(transfer.stream, transfer.tick), "host memory is read while a copy writes it"
                return transfer.values
        return source.clone()

    def _to_host(self, target: torch.Tensor, source: OnDevice, non_blocking: bool) -> None:
        stream = self.stream(source.device)
        self.not_captured(stream, "copies to the host")
        self.transfers += 1
        self.begin(stream, [(source.memory, False)])
        if not (non_blocking and self.is_pinned(target)):
            stream.synchronize()
            target.copy_(source.inner)
            return
        sent = source.inner.clone()
        fill_with_rubbish(target)
        self.pending.append(Transfer(stream.number, stream.clock[stream.number], target, sent, True))

    # kernels compiled outside torch

    def kernel(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Launch on the current device; it may write whatever it is given."""
        device = torch.device("cuda", self.now)
        tensors: list[Any] = _tensors((args, kwargs))
        for tensor in tensors:
            assert tensor.device == device, f"a kernel launched on {device} is given a tensor on {tensor.device}"
        inner_args, inner_kwargs = _mapped((args, kwargs), _inner)
        cost = self.cost(run, tensors)
        return self.issue(partial(_outside, run, *inner_args, **inner_kwargs), tensors, tensors, device, cost)


def _outside(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with torch.utils._python_dispatch._disable_current_modes():
        return run(*args, **kwargs)


def _again(call: Callable[[], Any], results: list[torch.Tensor]) -> None:
    for target, value in zip(results, _tensors(call()), strict=True):
        target.copy_(value)


def _inner(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.inner if isinstance(tensor, OnDevice) else tensor


def _tensors(tree: Any) -> list[Any]:
    """The tensors in tuples, lists and dicts, in order. Torch's own walk of a tree takes as long as all else here."""
    found: list[Any] = []
    _mapped(tree, found.append)
    return found


def _mapped(tree: Any, of: Callable[[Any], Any]) -> Any:
    """The same with ``of`` each tensor in its place."""
    if isinstance(tree, torch.Tensor):
        return of(tree)
    kind = type(tree)
    if kind is tuple or kind is list:
        return kind([_mapped(value, of) for value in tree])
    if kind is dict:
        return {name: _mapped(value, of) for name, value in tree.items()}
    if isinstance(tree, tuple):  # what torch.max returns, or a named one
        return tree_map_only(torch.Tensor, of, tree)
    return tree


@cache
def _written(func: Any) -> tuple[list[int], list[str]]:
    """Which arguments an operation writes to: where they stand, and their names."""
    arguments = enumerate(func._schema.arguments)
    written = [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return [i for i, _ in written], [name for _, name in written]


@cache
def _is_made_of_others(func: Any) -> bool:
    return bool(func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd))


@cache
def _guard() -> ctypes.CDLL:
    """Tells torch's dispatcher, which may have been built without CUDA, that there is such a kind of device."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler: install g++")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        include = [f"-I{path}" for path in include_paths()]
        flags = [
            "-std=c++20",
            "-O0",
            "-fPIC",
            "-shared",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ]
        libraries = [f"-L{path}" for path in library_paths()] + ["-lc10"]
        subprocess.run(
            [compiler, *flags, *include, str(source), "-o", str(library), *libraries], check=True, timeout=300
        )
        return ctypes.CDLL(str(library))


@contextmanager
def emulated(devices: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulation]:
    """``torch.cuda`` with as many devices; what went wrong is raised at the end."""
    _guard()
    emulation = Emulation(devices)
    _copy_stream.cache_clear()
    _device_constructors()  # remembers torch.tensor as it is
    cuda = torch.cuda
    there = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: devices,
        current_device=lambda: emulation.now,
        _lazy_init=lambda: None,
        is_initialized=lambda: True,
        Stream=emulation.new_stream,
        Event=Event,
        CUDAGraph=Graph,
        current_stream=emulation.stream,
        stream=emulation.on_stream,
        device=emulation.on_device,
        graph=emulation.capture,
        graph_pool_handle=lambda: object(),
        synchronize=emulation.synchronize,
        mem_get_info=emulation.memory,
        memory_reserved=lambda device=None: 0,
        memory_allocated=lambda device=None: 0,
        empty_cache=lambda: None,
        get_device_name=lambda device=None: "emulated",
        get_device_properties=lambda device=None: SimpleNamespace(
            name="emulated", multi_processor_count=4, total_memory=16 << 30, major=9, minor=0
        ),
    )
    with monkeypatch.context() as patch:
        for name, value in vars(there).items():
            patch.setattr(cuda, name, value)
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        patch.setattr(torch, "tensor", _brought(torch.tensor))
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: emulation.pin_memory(tensor))
        patch.setattr(InterpretedFunction, "run", _triton(emulation, InterpretedFunction.run))
        with emulation:
            yield emulation
        for i in range(devices):
            emulation.synchronize(i)
    assert not emulation.errors, emulation.errors


def _brought(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``torch.tensor``, whose own way to a device is not seen by a dispatch mode."""

    def tensor(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        place = torch.empty(0).device if device is None else torch.device(device)
        if place.type != "cuda":
            return make(data, device=place, **options)
        return make(data, device="cpu", **options).to(place)

    return tensor


def _triton(emulation: Emulation, run: Callable[..., Any]) -> Callable[..., Any]:
    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        return emulation.kernel(partial(run, self), *args, **kwargs)

    return launch

"""A step's small arrays on the host and on the device: laid side by side, so that one transfer takes them all."""

import math
from collections.abc import Callable, Mapping
from copy import copy

import numpy as np
import numpy.typing as npt
import torch

ALIGNMENT = 128  # bytes; compiled kernels are specialised by the alignment of what they are given

Arrays = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Staging:
    """``host[name]`` is written, ``device[name]`` is what kernels read; ``upload`` brings the one to the other.

    Both have a fixed size and place, as CUDA graphs need it. On CUDA the host's buffer is pinned and the transfer
    runs beside what the host does next; call ``begin`` before writing again. On CPU both are one, and nothing moves.
    """

    def __init__(self, arrays: Arrays, device: torch.device) -> None:
        """``arrays``: shape and dtype by name. What is uploaded is always a leading part of them, in this order."""
        self._arrays = arrays
        self._starts: dict[str, int] = {}
        size = 0
        for name, (shape, dtype) in arrays.items():
            self._starts[name] = size
            size += -(-math.prod(shape) * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        on_cuda = device.type == "cuda"
        self._source = torch.zeros(size, dtype=torch.uint8, pin_memory=on_cuda)
        on_host = device.type == "cpu"
        self._target = self._source if on_host else torch.zeros(size, dtype=torch.uint8, device=device)
        self._sent = torch.cuda.Event() if on_cuda else None
        self.host: dict[str, npt.NDArray[np.integer]] = {n: t.numpy() for n, t in self._views(self._source).items()}
        self.device = self._views(self._target)
        self._mirrors: dict[torch.device, Staging] = {}

    def begin(self) -> None:
        """Wait until the last upload has read the host's arrays; as a rule it has, long ago."""
        if self._sent is not None:
            self._sent.synchronize()

    def upload(self, last: str, rows: int) -> int:
        """Bring all arrays before ``last`` and its first ``rows`` to the device, in one transfer. Returns its bytes."""
        array = self.host[last]
        size = self._starts[last] + rows * (array.nbytes // len(array) if len(array) else 0)
        if self._target is not self._source:
            self._target[:size].copy_(self._source[:size], non_blocking=True)
        if self._sent is not None:
            self._sent.record(torch.cuda.current_stream(self._target.device))
        return size

    @property
    def place(self) -> torch.device:
        return self._target.device

    def on(self, device: torch.device, move: Callable[[torch.Tensor, torch.device], torch.Tensor]) -> "Staging":
        """This, or its mirror on another device with what is here now; ``move`` brings a tensor there.

        A mirror keeps its place too.
        """
        if device == self.place:
            return self
        if device not in self._mirrors:
            mirror = self._mirrors[device] = copy(self)
            mirror._target = torch.zeros_like(self._target, device=device)
            mirror.device = mirror._views(mirror._target)
        self._mirrors[device].follow(self._target, move)
        return self._mirrors[device]

    def follow(self, other: torch.Tensor, move: Callable[[torch.Tensor, torch.device], torch.Tensor]) -> None:
        """Take over what another device's ``other`` holds now."""
        self._target.copy_(move(other, self.place))

    def _views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        views = {}
        for name, (shape, dtype) in self._arrays.items():
            start = self._starts[name]
            stop = start + math.prod(shape) * dtype.itemsize
            views[name] = buffer[start:stop].view(dtype).view(shape)
        return views

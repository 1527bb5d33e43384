"""A step's small arrays on host and device, contiguous in one buffer each, so that one transfer uploads them all."""

import math
from collections.abc import Callable, Mapping
from copy import copy

import numpy as np
import numpy.typing as npt
import torch

ALIGNMENT = 128  # bytes, because compiled kernels are specialised by the alignment of their arguments

Arrays = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


class Staging:
    """``host[name]`` is written to, ``device[name]`` is read by kernels; ``upload`` copies the one to the other.

    Both have a fixed size and address, as CUDA graphs require. On CUDA the host's buffer is pinned and the transfer is
    asynchronous; call ``begin`` before writing again. On CPU both are the same memory, and nothing is copied.
    """

    def __init__(self, arrays: Arrays, device: torch.device) -> None:
        """``arrays``: shape and dtype by name, in the order in which they are laid out; a leading part is uploaded."""
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
        """Wait until the last upload has read the host's arrays; usually it has long done so."""
        if self._sent is not None:
            self._sent.synchronize()

    def upload(self, last: str, rows: int) -> int:
        """Copy all arrays before ``last``, and the first ``rows`` of that, to the device. Returns their bytes."""
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
        """This on ``device``: itself, or a mirror with the present content, to which ``move`` copies a tensor.

        A mirror has a fixed address too.
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
        """Copy the present content of ``other``, a buffer on another device."""
        self._target.copy_(move(other, self.place))

    def _views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        views = {}
        for name, (shape, dtype) in self._arrays.items():
            start = self._starts[name]
            stop = start + math.prod(shape) * dtype.itemsize
            views[name] = buffer[start:stop].view(dtype).view(shape)
        return views

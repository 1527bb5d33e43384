"""Transfers between host and devices and between devices. The host waits only where it must.

A device runs its work in the order of its current stream, so a transfer that waited for the device would wait for
everything launched on it before.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch

HOST = torch.device("cpu")


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on ``device``; work launched on the device afterwards finds it there."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def integers(values: Sequence[int], device: torch.device = HOST) -> torch.Tensor:
    """``values`` as int64 on ``device``."""
    return to_device(torch.from_numpy(np.array(values, dtype=np.int64)), device)


def hand_over(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of one device on another one.

    A copy between CUDA devices synchronises the current streams of both. It therefore runs on streams of its own: else
    a pipeline stage would wait until the next stage has finished the step before. It copies a clone, so that the tensor
    may be overwritten at once.
    """
    source = tensor.device
    if source == device:
        return tensor
    if source.type != "cuda" or device.type != "cuda":
        return to_device(tensor, device) if source.type == "cpu" else tensor.to(device)
    tensor = tensor.clone()
    leaving, arriving = _copy_stream(source, device, source), _copy_stream(source, device, device)
    leaving.wait_stream(torch.cuda.current_stream(source))
    with torch.cuda.stream(leaving), torch.cuda.stream(arriving):
        there = tensor.to(device, non_blocking=True)
    torch.cuda.current_stream(device).wait_stream(arriving)
    # Keep the allocator from reusing their memory before the streams that did not allocate it are done with it.
    tensor.record_stream(leaving)
    there.record_stream(torch.cuda.current_stream(device))
    return there


@cache
def _copy_stream(source: torch.device, target: torch.device, on: torch.device) -> torch.cuda.Stream:
    """The stream for copies from ``source`` to ``target`` that belongs to ``on``, one of the two."""
    return torch.cuda.Stream(on)


def wait_for(devices: Iterable[torch.device]) -> None:
    """Wait until the devices have done all work launched on them."""
    for device in set(devices):
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class Readback:
    """A device tensor's values, whose transfer to the host begins when this is made."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self._host = tensor
        self._there: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._there = torch.cuda.Event()
            self._there.record(torch.cuda.current_stream(tensor.device))

    def on(self, device: torch.device) -> torch.Tensor:
        """The values on a device; work launched there afterwards finds them.

        Another device than the tensor's copies them from the host's copy, which does not wait for work that the
        tensor's device was given later.
        """
        if self._there is None or device == self.tensor.device:
            return self.tensor.to(device)
        torch.cuda.current_stream(device).wait_event(self._there)
        return self._host.to(device, non_blocking=True)

    def tolist(self) -> list[int]:
        """The values; waits until they have arrived, but not for later work of the device."""
        if self._there is not None:
            self._there.synchronize()
        return self._host.tolist()

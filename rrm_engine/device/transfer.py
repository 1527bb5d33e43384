"""Tensors on their way between the host and devices, and between devices; the host waits only where it must.

Each device runs what it is given in the order in which it was given (its current stream). A transfer that waited for
the device would wait for everything given to it before.
"""

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
import torch

HOST = torch.device("cpu")


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on ``device``, there when what is given to the device next runs."""
    if device.type != "cuda":
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def integers(values: Sequence[int], device: torch.device = HOST) -> torch.Tensor:
    """``values`` as int64 on ``device``."""
    return to_device(torch.from_numpy(np.array(values, dtype=np.int64)), device)


def hand_over(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of one device on another one.

    A copy makes both of the streams it is issued on wait for each other. Between two CUDA devices it therefore gets
    streams of its own: else a stage would wait until the next one has finished the step before. What is copied is a
    clone, so that the tensor may be written again at once.
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
    # Their memory is not given out again before the streams that did not allocate it are done with it.
    tensor.record_stream(leaving)
    there.record_stream(torch.cuda.current_stream(device))
    return there


@cache
def _copy_stream(source: torch.device, target: torch.device, on: torch.device) -> torch.cuda.Stream:
    """The stream on one of both devices for copies from ``source`` to ``target``."""
    return torch.cuda.Stream(on)


def wait_for(devices: Iterable[torch.device]) -> None:
    """Until they have done all that they were given."""
    for device in set(devices):
        if device.type == "cuda":
            torch.cuda.synchronize(device)


class Readback:
    """A device tensor's values, on their way to the host since this was made."""

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
        """The values on a device, there when what is given to it next runs.

        Another device takes them from the host, for those that are given work later need not be asked.
        """
        if self._there is None or device == self.tensor.device:
            return self.tensor.to(device)
        torch.cuda.current_stream(device).wait_event(self._there)
        return self._host.to(device, non_blocking=True)

    def tolist(self) -> list[int]:
        """Wait until they are there; not for what the device was given afterwards."""
        if self._there is not None:
            self._there.synchronize()
        return self._host.tolist()

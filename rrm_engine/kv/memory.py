"""How much memory there is for KV, and how to tell that there was too little."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

# What torch and the libraries under it say in a plain RuntimeError.
SIGNS = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED")


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on ``device`` now; on CPU what the system can free for it included."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory could not be had, on whatever device."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)
    return isinstance(error, MemoryError)


@contextmanager
def refuse_out_of_memory(sentence: str) -> Iterator[None]:
    """Turn an allocation that fails in the block into a ValueError that says ``sentence``."""
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(sentence) from error

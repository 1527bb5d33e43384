"""How much memory is free for KV, and recognising errors that mean that it ran out."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from rrm_engine.errors import RrmError

# Phrases by which a plain RuntimeError of torch, or of a library that it uses, means out of memory.
SIGNS = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED", "Cannot allocate memory")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")  # a line per hierarchy: number:controllers:path
# For control groups v2 and v1: the files with the limit and the usage, and the entries of memory.stat for page cache,
# which is part of the usage but freed by the kernel when needed.
VERSIONS = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)
CPU_SHARE, CUDA_SHARE = 0.3, 0.88  # for KV, of the memory that the weights leave free


def kv_room(device: torch.device, weights: int = 0) -> int:
    """Bytes that KV may take on ``device``, with ``weights`` bytes still to be loaded there."""
    share = CUDA_SHARE if device.type == "cuda" else CPU_SHARE
    return int(share * (free_memory(device) - weights))


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on ``device`` now.

    On CPU this includes what the system can reclaim, and respects the limits of the process and of its control groups
    (those of its container).
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return min([psutil.virtual_memory().available, *container_room(), *process_room()])


def process_room() -> list[int]:
    """Bytes that the limits set on this process (``ulimit -v`` and ``-d``) leave."""
    used = psutil.Process().memory_info()
    sizes = {resource.RLIMIT_AS: used.vms, resource.RLIMIT_DATA: getattr(used, "data", 0)}
    limits = {kind: resource.getrlimit(kind)[0] for kind in sizes}
    return [max(0, limits[kind] - size) for kind, size in sizes.items() if limits[kind] != resource.RLIM_INFINITY]


def container_room() -> list[int]:
    """For each memory limit on this process, by its control group or a parent of that, the bytes it leaves."""
    try:
        lines = [line.split(":", 2) for line in OWN_CGROUPS.read_text().splitlines()]
    except OSError:  # no Linux
        return []
    found = []
    for _, controllers, path in lines:
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = CGROUPS / controllers
        group = mount / path.lstrip("/")  # in a container perhaps a path of the host, which is mounted elsewhere
        for place in (group, *group.parents):
            if place.is_relative_to(mount):
                found += [room for version in VERSIONS if (room := _room(place, *version)) is not None]
    return found


def _room(group: Path, limit: str, usage: str, cache: tuple[str, ...]) -> int | None:
    """The bytes that one control group's limit leaves; None if it has no limit."""
    try:
        allowed, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if allowed == "max" else max(0, int(allowed) - used + sum(int(stat.get(name, 0)) for name in cache))


def in_units(count: float) -> str:
    """A number of bytes as text, such as ``1.5 GiB``."""
    power, name = (30, "GiB") if count >= 1 << 30 else (20, "MiB") if count >= 1 << 20 else (10, "KiB")
    return f"{count / (1 << power):,.1f} {name}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` means that host or device memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)
    return isinstance(error, MemoryError)


@contextmanager
def refuse_out_of_memory(sentence: str) -> Iterator[None]:
    """Turn an out-of-memory error in the block into an RrmError that says ``sentence``."""
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RrmError(sentence) from error

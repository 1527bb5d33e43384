"""How much memory there is for KV, and how to tell that there was too little."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from rrm_engine.errors import RrmError

# What torch and the libraries under it say in a plain RuntimeError.
SIGNS = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED", "Cannot allocate memory")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")  # a line per hierarchy: number:controllers:path
# Of the second and the first version of control groups: their limit, what is used of it, and what of that is page
# cache, which the kernel frees when it has to.
VERSIONS = (
    ("memory.max", "memory.current", ("inactive_file", "active_file")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)
CPU_SHARE, CUDA_SHARE = 0.3, 0.88  # of the memory that is free beside the weights, for KV


def kv_room(device: torch.device, weights: int = 0) -> int:
    """Bytes that KV may take on ``device``, with ``weights`` bytes still to be loaded there."""
    share = CUDA_SHARE if device.type == "cuda" else CPU_SHARE
    return int(share * (free_memory(device) - weights))


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated on ``device`` now; on CPU what the system can free for it included.

    On CPU not more than the limits of the process leave, and of its control groups, that is of its container.
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
    """Bytes that each memory limit on this process leaves: those of its control group and of the groups around it."""
    try:
        lines = [line.split(":", 2) for line in OWN_CGROUPS.read_text().splitlines()]
    except OSError:  # no Linux
        return []
    found = []
    for _, controllers, path in lines:
        if controllers and "memory" not in controllers.split(","):
            continue
        mount = CGROUPS / controllers
        group = mount / path.lstrip("/")  # inside a container that may be the host's name for what is mounted
        for place in (group, *group.parents):
            if place.is_relative_to(mount):
                found += [room for version in VERSIONS if (room := _room(place, *version)) is not None]
    return found


def _room(group: Path, limit: str, usage: str, cache: tuple[str, ...]) -> int | None:
    """What the limit of one control group leaves; None if it has none."""
    try:
        allowed, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return None if allowed == "max" else max(0, int(allowed) - used + sum(int(stat.get(name, 0)) for name in cache))


def in_units(count: float) -> str:
    """A number of bytes for people."""
    power, name = (30, "GiB") if count >= 1 << 30 else (20, "MiB") if count >= 1 << 20 else (10, "KiB")
    return f"{count / (1 << power):,.1f} {name}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory could not be had, on whatever device."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, RuntimeError):
        return isinstance(error, torch.OutOfMemoryError) or any(sign in str(error) for sign in SIGNS)
    return isinstance(error, MemoryError)


@contextmanager
def refuse_out_of_memory(sentence: str) -> Iterator[None]:
    """Turn an allocation that fails in the block into an RrmError that says ``sentence``."""
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RrmError(sentence) from error

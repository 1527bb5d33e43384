"""How much memory there is for KV: what is free, and what the container that one runs in has left of its limit."""

import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from lab import Lab

from rrm_engine.device import memory
from rrm_engine.device.memory import container_room, free_memory

CPU = torch.device("cpu")
MIB = 1 << 20
V2 = ("memory.max", "memory.current", "")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
UNLIMITED = {V2: "max", V1: "9223372036854771712"}


def group(path: Path, version: tuple[str, str, str], limit: int | str, used: int, cache: int) -> Path:
    """A control group's files as the kernel writes them; ``cache`` is what of ``used`` it could free."""
    path.mkdir(parents=True, exist_ok=True)
    limit_file, used_file, prefix = version
    (path / limit_file).write_text(f"{limit}\n")
    (path / used_file).write_text(f"{used}\n")
    stat = {"anon": used - cache, f"{prefix}inactive_file": cache - 1, f"{prefix}active_file": 1}
    (path / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in stat.items()))
    return path


class System:
    """A directory that stands for /sys/fs/cgroup, and a file for /proc/self/cgroup."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.own = tmp_path / "cgroup", tmp_path / "own"
        self.root.mkdir()
        monkeypatch.setattr(memory, "CGROUPS", self.root)
        monkeypatch.setattr(memory, "OWN_CGROUPS", self.own)

    def say(self, *lines: str) -> None:
        self.own.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    return System(tmp_path, monkeypatch)


# version, /proc/self/cgroup, and where under the mount the files lie
PLACES = {
    "version 2": (V2, ["0::/"], "."),
    "version 2, in a group": (V2, ["0::/user.slice/job"], "user.slice/job"),
    "version 2, in a group of a group with the limit": (V2, ["0::/user.slice/job"], "user.slice"),
    "version 1": (V1, ["5:cpu,cpuacct:/", "4:memory:/", "0::/"], "memory"),
    "version 1, in a group": (V1, ["4:memory:/docker/abc"], "memory/docker/abc"),
    "version 1, under the host's name": (V1, ["4:memory:/docker/abc"], "memory"),
}


@pytest.mark.parametrize("name", PLACES)
def test_what_a_container_has_left_counts_where_it_is_less(name: str, system: System) -> None:
    version, lines, place = PLACES[name]
    system.say(*lines)
    free = psutil.virtual_memory().available
    assert free_memory(CPU) > free / 2 > 8 * MIB  # no limit

    group(system.root / place, version, limit=10 * MIB, used=9 * MIB, cache=3 * MIB)
    assert free_memory(CPU) == 4 * MIB
    group(system.root / place, version, limit=10 * MIB, used=12 * MIB, cache=0)
    assert free_memory(CPU) == 0

    group(system.root / place, version, limit=UNLIMITED[version], used=9 * MIB, cache=3 * MIB)
    assert free_memory(CPU) > free / 2
    group(system.root / place, version, limit=1 << 60, used=9 * MIB, cache=3 * MIB)  # more than there is
    assert free_memory(CPU) > free / 2


def test_the_narrowest_of_the_groups_around_one_counts(system: System) -> None:
    system.say("0::/pod/container")
    group(system.root / "pod/container", V2, limit=90 * MIB, used=20 * MIB, cache=0)
    group(system.root / "pod", V2, limit=100 * MIB, used=95 * MIB, cache=0)
    group(system.root / "other", V2, limit=1, used=1, cache=0)  # not ours
    group(system.root.parent, V2, limit=1, used=1, cache=0)  # outside of the mount
    assert free_memory(CPU) == 5 * MIB
    assert sorted(container_room()) == [5 * MIB, 70 * MIB]


def test_a_system_without_control_groups(system: System) -> None:
    assert container_room() == []
    assert free_memory(CPU) > 0


def test_the_default_of_kv_blocks_fits_into_the_container(system: System, lab: Lab) -> None:
    """65 sequences of 800 tokens could use 3,250 blocks of 8 KiB; 30 % of 20 MiB hold 768."""
    system.say("0::/")
    assert lab.solver(kv_blocks=None).resolved.kv_blocks == 3250
    group(system.root, V2, limit=100 * MIB, used=80 * MIB, cache=0)
    assert lab.solver(kv_blocks=None).resolved.kv_blocks == 768
    group(system.root, V2, limit=81 * MIB, used=80 * MIB, cache=0)
    with pytest.raises(ValueError, match=r"needs 400\.0 KiB of KV and 307\.2 KiB are free for it on cpu: lower"):
        lab.solver(kv_blocks=None)
    with pytest.raises(
        ValueError, match=r"400 KV blocks take 3\.1 MiB and 1\.0 MiB are free on cpu: --kv-blocks may be 128"
    ):
        lab.solver(kv_blocks=400)


def test_here() -> None:
    """Whatever this machine is: what it says can be read."""
    assert 0 <= free_memory(CPU) <= psutil.virtual_memory().total


def test_the_limits_of_the_process_count(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    used = psutil.Process().memory_info()
    limits = {resource.RLIMIT_AS: used.vms + 50 * MIB, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limits[kind], resource.RLIM_INFINITY))
    assert 40 * MIB < free_memory(CPU) <= 60 * MIB  # other threads may allocate meanwhile
    limits[resource.RLIMIT_DATA] = used.data + 5 * MIB
    assert 0 <= free_memory(CPU) <= 15 * MIB
    limits[resource.RLIMIT_AS] = 1
    assert free_memory(CPU) == 0


@pytest.mark.slow
def test_the_default_of_kv_blocks_fits_under_ulimit() -> None:
    """Nobody gave --kv-blocks: the pool is as large as the process may get, whatever the machine has."""
    script = (
        "import psutil, resource\n"
        "from rrm_engine import RunConfig, Solver\n"
        "from rrm_engine.loading.load import load_pretrained\n"
        "import rrm_engine.backends.local\n"
        "limit = psutil.Process().memory_info().vms + (200 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "blocks = Solver.load(RunConfig()).resolved.kv_blocks\n"
        "print(blocks)\n"
        "assert 128 <= blocks < 2000, blocks\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

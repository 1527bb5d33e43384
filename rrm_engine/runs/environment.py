"""What a run ran on and with: versions, hardware, source commit."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import rrm_engine

PACKAGES = (
    "rrm-engine",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "safetensors",
    "numpy",
    "triton",
    "flash-attn",
    "llguidance",
    "math-verify",
)


def environment() -> dict[str, Any]:
    """Everything here for run.json; the GPUs only once torch is loaded."""
    return {"versions": versions(), "hardware": hardware(), "git": git_commit()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are installed, without importing them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name.replace("-", "_")] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def package_version() -> str:
    """Our own version, also when run from a checkout that is not installed."""
    return versions().get("rrm_engine", "(not installed)")


def hardware() -> dict[str, Any]:
    """The machine as far as it says."""
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
    }


def git_commit() -> dict[str, Any] | None:
    """The commit of the checkout that holds this package, and whether its files differ from it."""
    package = Path(rrm_engine.__file__).parent
    tracked = _git(package, "ls-files", "--error-unmatch", "config.py")
    commit = _git(package, "rev-parse", "HEAD")
    if not tracked or not commit:  # installed elsewhere, perhaps inside somebody else's repository
        return None
    return {"commit": commit, "dirty": bool(_git(package, "status", "--porcelain", "--", "."))}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gpus() -> list[dict[str, Any]]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1)} for p in properties]

"""Compiling the CPU kernels: C++ without dependencies, built by the machine's own compiler on first use.

That takes a few seconds. The library is kept in the user's cache directory under a name made of its sources, flags and
processor.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch

SOURCES = ("common.h", "decode.cpp", "layer.cpp", "products.cpp")
COMPILE = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
COMPILE += ["-ffp-contract=fast", "-mprefer-vector-width=512"]


class NativeUnavailable(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


@cache
def load_library() -> ctypes.CDLL:
    """The kernels, compiled if they have not been yet. Raises NativeUnavailable with the reason."""
    sources = {name: files("rrm_kernels").joinpath(name).read_text() for name in SOURCES}
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise NativeUnavailable("no C++ compiler found (install g++, or name one in CXX)")
    key = hashlib.sha256(repr((sources, COMPILE, compiler, _processor(), sys.platform)).encode()).hexdigest()[:16]
    library = _cache_folder() / f"kernels-{key}.so"
    try:
        if not library.exists():
            _compile(compiler, sources, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise NativeUnavailable(f"{compiler} could not build it: {detail[0] if detail else error}") from error


def _compile(compiler: str, sources: dict[str, str], library: Path) -> None:
    """Build beside the target and rename, so that two processes never see half a file."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        for name, text in sources.items():
            Path(folder, name).write_text(text)
        units = [str(Path(folder, name)) for name in sources if name.endswith(".cpp")]
        built = Path(folder, "kernels.so")
        # torch's own OpenMP runtime where it has one: two of them would fight over the cores.
        runtime = [str(p) for p in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))][:1]
        command = [compiler, *COMPILE, "-shared", "-o", str(built), *units, *runtime]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
        built.replace(library)


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rrm_engine"


def _processor() -> str:
    """What ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith("flags")), "") + platform.machine()

"""Compiling the CPU kernels: C++ without dependencies, built by the machine's own compiler on first use.

That takes a few seconds. The library is kept in the user's cache directory under a name made of its sources, flags and
processor. The sources are the same for every processor: their vectors are as wide as the compiler's flags allow. The
environment variable ``RRM_CPU_KERNELS`` names another variant than the one made for this processor.
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
COMPILE = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
ON_X86 = platform.machine().lower() in ("x86_64", "amd64")
WIDE = ("-mprefer-vector-width=512",) if ON_X86 else ()  # compilers stop at 256 bits otherwise
VARIANTS = {  # compiler flags
    "native": ("-march=native", *WIDE) if ON_X86 else ("-mcpu=native",),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", *WIDE),
    "avx2": ("-mavx2", "-mfma"),
    "plain": (),  # whatever every processor of the architecture has
}


class NativeUnavailable(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


def runnable_variants() -> tuple[str, ...]:
    """The names of the variants that this processor can run, ``native`` first."""
    has = set(_processor().split())
    return tuple(
        name
        for name, flags in VARIANTS.items()
        if name in ("native", "plain") or {flag[2:] for flag in flags if flag not in WIDE} <= has
    )


def load_library(variant: str | None = None) -> ctypes.CDLL:
    """The kernels, compiled if they have not been yet; ``variant``: default ``RRM_CPU_KERNELS``, else ``native``.

    Raises NativeUnavailable with the reason, ValueError for a variant that is not known or cannot run here.
    """
    variant = variant or os.environ.get("RRM_CPU_KERNELS") or "native"
    if variant not in runnable_variants():
        known = ", ".join(runnable_variants())
        raise ValueError(f"RRM_CPU_KERNELS={variant}: this processor has no such kernels; choose one of {known}")
    return _load(variant)


@cache
def _load(variant: str) -> ctypes.CDLL:
    flags = (*COMPILE, *VARIANTS[variant])
    sources = {name: files("rrm_kernels").joinpath(name).read_text() for name in SOURCES}
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise NativeUnavailable("no C++ compiler found (install g++, or name one in CXX)")
    key = hashlib.sha256(repr((sources, flags, compiler, _processor(), sys.platform)).encode()).hexdigest()[:16]
    library = _cache_folder() / f"kernels-{key}.so"
    try:
        if not library.exists():
            _compile(compiler, flags, sources, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise NativeUnavailable(f"{compiler} could not build it: {detail[0] if detail else error}") from error


def _compile(compiler: str, flags: tuple[str, ...], sources: dict[str, str], library: Path) -> None:
    """Build beside the target and rename, so that two processes never see half a file."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        for name, text in sources.items():
            Path(folder, name).write_text(text)
        units = [str(Path(folder, name)) for name in sources if name.endswith(".cpp")]
        built = Path(folder, "kernels.so")
        # torch's own OpenMP runtime where it has one: two of them would fight over the cores.
        runtime = [str(p) for p in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))][:1]
        command = [compiler, *flags, "-shared", "-o", str(built), *units, *runtime]
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

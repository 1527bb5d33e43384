"""Compiling the CPU kernels: C++ without dependencies, built by the machine's own compiler on first use.

That takes a few seconds. The library is kept in the user's cache directory, or in a temporary one if there is none,
under a hash of sources, flags and processor. The sources are the same for every processor; vectors are as wide as the
compiler's flags allow. The environment variable ``RRM_CPU_KERNELS`` selects another variant than the one for this
processor.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch

SOURCES = (
    *("common.h", "kernels.h", "attend.h", "decode.h", "multiply.h"),
    *("decode_bf16.cpp", "decode_fp32.cpp", "products.cpp"),  # first what takes longest to compile
    *("decode.cpp", "decoder.cpp", "draw.cpp", "layer.cpp"),
)
COMPILE = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
ON_X86 = platform.machine().lower() in ("x86_64", "amd64")
WIDE = ("-mprefer-vector-width=512",) if ON_X86 else ()  # without it compilers use at most 256 bits
VARIANTS = {  # compiler flags
    "native": ("-march=native", *WIDE) if ON_X86 else ("-mcpu=native",),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", *WIDE),
    "avx2": ("-mavx2", "-mfma"),
    "plain": (),  # only what every processor of the architecture has
}


class NativeUnavailable(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


def runnable_variants() -> tuple[str, ...]:
    """Names of the variants that this processor can run, ``native`` first."""
    has = set(_processor().split())
    return tuple(
        name
        for name, flags in VARIANTS.items()
        if name in ("native", "plain") or {flag[2:] for flag in flags if flag not in WIDE} <= has
    )


def load_library(variant: str | None = None) -> ctypes.CDLL:
    """The kernels, compiled on first use. ``variant`` defaults to ``RRM_CPU_KERNELS``, else ``native``.

    Raises NativeUnavailable with the reason, ValueError for a variant that is not known or cannot run here.
    """
    variant = variant or os.environ.get("RRM_CPU_KERNELS") or "native"
    if variant not in runnable_variants():
        known = ", ".join(runnable_variants())
        raise ValueError(f"RRM_CPU_KERNELS={variant}: this processor has no such kernels; choose one of {known}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise NativeUnavailable("no C++ compiler found (install g++, or name one in CXX)")
    return _load(variant, compiler)


@cache
def _load(variant: str, compiler: str) -> ctypes.CDLL:
    flags = (*COMPILE, *VARIANTS[variant])
    sources = {name: files("rrm_kernels").joinpath(name).read_text() for name in SOURCES}
    key = hashlib.sha256(repr((sources, flags, compiler, _processor(), sys.platform)).encode()).hexdigest()[:16]
    try:
        library = _place_of(f"kernels-{key}.so")
        if not library.exists():
            _compile(compiler, flags, sources, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        raise NativeUnavailable(f"{compiler} could not build it: {_complaint(error)}") from error


def _complaint(error: OSError | subprocess.SubprocessError) -> str:
    """The compiler's first error message, or the error that kept it from running."""
    lines = [line.strip() for line in (getattr(error, "stderr", None) or "").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else str(error))


def _compile(compiler: str, flags: tuple[str, ...], sources: dict[str, str], library: Path) -> None:
    """Build in another folder and rename, so that no other process sees a half-written file."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        for name, text in sources.items():
            Path(folder, name).write_text(text)
        units = [Path(folder, name) for name in sources if name.endswith(".cpp")]
        built = Path(folder, "kernels.so")

        def run(*arguments: str) -> None:
            subprocess.run([compiler, *flags, *arguments], check=True, capture_output=True, text=True, timeout=900)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda unit: run("-c", str(unit), "-o", f"{unit}.o"), units))
        # Link torch's own OpenMP runtime if it has one: two runtimes would compete for the cores.
        runtime = [str(p) for p in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))][:1]
        run("-shared", "-o", str(built), *(f"{unit}.o" for unit in units), *runtime)
        built.replace(library)


def _place_of(name: str) -> Path:
    """Path of the library ``name``, existing or writable: in the user's cache, else among temporary files."""
    for folder in _cache_folders():
        if (folder / name).exists() or _is_writable(folder):
            return folder / name
    folder = _temporary_folder()
    if not (folder / name).exists():
        logging.getLogger(__name__).warning(
            "The CPU kernels are compiled into %s, for there is no cache directory that can be written: "
            "name one in XDG_CACHE_HOME to keep them",
            folder,
        )
    return folder / name


def _cache_folders() -> list[Path]:
    found = [Path(base)] if (base := os.environ.get("XDG_CACHE_HOME")) else []
    with contextlib.suppress(RuntimeError):  # the user has no home directory, as in some containers
        found.append(Path.home() / ".cache")
    return [folder / "rrm_engine" for folder in found]


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)


def _temporary_folder() -> Path:
    """A folder that only this user can write, because libraries in it are loaded and run."""
    if not hasattr(os, "getuid"):
        return Path(tempfile.mkdtemp(prefix="rrm_engine-"))
    folder = Path(tempfile.gettempdir(), f"rrm_engine-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077:
        return folder
    return Path(tempfile.mkdtemp(prefix="rrm_engine-"))  # that one belongs to another user


def _processor() -> str:
    """A description of this processor: all that ``-march=native`` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line for line in lines if line.startswith("flags")), "") + platform.machine()

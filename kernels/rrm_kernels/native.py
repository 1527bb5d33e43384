"""The compiled CPU kernel: decode attention that reads K and V in place instead of gathering them.

It is one C++ file without dependencies, compiled with the machine's own compiler on first use (about two seconds) and
kept in the user's cache directory under a name made of its source, flags and processor. Where there is no compiler,
``load_native`` raises NativeUnavailable and callers stay with the torch reference.
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

from rrm_kernels import reference
from rrm_kernels.reference import DecodeGroup, PagedBatch

COMPILE = ["-O3", "-march=native", "-std=c++17", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
COMPILE += ["-ffp-contract=fast", "-mprefer-vector-width=512"]
DTYPES = (torch.float32, torch.bfloat16)


class NativeUnavailable(RuntimeError):
    """The kernel cannot be compiled or loaded here; the message says why."""


class NativeAttention:
    """``paged_attention`` with the decoding rows done by the compiled kernel; same arguments, same result."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        self._decode = library.rrm_paged_decode
        self._decode.restype = None
        self._decode.argtypes = [ctypes.c_int, *[pointer] * 7, *[number] * 7, real, real, number]

    def __call__(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        batch: PagedBatch,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As ``reference.paged_attention``; other dtypes than fp32 and bf16 are left to it altogether."""
        if query.dtype not in DTYPES or key_cache.dtype != query.dtype or query.device.type != "cpu":
            return reference.paged_attention(query, key_cache, value_cache, batch, scale, window, softcap, sinks)
        query = query.contiguous()
        out = query.new_empty(query.shape[0], query.shape[1], value_cache.shape[3])
        sink_values = None if sinks is None else sinks.float().contiguous()
        for group in batch.groups:
            self._run(query, key_cache, value_cache, out, group, scale, window, softcap, sink_values)
        reference.attend_chunks(out, query, key_cache, value_cache, batch.chunks, scale, window, softcap, sinks)
        return out

    def _run(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        out: torch.Tensor,
        group: DecodeGroup,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        _, block_size, kv_heads, value_width = value_cache.shape
        self._decode(
            query.dtype == torch.bfloat16,
            query[group.start].data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            out[group.start].data_ptr(),
            group.tables.data_ptr(),
            group.lengths.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            group.stop - group.start,
            group.tables.shape[1],
            block_size,
            query.shape[1],
            kv_heads,
            query.shape[2],
            value_width,
            scale,
            softcap or 0.0,
            window or 0,
        )


@cache
def load_native() -> NativeAttention:
    """The kernel, compiled if it has not been yet. Raises NativeUnavailable with the reason."""
    source = files("rrm_kernels").joinpath("decode.cpp").read_text()
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise NativeUnavailable("no C++ compiler found (install g++, or name one in CXX)")
    key = hashlib.sha256(repr((source, COMPILE, compiler, _processor(), sys.platform)).encode()).hexdigest()[:16]
    library = _cache_folder() / f"decode-{key}.so"
    try:
        if not library.exists():
            _compile(compiler, source, library)
        return NativeAttention(ctypes.CDLL(str(library)))
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise NativeUnavailable(f"{compiler} could not build it: {detail[0] if detail else error}") from error


def _compile(compiler: str, source: str, library: Path) -> None:
    """Build beside the target and rename, so that two processes never see half a file."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        cpp, built = Path(folder, "decode.cpp"), Path(folder, "decode.so")
        cpp.write_text(source)
        # torch's own OpenMP runtime where it has one: two of them would fight over the cores.
        runtime = [str(p) for p in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*"))][:1]
        command = [compiler, *COMPILE, "-shared", "-o", str(built), str(cpp), *runtime]
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

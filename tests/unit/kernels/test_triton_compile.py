"""Every Triton kernel compiles to machine code of a real GPU: what the interpreter accepts, the compiler may not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux)")
SCRIPT = Path(__file__).parents[2] / "support" / "triton_compile.py"
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


def compile_kernels(cache: Path, argument: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(SCRIPT), argument]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.skipif(not PTXAS.exists(), reason="this triton comes without NVIDIA's assembler")
def test_all_kernels_compile_for_an_absent_gpu(tmp_path: Path) -> None:
    done = compile_kernels(tmp_path, "bfloat16")
    assert done.returncode == 0, done.stderr
    names = {line.split("'")[1] for line in done.stdout.splitlines()}
    kernels = Path(__file__).parents[3] / "kernels/rrm_kernels"
    written = {
        line.removeprefix("def ").split("(")[0]
        for file in kernels.glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def _") and line.split("(")[0].endswith("_kernel")
    }
    assert names == written
    assert len(names) > 5


@pytest.mark.skipif(not PTXAS.exists(), reason="this triton comes without NVIDIA's assembler")
def test_a_kernel_that_only_the_interpreter_takes_is_noticed(tmp_path: Path) -> None:
    """Negative control."""
    done = compile_kernels(tmp_path, "broken")
    assert done.returncode != 0
    assert "redefines it as fp64" in done.stderr

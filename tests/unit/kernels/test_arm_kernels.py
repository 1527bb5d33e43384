"""The compiled CPU kernels on Arm's vectors, run by an emulator: they give what they give on this processor."""

import platform
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from rrm_kernels.build import COMPILE, SOURCES, VARIANTS

CROSS = "aarch64-linux-gnu-g++"
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")

Results = list[tuple[str, torch.Tensor]]


def results(compiler: str, flags: tuple[str, ...], run: list[str], folder: Path) -> Results:
    """What ``kernels_alone.cpp`` prints, compiled so and run so."""
    program = folder / compiler
    sources = [str(files("rrm_kernels").joinpath(name)) for name in SOURCES if name.endswith(".cpp")]
    command = [compiler, *COMPILE, *flags, str(Path(__file__).parents[2] / "support" / "kernels_alone.cpp"), *sources]
    subprocess.run([*command, "-o", str(program)], check=True, timeout=300)
    done = subprocess.run([*run, str(program)], check=True, capture_output=True, text=True, timeout=300)
    lines = [line.split() for line in done.stdout.splitlines()]
    return [(name, torch.tensor([float.fromhex(number) for number in rest])) for name, *rest in lines]


def test_arm_kernels_agree_with_those_of_this_processor(tmp_path: Path) -> None:
    if shutil.which(CROSS) is None or EMULATOR is None or shutil.which("g++") is None:
        pytest.skip(
            "needs g++, aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user-static)"
        )
    here = results("g++", VARIANTS["native"], [], tmp_path)
    arm = results(CROSS, ("-static",), [EMULATOR], tmp_path)
    assert len(here) == 20 and [name for name, _ in here] == [name for name, _ in arm]
    fused = platform.machine() != "x86_64" or "fma" in Path("/proc/cpuinfo").read_text().split()
    for (name, expected), (_, result) in zip(here, arm, strict=True):
        assert len(expected) > 1 and expected.abs().max() > 0.1
        if name.startswith("product") and fused:
            assert torch.equal(result, expected), name
        bound = 0.02 if name.endswith("16") else 1e-5
        assert (result - expected).abs().max() < bound * expected.abs().max(), name

"""The wheel holds everything the command needs, and works from any directory."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that the checkout gets no new files."""
    source, out = tmp_path_factory.mktemp("source") / "project", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for name in ("rrm_engine", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    command = [sys.executable, "-m", "pip", "wheel", *flags, "."]
    subprocess.run(command, cwd=source, check=True, timeout=300)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_code_model_tasks_and_styles(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        str(path.relative_to(ROOT)) for path in (ROOT / "rrm_engine").rglob("*.py") if "__pycache__" not in path.parts
    }
    data = {str(p.relative_to(ROOT)) for p in (ROOT / "rrm_engine").rglob("*") if p.suffix in {".toml", ".jsonl"}}
    model = {
        f"rrm_engine/data/embedded_model/{name}" for name in ("model.safetensors", "config.json", "tokenizer.json")
    }
    kernels = {
        f"rrm_kernels/{path.relative_to(ROOT / 'kernels' / 'rrm_kernels')}"
        for path in (ROOT / "kernels" / "rrm_kernels").rglob("*.py")
    }
    typed = {"rrm_engine/py.typed", "rrm_kernels/py.typed"}
    assert sources | data | model | kernels | typed <= held
    assert not any(name.startswith("kernels/") for name in held)


def test_the_installed_wheel_runs_from_any_directory(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, timeout=300)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "rrm_engine.bench", "--limit", "1", "--quiet", "--out", "out"],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len((elsewhere / "out" / "rows.jsonl").read_text().splitlines()) == 2
    where = "import rrm_engine, rrm_kernels; print(rrm_engine.__file__, rrm_kernels.__file__)"
    loaded = subprocess.run(
        [sys.executable, "-c", where], cwd=elsewhere, env={**os.environ, "PYTHONPATH": str(site)}, capture_output=True
    )
    assert loaded.stdout.decode().count(str(site)) == 2

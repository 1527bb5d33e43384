"""``--help`` of every command is there at once: nothing but Python itself is needed for it, installed or imported."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BARE = [sys.executable, "-S"]  # no installed package can be imported: not torch, not this one
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHON")}


def is_command(path: Path) -> bool:
    return 'if __name__ == "__main__":\n    main()' in (text := path.read_text()) or "sys.exit(main())" in text


MODULES = sorted(path.parent.relative_to(ROOT) for path in (ROOT / "rrm_engine").rglob("__main__.py"))
SCRIPTS = sorted(
    path for folder in ("benchmarks", "scripts") for path in (ROOT / folder).glob("*.py") if is_command(path)
)
PARTS = sorted(path.stem for path in (ROOT / "scripts" / "embedded").glob("*.py") if is_command(path))
COMMANDS = [
    *(["-m", ".".join(module.parts)] for module in MODULES),
    *([str(path.relative_to(ROOT))] for path in SCRIPTS),
    *(["-m", f"embedded.{name}"] for name in PARTS),
]


def run(command: list[str], cwd: Path = ROOT, **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_these_are_the_commands() -> None:
    names = {" ".join(command) for command in COMMANDS}
    assert {"-m rrm_engine.bench", "-m rrm_engine.trace", "-m rrm_engine.verify", "-m embedded.evaluate"} <= names
    assert {"benchmarks/gpu_suite.py", "benchmarks/soak.py", "scripts/train_embedded_model.py"} <= names


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_needs_nothing_but_python(command: list[str]) -> None:
    path = {"PYTHONPATH": str(ROOT / "scripts")} if "embedded" in command[-1] else {}
    done = run([*BARE, *command, "--help"], ROOT, **path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ") and not done.stderr


@pytest.mark.parametrize(
    ("script", "flags", "missing"),
    [
        ("benchmarks/gpu_suite.py", ["--out", "x"], "torch and transformers and rich and triton cannot be imported"),
        ("benchmarks/kv_ablation.py", ["x"], "matplotlib cannot be imported"),
        ("benchmarks/decode.py", ["--model", "embedded"], "scripts/setup.sh"),
        ("scripts/train_embedded_model.py", ["--out", "x"], "torch is not installed: run scripts/setup.sh"),
    ],
)
def test_what_is_missing_is_named_when_it_is_needed(script: str, flags: list[str], missing: str) -> None:
    done = run([*BARE, script, *flags])
    assert done.returncode == 2 and missing in done.stderr and "Traceback" not in done.stderr


def test_a_wrong_flag_is_refused_before_anything_is_imported() -> None:
    done = run([*BARE, "benchmarks/soak.py", "--minutes", "soon"])
    assert done.returncode == 2 and "invalid float value: 'soon'" in done.stderr


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A checkout in which nothing has been installed."""
    for name in ("scripts", "benchmarks", "rrm_engine", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "data", "results"))
    return tmp_path


@pytest.mark.parametrize("name", ["bench", "kv_ablation", "test", "setup.sh", "run.sh"])
def test_the_scripts_help_before_they_install(clone: Path, name: str) -> None:
    command = [str(clone / "scripts" / name), *(["-m", "rrm_engine.trace"] if name == "run.sh" else []), "--help"]
    done = run(command, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert not (clone / ".venv").exists()
    assert ("Nothing is installed yet" in done.stdout) is (name in ("bench", "kv_ablation", "run.sh"))


def test_set_up_refuses_what_it_does_not_know(clone: Path) -> None:
    done = run([str(clone / "scripts" / "setup.sh"), "everything"], PYTHON=sys.executable)
    assert done.returncode == 2 and "scripts/setup.sh test" in done.stderr
    assert not (clone / ".venv").exists()

"""The soak itself: it passes for a few seconds, says what it survived, and fails where the engine is broken."""

import json
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from broken import Breaks, blocks_of_sequences_that_end_paused, no_copies, no_swap_ins

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"
MOST_LIVES = 60


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    spec = spec_from_file_location("soak", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["soak"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(soak: ModuleType) -> Any:
    return soak.load("tiny", "cpu")


def test_a_few_seconds(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--minutes", "0.05", "--seed", "100", "--json", "out.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "tokens equal to plain transformers\nsurvived: " in done.stdout
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["failure"] is None and result["seed"] == 100
    assert result["lives"] >= 1 and result["tokens"] > 50 and result["sequences"] >= result["graphs"] >= result["lives"]


def test_lives_of_some_seconds_survive_everything_there_is(run: Any, soak: ModuleType) -> None:
    """What a soak is worth: without preemptions, drops, offloads and restores it would have shown nothing."""
    for seed in range(15):
        run.live(seed)
    assert all(run.totals[name] > 0 for name in soak.SURVIVED), run.totals


def test_a_life_is_its_seed(run: Any, soak: ModuleType) -> None:
    def tokens(seed: int) -> list[list[int]]:
        life = soak.Life(run.model, 500, soak.Settings.draw(seed, 512))
        life.run()
        return [node.sequence.tokens for node in life.nodes.values()]

    assert tokens(3) == tokens(3) != tokens(4)


# negative controls


@pytest.mark.parametrize(
    ("sabotage", "how"),
    [
        (no_copies, r"token \d+ is \d+, not \d+"),
        (no_swap_ins, r"token \d+ is \d+, not \d+"),
        (blocks_of_sequences_that_end_paused, "references kept|host blocks kept"),
    ],
)
def test_a_broken_engine_fails_with_its_seed(
    sabotage: Breaks, how: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    seed = first_failure(run)
    with pytest.raises(AssertionError, match=how):
        run.live(seed)
    monkeypatch.undo()
    run.live(seed)  # and it was the sabotage


def first_failure(run: Any) -> int:
    for seed in range(MOST_LIVES):
        try:
            run.live(seed)
        except AssertionError:
            return seed
    raise ValueError("nothing was noticed")


def test_a_failure_is_reported_with_what_brings_it_back(
    soak: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    no_copies(monkeypatch)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["soak.py", "--minutes", "5", "--json", str(out)])
    assert soak.main() == 1
    said = capsys.readouterr()
    failed = json.loads(out.read_text())
    assert failed["failure"].startswith("Wrong(")
    assert f"FAILED in the life with seed {failed.get('lives', 0)}" in said.out
    assert f"--seed {failed.get('lives', 0)} --minutes 0" in said.err and "Settings(seed=" in said.err

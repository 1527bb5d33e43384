"""The GPU suite on a CPU in tiny shapes: every section runs, and what goes wrong in one is its own affair."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux)")
ROOT = Path(__file__).parents[2]
# What a machine for measurements may lack: the suite loads no model that needs them.
ABSENT = ("llguidance", "math_verify", "perfetto", "gguf", "matplotlib", "flash_attn")


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_suite")


def test_from_a_plain_checkout_every_section_runs(tmp_path: Path) -> None:
    block = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))"
    start = (
        "import runpy; sys.argv = ['gpu_suite.py', '--tiny', '--out', sys.argv[1]]; sys.path.insert(0, 'benchmarks')"
    )
    run = "runpy.run_path('benchmarks/gpu_suite.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", f"{block}; {start}; {run}", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f".{os.pathsep}kernels", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=570,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    sections = result["sections"]
    assert all(section["rows"] and not section["error"] and not section["skipped"] for section in sections.values())
    assert len(sections) == 8
    assert result["plots"].startswith("left out")
    assert all(row["ok"] for row in sections["kernels"]["rows"])
    assert all(0 < row["mbu"] < 2 for row in sections["decode"]["rows"] if "mbu" in row)
    moved = {row["what"] for row in sections["moves"]["rows"]}
    assert {"splice", "copy one block"} <= moved
    text = (tmp_path / "result.md").read_text()
    assert all(section["title"] in text for section in sections.values())


def test_an_error_is_recorded_and_the_other_sections_run(
    suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(lab: Any, rows: list[Any]) -> None:
        rows.append({"half": 1})
        raise RuntimeError("the device fell off")

    monkeypatch.setattr(suite.decode, "run", broken)
    assert suite.main(["--tiny", "--device", "cpu", "--only", "decode,pipeline", "--out", str(tmp_path)]) == 1
    sections = json.loads((tmp_path / "result.json").read_text())["sections"]
    assert sections["decode"]["error"] == "RuntimeError: the device fell off"
    assert sections["decode"]["rows"] == [{"half": 1}]
    assert [row["stages"] for row in sections["pipeline"]["rows"]] == [1, 4]
    assert "**Error: RuntimeError: the device fell off**" in (tmp_path / "result.md").read_text()


def test_a_section_that_takes_too_long_is_stopped(suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(lab: Any, rows: list[Any]) -> None:
        rows.append({"before": 1})
        time.sleep(600)

    monkeypatch.setattr(suite.decode, "run", slow)
    began = time.monotonic()
    arguments = ["--tiny", "--device", "cpu", "--only", "decode", "--limit", "2", "--out", str(tmp_path)]
    assert suite.main(arguments) == 1
    assert time.monotonic() - began < 300
    section = json.loads((tmp_path / "result.json").read_text())["sections"]["decode"]
    assert section["rows"] == [{"before": 1}]
    assert section["error"].startswith("not finished in")


def test_a_kernel_that_is_wrong_is_noticed(suite: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    from rrm_kernels import ragged

    attend = ragged.attend_shared

    def wrong(call: Any, batch: Any, partial: Any, lse: Any, first: int) -> None:
        attend(call, batch, partial, lse, first)
        partial[first:] *= 1.1

    monkeypatch.setattr(ragged, "attend_shared", wrong)
    assert suite.main(["--tiny", "--device", "cpu", "--only", "kernels", "--out", str(tmp_path)]) == 1
    section = json.loads((tmp_path / "result.json").read_text())["sections"]["kernels"]
    assert "shared prefix float32" in section["error"]
    assert {row["ok"] for row in section["rows"]} == {True, False}


def test_without_a_gpu_it_says_what_to_do(suite: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["--device", "cpu", "--out", str(tmp_path)])
    assert "--tiny" in capsys.readouterr().err


def test_the_cost_of_sharing_is_found_again(suite: Any) -> None:
    """The fit on times made from known constants."""
    rows = [
        {
            "siblings": siblings,
            "prefix": prefix,
            "saved_tokens": (siblings - 1) * prefix,
            "apart_us": 100 + 0.01 * ((siblings - 1) * prefix - 40 * siblings - 3000),
            "together_us": 100.0,
        }
        for siblings in (1, 2, 8, 32)
        for prefix in (512, 4096)
    ]
    found = suite.sharing.fit(rows)
    assert (found["member"], found["crossover"]) == (pytest.approx(40), pytest.approx(3000))
    assert suite.sharing.fit([row | {"together_us": 1e9 + row["saved_tokens"]} for row in rows])["member"] is None

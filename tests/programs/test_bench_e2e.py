"""The whole command on the packaged model, as a user runs it: run, interrupt, kill, resume, refuse."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from forked_bench import Bench, die_writing

import rrm_engine

SOURCE = str(Path(rrm_engine.__file__).parents[1])
FILES = {"run.json", "rows.jsonl", "trace.jsonl", "summary.json"}
posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")


def start(*argv: str, cwd: Path) -> "subprocess.Popen[str]":
    # A runner in the background ignores SIGINT and hands that down; the command under test must not inherit it.
    restore = None if sys.platform == "win32" else (lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    return subprocess.Popen(
        [sys.executable, "-m", "rrm_engine.bench", *argv],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([SOURCE, os.environ.get("PYTHONPATH", "")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=restore,
    )


def bench(*argv: str, cwd: Path) -> tuple[int, str, str]:
    """The same without the seconds that its imports take."""
    process = Bench(cwd, *argv)
    return process.wait(600), process.out, process.err


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "rows.jsonl").read_text(encoding="utf-8").split("\n") if line]


def key(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["id"], row["mode"], row["sample"]


def outcome(rows: list[dict[str, Any]]) -> dict[tuple[str, str, int], tuple[Any, ...]]:
    """What must not depend on when or beside what a row ran."""
    return {key(row): (row["status"], row["answer"], row["total_tokens"], row["nodes"]) for row in rows}


def wait_for_rows(process: "subprocess.Popen[str]", directory: Path, count: int) -> None:
    path = directory / "rows.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """An uninterrupted run of three tasks: its directory, stdout and stderr."""
    folder = tmp_path_factory.mktemp("bench")
    process = start("--limit", "3", "--out", "whole", cwd=folder)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return folder / "whole", out, err


def test_rows(run: tuple[Path, str, str]) -> None:
    rows = rows_of(run[0])
    assert len(rows) == 6 == len(set(map(key, rows)))
    assert [row["mode"] for row in rows] == ["direct", "rrm", "rrm", "direct", "direct", "rrm"]
    for row in rows:
        assert row["error"] is None
        assert row["expected"] is not None and row["correct"] in (True, False)
        assert row["latency_s"] > 0 and 0 < row["ttft_s"] <= row["latency_s"]
        assert 0 < row["critical_path_tokens"] <= row["total_tokens"]
        assert row["peak_kv_blocks"] > 0 and row["model_calls"] > 0
        assert row["settings"]["block_size"] == 16
    assert all(row["nodes"] == 1 for row in rows if row["mode"] == "direct")


def test_the_packaged_model_shows_what_recursive_solving_is(run: tuple[Path, str, str]) -> None:
    recursive = [row for row in rows_of(run[0]) if row["mode"] == "rrm"]
    assert any(row["status"] == "graph" and row["nodes"] > 1 and row["resumes"] > 0 for row in recursive)


def test_files(run: tuple[Path, str, str]) -> None:
    directory = run[0]
    assert {path.name for path in directory.iterdir()} == FILES
    manifest = json.loads((directory / "run.json").read_text())
    assert manifest["tasks"]["name"] == "embedded" and manifest["tasks"]["used"] == 3
    assert manifest["settings"]["kv_blocks"] is None and manifest["resolved"]["kv_blocks"] > 0
    assert "auto" not in (manifest["resolved"]["dtype"], manifest["resolved"]["device"])
    assert manifest["versions"]["torch"] and manifest["hardware"]["cores"] >= 1
    assert "--limit 3" in manifest["command"]
    keys = {"/".join(map(str, key(row))) for row in rows_of(directory)}
    events = [json.loads(line) for line in (directory / "trace.jsonl").read_text().splitlines()]
    assert {event["job"] for event in events if "job" in event} == keys
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["rows"] == 6 and summary["modes"]["direct"]["n"] == 3


def test_output(run: tuple[Path, str, str]) -> None:
    _, out, err = run
    assert re.search(r"^ *direct +3 ", out, re.MULTILINE) and re.search(r"^ *rrm +3 ", out, re.MULTILINE)
    assert "Headline" in out and "Written to whole" in out
    assert len(out.splitlines()) <= 24
    assert len(re.findall(r"^\[[1-6]/6\] ", err, re.MULTILINE)) == 6
    assert "\x1b" not in out + err


@posix
def test_interrupt_and_resume(run: tuple[Path, str, str], tmp_path: Path) -> None:
    process = start("--limit", "3", "--out", "cut short", cwd=tmp_path)
    wait_for_rows(process, tmp_path / "cut short", 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    before = (tmp_path / "cut short/rows.jsonl").read_bytes()
    assert 1 <= before.count(b"\n") < 6 and before.endswith(b"\n")
    assert (tmp_path / "cut short/summary.json").exists()
    command = next(line.removeprefix("Go on with: ") for line in out.splitlines() if "--resume" in line)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "rrm_engine.bench"]
    code, out, err = bench(*words[3:], cwd=tmp_path)
    assert code == 0, err
    assert (tmp_path / "cut short/rows.jsonl").read_bytes().startswith(before)
    rows = rows_of(tmp_path / "cut short")
    assert len(rows) == 6
    assert outcome(rows) == outcome(rows_of(run[0]))
    assert {row["session"] for row in rows} == {0, 1}


@posix
def test_kill_and_resume(run: tuple[Path, str, str], tmp_path: Path) -> None:
    argv = ["--limit", "3", "--out", "killed", "--quiet"]
    killed = Bench(tmp_path, *argv, prepare=[partial(die_writing, 3, 17)])
    assert killed.wait() == -signal.SIGKILL, killed.err
    assert len((tmp_path / "killed/rows.jsonl").read_text().splitlines()) == 3
    code, _, err = bench("--resume", "killed", "--quiet", cwd=tmp_path)
    assert code == 0, err
    assert "Cut a half-written row" in err
    assert err.count("\n") == 1
    assert outcome(rows_of(tmp_path / "killed")) == outcome(rows_of(run[0]))


def test_a_finished_run_is_only_shown(run: tuple[Path, str, str]) -> None:
    before = (run[0] / "rows.jsonl").read_bytes()
    code, out, err = bench("--resume", str(run[0]), cwd=run[0].parent)
    assert code == 0 and "Headline" in out and err == ""
    assert (run[0] / "rows.jsonl").read_bytes() == before


def test_resume_refuses_other_settings_and_tasks(run: tuple[Path, str, str], tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": 2}\n')
    resume = ["--resume", str(run[0])]
    for argv, part in [
        (["--limit", "4", "--seed", "7"], "--limit is 4, was 3; --seed is 7, was 0"),
        (["--prefix-cache", "off"], "--prefix-cache is off, was on"),
        (["other.jsonl"], "other.jsonl are not those of the recorded embedded"),
    ]:
        code, out, err = bench(*argv, *resume, cwd=tmp_path)
        assert code == 2 and part in err.replace("\n", " ") and out == ""
    code, _, err = bench("embedded", "--limit", "3", "--quiet", "--out", str(run[0]), *resume, cwd=tmp_path)
    assert code == 0, err


def test_quiet_and_a_task_without_an_answer(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("question\nWhat is 1 + 1?\n")
    code, out, err = bench(
        "t.csv", "--quiet", "--out", "r", "--direct-max-tokens", "20", "--modes", "direct", cwd=tmp_path
    )
    assert code == 0 and err == "", err
    assert "Written to r" in out
    (row,) = rows_of(tmp_path / "r")
    assert row["correct"] is None and row["expected"] is None and row["id"] == "line-2"
    assert row["total_tokens"] <= 20


def test_default_directory(tmp_path: Path) -> None:
    (tmp_path / "my tasks.jsonl").write_text('{"problem": "What is 1 + 1?", "answer": 2}\n')
    argv = ["my tasks.jsonl", "--direct-max-tokens", "5", "--modes", "direct", "--quiet"]
    assert bench(*argv, cwd=tmp_path)[0] == 0
    (directory,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"\d{8}-\d{6}-embedded-my-tasks", directory.name)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    code, out, err = bench("--model", "./nothing-here", "--out", "r", "--limit", "1", cwd=tmp_path)
    assert code == 2 and out == ""
    said, refused = err.splitlines()
    assert said == "Loading ./nothing-here ..." and refused.startswith("error: ") and "nothing-here" in refused
    assert not (tmp_path / "r").exists()

"""Grading beside the batch: whatever an answer does to the process that judges it, the next one is judged."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import by_hand
import pytest

from rrm_engine.bench.grader import Grader, GraderClosed, Verdict
from rrm_engine.bench.progress import SilentDisplay
from rrm_engine.bench.rows import RowWriter
from rrm_engine.graph.types import Status
from rrm_engine.runs.directory import RunDir, RunDirError
from rrm_engine.runs.rows import Row
from rrm_engine.solver.result import Job, JobResult

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")

# What ``grade`` does in the process, by the answer: real faults that no regular expression can rule out.
SABOTAGE = """
import os, sys, time
from rrm_engine.bench import grading
from rrm_engine.bench.grader import serve
real = grading.grade
def grade(answer, expected):
    if answer == "power": return 7 ** 7 ** 9 > 1       # in C: neither a thread nor SIGALRM's handler gets a turn
    if answer == "loop":
        while True: pass
    if answer == "memory": return bytearray(1 << 45) == b""
    if answer == "crash": os.abort()
    if answer == "prints": print("noise", flush=True); os.write(1, b"noise\\n")
    if answer == "slow":
        grading.SECONDS = 0.1
        return real("FINAL: " + "\\\\cdot ".join(f"\\\\sin({i}x)" for i in range(2, 20)), "\\\\pi x")
    if answer == "deep": return grade(answer, expected)
    return real(answer, expected)
grading.grade = grade
serve()
"""


@pytest.fixture
def grader(monkeypatch: pytest.MonkeyPatch) -> Iterator[Grader]:
    monkeypatch.setattr("rrm_engine.bench.grader.SERVE", SABOTAGE)
    grader = Grader(seconds=0.5)
    yield grader
    grader.close()


def test_verdicts(grader: Grader) -> None:
    assert grader.grade("FINAL: 204", "204") == Verdict(True)
    assert grader.grade("FINAL: 205", "204") == Verdict(False)
    assert grader.grade("anything", None) == Verdict(None)
    assert grader.grade("\ud800 FINAL: 204\n", "204") == Verdict(True)
    assert grader.grade("prints", "1") == Verdict(False)
    assert grader.grade("FINAL: " + "9" * 5000, "9" * 5000) == Verdict(True)


def test_gradings_own_limit_is_said(grader: Grader) -> None:
    grader.seconds = 30
    assert grader.grade("slow", "1") == Verdict(False, "grading took more than 0.1 s")
    assert grader.grade("FINAL: 1", "1") == Verdict(True)


@pytest.mark.parametrize("answer", ["power", "loop"])
def test_what_would_never_end_is_cut_off_and_the_next_one_is_judged(grader: Grader, answer: str) -> None:
    assert grader.grade(answer, "1") == Verdict(False, "grading took more than 0.5 s")
    assert grader.grade("FINAL: 1", "1") == Verdict(True)


def test_faults_are_said_and_the_next_one_is_judged(grader: Grader) -> None:
    for answer, problem in [("memory", "MemoryError"), ("deep", "RecursionError")]:
        verdict = grader.grade(answer, "1")
        assert verdict.correct is False and verdict.problem is not None and verdict.traceback is not None
        assert verdict.problem.startswith(f"grading failed: {problem}")
        assert "in grade" in verdict.traceback
    assert grader.grade("crash", "1") == Verdict(False, "grading ended its process (code -6)")
    assert grader.grade("FINAL: 1", "1") == Verdict(True)


def test_closing_ends_what_goes_on(grader: Grader) -> None:
    grader.seconds = 60
    raised: list[BaseException] = []

    def judge() -> None:
        try:
            grader.grade("loop", "1")
        except GraderClosed as error:
            raised.append(error)

    thread = threading.Thread(target=judge)
    thread.start()
    time.sleep(0.3)
    grader.close()
    thread.join(10)
    assert len(raised) == 1
    with pytest.raises(GraderClosed):
        grader.grade("FINAL: 1", "1")


def test_the_process_goes_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom rrm_engine.bench import grader\n"
        "g = grader.Grader()\ng.grade('1', '1')\nprint(g._process.pid, flush=True)\nsys.stdin.read()"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    os.kill(child, 9)
    pytest.fail("the process that grades is still there")


# rows


def result(name: str, answer: str = "FINAL: 1", **fields: Any) -> JobResult:
    return JobResult(Job(name, "p", "direct"), Status.ATOMIC, answer, 0.5, **fields)


class Shown(SilentDisplay):
    def __init__(self) -> None:
        self.rows: list[Row] = []

    def row(self, row: Row) -> None:
        self.rows.append(row)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[RunDir]:
    directory = RunDir.create(tmp_path / "run")
    directory.write_manifest(by_hand.manifest())
    yield directory
    directory.close()


def writer(directory: RunDir, shown: Shown, grader: Grader, names: str) -> RowWriter:
    return RowWriter(directory, shown, dict.fromkeys(names, "1"), {"seed": 0}, grader)


def test_a_slow_grade_holds_nobody_up(directory: RunDir, grader: Grader) -> None:
    shown = Shown()
    with writer(directory, shown, grader, "abc") as rows:
        began = time.monotonic()
        rows.put(result("a", "loop"))
        rows.put(result("b"))
        rows.put(result("c", error="KeyError: 1", traceback="Traceback: in c"))
        assert time.monotonic() - began < 0.1
    assert [(row["id"], row["correct"], row["grading_error"]) for row in shown.rows] == [
        ("a", False, "grading took more than 0.5 s"),
        ("b", True, None),
        ("c", False, None),
    ]
    assert [json.loads(line) for line in (directory.path / "rows.jsonl").read_text().splitlines()] == shown.rows
    log = (directory.path / "errors.log").read_text()
    assert "c/direct/0\nTraceback: in c\n" in log and log.count("direct/0") == 1


def test_a_row_that_cannot_be_written_as_it_is(directory: RunDir, grader: Grader) -> None:
    shown = Shown()
    with writer(directory, shown, grader, "abc\ud800") as rows:
        rows.put(result("a", repairs={"x": object()}))  # no JSON
        rows.put(result("\ud800", "half \udfff"))
        rows.put(result("b"))
    assert [row["error"] is None for row in shown.rows] == [False, True, True]
    assert str(shown.rows[0]["error"]).startswith("writing the row: TypeError")
    directory.close()
    again = RunDir.resume(directory.path)
    assert again.rows == shown.rows and again.rows[1]["answer"] == "half \udfff"
    again.close()
    assert "TypeError" in (directory.path / "errors.log").read_text()


def test_a_disk_that_is_full_ends_the_run_with_its_sentence(
    directory: RunDir, grader: Grader, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown, add = Shown(), directory.add

    def full(row: Row) -> None:
        if row["id"] == "b":
            raise RunDirError("rows.jsonl cannot be written: No space left on device")
        add(row)

    monkeypatch.setattr(directory, "add", full)
    with pytest.raises(RunDirError, match="No space left"), writer(directory, shown, grader, "abc") as rows:
        for name in "abc":
            rows.put(result(name))
    assert [row["id"] for row in shown.rows] == ["a"], "a row after a lost one was written"

"""Faults of the machine under a whole bench: killed processes, full disks, too little memory, forwards that fail.

Every bench here is a process of its own that runs the real command on the embedded model, and is really killed, really
out of disk or really out of memory. What must come out is what an undisturbed run writes, token by token.
"""

import errno
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from forked_bench import (
    Bench,
    accept_torn_lines,
    copy_out,
    die_in_step,
    die_writing,
    fail_forward,
    hear_interrupts,
    leave_torn_lines,
    let_allocations_fail,
    limit_files,
    limit_memory,
    lose_reader,
    mount_small_disk,
    overlook_limits,
    raise_at,
    replace_stream,
    signal_itself,
    skip_torn_lines,
    wait_for_rows,
    write_rows_before_events,
)

from rrm_engine.device.memory import is_out_of_memory
from rrm_engine.runs.reader import read_run
from rrm_engine.runs.rows import Row, row_key

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX processes")
TASKS = {
    "a": "Only the last three digits count. (a) Zeno begins at 227 and repeats one step 4 times: multiply by 9, then "
    "add 8. (b) Mara begins at 890 and repeats one step 5 times: multiply by 7, then add 9. Find the total at the end.",
    "b": "Work modulo 1000. Mo holds 218 keys, and every day for 5 days the count becomes 9 times the old one plus 2. "
    "Find the final number.",
}
RUN = shlex.split(
    "tasks.jsonl --samples 2 --temperature 0 --kv-blocks 500 --direct-max-tokens 30 --planner-max-tokens 120 "
    "--solver-max-tokens 70 --continuation-max-tokens 40 --out"
)
ROWS = 8
Contents = dict[str, tuple[Any, ...]]
Steps = list[Callable[[], None]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faults")
    lines = [json.dumps({"id": name, "problem": text, "answer": 1}) for name, text in TASKS.items()]
    (path / "tasks.jsonl").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The directory of an undisturbed run."""
    bench = Bench(folder, *RUN, "whole", "--quiet")
    assert bench.wait() == 0, bench.err
    return folder / "whole"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def contents(directory: Path) -> Contents:
    """What each finished row says, and all tokens of its nodes; fails if a row is doubled or lacks events."""
    rows = lines_of(directory / "rows.jsonl")
    tokens: dict[tuple[str, Any], dict[str, list[int]]] = defaultdict(dict)
    for event in lines_of(directory / "trace.jsonl"):
        if "token_ids" in event:
            tokens[event["job"], event["session"]][event["node"]] = event["token_ids"]
    found = {}
    for row in rows:
        what = [row[name] for name in ("status", "answer", "total_tokens", "critical_path_tokens", "finish_reasons")]
        found[row_key(cast(Row, row))] = (*what, tokens[row_key(cast(Row, row)), row["session"]])
    assert len(found) == len(rows), "a row is there twice"
    assert read_run(directory).incomplete == {}, "a row lacks events"
    return found


def finished(directory: Path) -> bytes:
    """The whole lines of rows.jsonl."""
    data = (directory / "rows.jsonl").read_bytes()
    return data[: data.rfind(b"\n") + 1]


def finish(directory: Path, expected: Contents, *prepare: Callable[[], None]) -> Bench:
    """Resume the run in ``directory``: it must keep what was finished, and end as if nothing had happened."""
    before = finished(directory)
    bench = Bench(directory.parent, "--resume", directory.name, "--quiet", prepare=prepare)
    assert bench.wait() == 0, bench.err
    assert finished(directory).startswith(before), "a finished row was changed"
    assert contents(directory) == expected
    return bench


# killed


# What is on the disk of the row that is being written: nothing, its beginning, all but its line break, all of it.
KILLS = [
    partial(die_writing, 1, 200),
    partial(die_writing, 1, 0),
    partial(die_writing, 1, 1),
    partial(die_in_step, 5),
    partial(die_writing, 2, -1),
    partial(die_writing, 1, -40),
    partial(die_in_step, 60),
    partial(die_writing, 2, None),
    partial(die_writing, 1, 1000),
]


def test_killed_over_and_over(folder: Path, whole: Path) -> None:
    expected, directory = contents(whole), folder / "killed"
    start, kept, cut = [*RUN, "killed"], b"", False
    for kill in KILLS:
        bench = Bench(folder, *start, "--quiet", prepare=[kill])
        assert bench.wait() == -signal.SIGKILL, bench.err
        assert ("Cut a half-written row" in bench.err) is cut
        assert finished(directory).startswith(kept), "a finished row was lost"
        kept, start = finished(directory), ["--resume", "killed"]
        torn = (directory / "rows.jsonl").read_bytes()[len(kept) :]
        cut = bool(torn) and not torn.endswith(b"}")
    assert 2 < kept.count(b"\n") < ROWS
    finish(directory, expected)


@pytest.fixture
def torn(whole: Path, tmp_path: Path) -> Path:
    """A copy of the whole run whose last row is half written."""
    directory = tmp_path / "torn"
    shutil.copytree(whole, directory)
    shutil.copy(whole.parent / "tasks.jsonl", tmp_path)
    rows = (directory / "rows.jsonl").read_bytes()
    (directory / "rows.jsonl").write_bytes(rows[: rows[:-1].rfind(b"\n") + 900])
    return directory


def test_a_torn_row_runs_again(torn: Path, whole: Path) -> None:
    bench = finish(torn, contents(whole))
    assert "Cut a half-written row off rows.jsonl; it runs again." in bench.err
    assert lines_of(torn / "rows.jsonl")[-1]["session"] == 1


@pytest.mark.parametrize(
    ("reader", "how"),
    [
        (leave_torn_lines, "line 8: not a row"),
        (skip_torn_lines, r"line 1 column \d+"),  # a half line and a whole one became one that is no JSON
        (accept_torn_lines, r"line 1 column \d+"),  # the half line is still there
    ],
)
def test_a_wrong_reader_of_torn_rows_is_noticed(reader: Callable[[], None], how: str, torn: Path, whole: Path) -> None:
    """Negative control."""
    with pytest.raises((AssertionError, ValueError), match=how):
        finish(torn, contents(whole), reader)


# a full disk


def run_on_small_disk(folder: Path, size: int) -> tuple[Bench, Path]:
    """A run on a file system of ``size`` bytes, and a copy of what it left there."""
    disk, saved = folder / "disk", folder / f"saved-{size}"
    bench = Bench(
        folder,
        *RUN,
        "disk/run",
        "--quiet",
        prepare=[partial(mount_small_disk, disk, size), wait_for_rows],
        after=partial(copy_out, disk, saved),
    )
    bench.process.join()
    if "Operation not permitted" in bench.err or "Permission denied" in bench.err:
        pytest.skip("this system lets no user mount a file system")
    return bench, saved / "run"


def check_broken_off(bench: Bench, expected: Contents, directory: Path) -> None:
    """It said so in one sentence, and what it left is whole rows of the run that can be finished elsewhere."""
    assert bench.wait() == 1
    (sentence,) = bench.err.splitlines()
    assert sentence.startswith("error: ") and ".jsonl cannot be written: " in sentence
    assert "Go on with: python -m rrm_engine.bench --resume" in bench.out
    assert (directory / "rows.jsonl").read_bytes() == finished(directory)
    assert 0 < len(lines_of(directory / "rows.jsonl")) < ROWS
    finish(directory, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="needs user namespaces")
@pytest.mark.parametrize("kilobytes", [24, 40])
def test_a_full_disk(kilobytes: int, folder: Path, whole: Path) -> None:
    bench, left = run_on_small_disk(folder, kilobytes * 1024)
    shutil.copy(folder / "tasks.jsonl", left.parent)
    check_broken_off(bench, contents(whole), left)
    assert "No space left on device" in bench.err


def test_a_file_that_cannot_grow(folder: Path, whole: Path) -> None:
    bench = Bench(folder, *RUN, "limited", "--quiet", prepare=[partial(limit_files, 15_000), wait_for_rows])
    check_broken_off(bench, contents(whole), folder / "limited")


def test_rows_that_go_before_their_events_are_noticed(folder: Path, whole: Path) -> None:
    """Negative control: the events of the row that filled the disk are missing."""
    sabotage: Steps = [partial(limit_files, 15_000), wait_for_rows, write_rows_before_events]
    bench = Bench(folder, *RUN, "wrong order", "--quiet", prepare=sabotage)
    with pytest.raises(AssertionError, match="a row lacks events"):
        check_broken_off(bench, contents(whole), folder / "wrong order")


def test_a_disk_without_room_for_the_settings_is_left_as_it_was(folder: Path) -> None:
    bench = Bench(folder, *RUN, "no room", prepare=[partial(limit_files, 1000)])
    assert bench.wait() == 2
    assert bench.err == "Loading embedded ...\nerror: no room/run.json cannot be written: File too large\n"
    assert not (folder / "no room").exists()


# too little memory, and forwards that fail


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the address space")
def test_a_pool_that_cannot_be_allocated_is_refused(folder: Path) -> None:
    """Whatever seems to be free: here the process may not take it."""
    limit, argv = partial(limit_memory, 100 << 20), ("--kv-blocks", "20000", "--out", "limited memory")
    bench = Bench(folder, *argv, prepare=[limit])
    assert bench.wait() == 2
    assert bench.err.startswith("Loading embedded ...\nerror: 20,000 KV blocks take 937.5 MiB and ")
    assert " MiB are free on cpu: --kv-blocks may be " in bench.err
    surprised = Bench(folder, *argv, prepare=[limit, overlook_limits])
    assert surprised.wait() == 2
    reason = "20,000 KV blocks take 937.5 MiB, more than cpu gives: give a smaller number as --kv-blocks"
    assert surprised.err == f"Loading embedded ...\nerror: {reason}\n"
    broken = Bench(folder, *argv, prepare=[limit, overlook_limits, let_allocations_fail])  # negative control
    assert broken.wait() == 1 and "RuntimeError: " in broken.err
    assert not (folder / "limited memory").exists()


def test_what_counts_as_out_of_memory() -> None:
    def of(act: Callable[[], object]) -> BaseException:
        with pytest.raises(Exception) as caught:
            act()
        return caught.value

    assert is_out_of_memory(of(lambda: torch.empty(1 << 50)))
    assert is_out_of_memory(of(lambda: bytearray(1 << 60)))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert not is_out_of_memory(of(lambda: torch.empty(-1)))
    assert not is_out_of_memory(OSError(errno.ENOSPC, "No space left on device"))
    assert not is_out_of_memory(ValueError("out of memory"))


def running(directory: Path, job: str, step: int) -> list[str]:
    """The nodes of ``job`` that decode in a step, by the events before it."""
    nodes: dict[str, None] = {}
    for event in lines_of(directory / "trace.jsonl"):
        if event["job"] == job and event["step"] < step:
            if event["event"] in ("start", "resume"):
                nodes[event["node"]] = None
            elif event["event"] == "pause":
                nodes.pop(event["node"], None)
    return list(nodes)


@pytest.mark.parametrize("memory", [True, False], ids=["out of memory", "another error"])
def test_a_forward_that_fails_costs_its_row_only(memory: bool, folder: Path, whole: Path) -> None:
    job, directory = "a/rrm/0", folder / f"failed {memory}"
    starts = [e["step"] for e in lines_of(whole / "trace.jsonl") if e["job"] == job and e["event"] == "start"]
    step = max(starts) + 5
    bench = Bench(folder, *RUN, directory.name, prepare=[partial(fail_forward, step, memory)])
    assert bench.wait() == 1
    assert "Traceback" not in bench.err
    assert "1 row with an error" in bench.out
    (row,) = [row for row in lines_of(directory / "rows.jsonl") if row["error"]]
    assert (row_key(cast(Row, row)), row["status"], row["correct"]) == (job, "failed", False)
    nodes = running(whole, job, step)
    assert len(nodes) == 3
    sentence = r"out of memory on cpu in a step of (.+): lower --kv-blocks \(now 500\) or --step-tokens \(now 512\): .*"
    found = re.match(sentence if memory else r"RuntimeError in a step of (.+): Trying to create tensor", row["error"])
    assert found, row["error"]
    assert sorted(found[1].split(", ")) == sorted(nodes)
    others, expected = contents(directory), contents(whole)
    del others[job], expected[job]
    assert others == expected


# told to end

COLD = [sys.executable, "-m", "rrm_engine.bench"]
BROKEN_OFF = r"Go on with: python -m rrm_engine\.bench --resume ('?)[\w -]+\1( --quiet)?\n"


@pytest.mark.parametrize("after", [0.4, 1.5])
def test_an_interrupt_while_everything_is_imported(after: float, folder: Path) -> None:
    """A process of its own from the first moment on, as a user's is."""
    process = subprocess.Popen(
        [*COLD, *RUN, "never"], cwd=folder, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
    )
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] in ("Interrupted.", "Interrupted before the first row.")
    assert "Traceback" not in err and not (folder / "never").exists()


@pytest.mark.parametrize(
    ("number", "times", "code"), [(signal.SIGINT, 3, 130), (signal.SIGTERM, 1, 143), (signal.SIGHUP, 2, 129)]
)
def test_a_signal_between_rows(number: int, times: int, code: int, folder: Path, whole: Path) -> None:
    directory, rows = folder / f"signal {number}", folder / f"signal {number}" / "rows.jsonl"
    at_a_row: Steps = [hear_interrupts, partial(signal_itself, "rrm_engine.runs.directory:RunDir.add", number, times)]
    bench = Bench(folder, *RUN, directory.name, prepare=at_a_row)
    assert bench.wait() == code
    assert "Traceback" not in bench.err and "error" not in bench.err
    assert re.search(BROKEN_OFF, bench.out), bench.out
    assert 0 < len(lines_of(rows)) < ROWS
    finish(directory, contents(whole))


LOAD = "rrm_engine.backends.local:Solver.load"


@pytest.mark.parametrize("swallow", [False, True])
def test_an_interrupt_while_loading(swallow: bool, folder: Path, torn: Path) -> None:
    at_load: Steps = [hear_interrupts, partial(signal_itself, LOAD, signal.SIGINT, 1, swallow)]
    bench = Bench(folder, *RUN, "not begun", prepare=at_load)
    assert bench.wait() == 130
    assert bench.err.endswith("Interrupted before the first row.\n") and bench.out == ""
    assert not (folder / "not begun").exists()
    bench = Bench(torn.parent, "--resume", torn.name, "--quiet", prepare=at_load)
    assert bench.wait() == 130
    assert f"Interrupted before another row; {ROWS - 1} rows in {torn.name} are done.\n" in bench.err
    assert re.search(BROKEN_OFF, bench.err) and bench.out == ""
    assert len(lines_of(torn / "rows.jsonl")) == ROWS - 1


@pytest.mark.parametrize("where", ["rrm_engine.bench.cli:print_closing", "rrm_engine.bench.cli:summarise"])
def test_interrupts_while_the_table_is_printed(where: str, folder: Path, whole: Path) -> None:
    prepare: Steps = [hear_interrupts, partial(signal_itself, where, signal.SIGINT, 3)]
    bench = Bench(folder, "--resume", "whole", prepare=prepare)
    assert bench.wait() == 130
    assert bench.err == "" and "Headline" in bench.out and "Written to whole" in bench.out
    assert "Go on with" not in bench.out


# output that cannot be written

LOST: dict[str, tuple[Callable[[], None], str]] = {
    "a full stdout": (partial(replace_stream, 1, "/dev/full"), "standard output cannot be written: No space left on"),
    "a closed stdout": (partial(replace_stream, 1, None), "standard output cannot be written: Bad file descriptor"),
    "a stdout without a reader": (partial(lose_reader, 1), ""),
    "a full stderr": (partial(replace_stream, 2, "/dev/full"), ""),
    "a closed stderr": (partial(replace_stream, 2, None), ""),
    "a stderr without a reader": (partial(lose_reader, 2), ""),
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("name", LOST)
def test_output_that_is_lost_costs_no_row(name: str, folder: Path, torn: Path, whole: Path) -> None:
    lose, sentence = LOST[name]
    bench = Bench(torn.parent, "--resume", torn.name, prepare=[lose])
    assert bench.wait() == 0
    assert contents(torn) == contents(whole)
    assert (torn / "summary.json").exists()
    assert "Traceback" not in bench.err
    if "stdout" in name:
        said = [line for line in bench.err.splitlines() if line.startswith("error: ")]
        assert len(said) == bool(sentence) and sentence in "".join(said)
    else:
        assert "Headline" in bench.out


def test_a_bug_is_said_in_one_sentence_and_its_traceback_is_kept(folder: Path, whole: Path) -> None:
    """As where torch raises a ValueError: it is no complaint about what the user has asked for."""
    bug = partial(raise_at, "rrm_engine.backends.local:Solver.load")
    bench = Bench(folder, *RUN, "bug", prepare=[bug])
    assert bench.wait() == 1
    found = re.fullmatch(r"Loading .*\nerror: ValueError: shapes \(a bug\); its traceback is in (\S+)\n", bench.err)
    assert found, bench.err
    assert "in raising" in Path(found[1]).read_text()
    Path(found[1]).unlink()
    assert not (folder / "bug").exists()
    bug = partial(raise_at, "rrm_engine.bench.rows:RowWriter.put")
    bench = Bench(folder, *RUN, "bug", prepare=[bug])
    assert bench.wait() == 1
    assert "error: ValueError: shapes (a bug); its traceback is in bug/errors.log\n" in bench.err
    assert "in raising" in (folder / "bug/errors.log").read_text()
    assert re.search(BROKEN_OFF, bench.out) and "errors.log" in bench.out
    finish(folder / "bug", contents(whole))

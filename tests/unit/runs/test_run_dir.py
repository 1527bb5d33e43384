"""The run directory: nothing finished is lost or doubled, whatever ends the process and wherever."""

import json
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import by_hand
import pytest

from rrm_engine.bench.run import plan
from rrm_engine.bench.tasks import Task
from rrm_engine.config import RunConfig
from rrm_engine.runs.directory import RunDir, RunDirError, mend_tail
from rrm_engine.runs.rows import Row, row_key

HELPED = f"import sys; sys.path.append({str(Path(by_hand.__file__).parent)!r})\n"
TASKS = [Task(str(i), f"problem {i}") for i in range(4)]


def row(task: int, mode: str = "direct", text: str = "") -> Row:
    return by_hand.row(str(task), mode, text or "Größe\u2028x\nFINAL: 7")


def filled(path: Path, rows: int = 3) -> RunDir:
    directory = RunDir.create(path)
    directory.write_manifest(by_hand.manifest())
    for number in range(rows):
        directory.event({"t": 0.5, "job": f"{number}/direct/0", "event": "start"})
        directory.add(row(number))
    return directory


class Watched:
    """A file that counts how often it is called while somebody else calls it."""

    def __init__(self, file: Any) -> None:
        self.file, self.busy, self.met = file, False, 0
        self.close = file.close

    def write(self, text: str) -> None:
        self._alone(lambda: self.file.write(text))

    def flush(self) -> None:
        self._alone(self.file.flush)

    def _alone(self, do: Callable[[], Any]) -> None:
        self.met += self.busy
        self.busy = True
        time.sleep(0.001)
        do()
        self.busy = False


def test_events_and_flushes_of_two_threads_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Watched] = []
    real = Path.open

    def opening(self: Path, *args: Any, **options: Any) -> Any:
        file = real(self, *args, **options)
        if self.name != "trace.jsonl":
            return file
        opened.append(Watched(file))
        return opened[-1]

    monkeypatch.setattr(Path, "open", opening)
    directory = filled(tmp_path / "run", 0)

    def flush() -> None:
        for _ in range(40):
            directory.flush()

    flushing = threading.Thread(target=flush)
    flushing.start()
    for number in range(40):
        directory.event({"t": 0.5, "job": f"{number}/direct/0", "event": "start"})
    flushing.join()
    directory.close()
    assert [file.met for file in opened] == [0]


def test_rows_and_events_come_back(tmp_path: Path) -> None:
    filled(tmp_path / "run").close()
    directory = RunDir.resume(tmp_path / "run")
    assert directory.rows == [row(0), row(1), row(2)]
    assert (directory.session, directory.cut) == (1, 0)
    directory.event({"event": "again"})
    directory.close()
    events = [json.loads(line) for line in (tmp_path / "run/trace.jsonl").read_text().splitlines()]
    assert [event["session"] for event in events] == [0, 0, 0, 1]


def test_a_row_and_its_events_are_on_disk_at_once(tmp_path: Path) -> None:
    directory = filled(tmp_path / "run", rows=1)
    assert json.loads((tmp_path / "run/rows.jsonl").read_text(encoding="utf-8")) == row(0)
    assert (tmp_path / "run/trace.jsonl").read_text().count("\n") == 1
    directory.close()


def test_every_cut_of_the_last_line_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "run"
    filled(path).close()
    whole = (path / "rows.jsonl").read_bytes()
    last = whole[:-1].rfind(b"\n") + 1
    for end in range(last, len(whole) + 1):
        (path / "rows.jsonl").write_bytes(whole[:end])
        directory = RunDir.resume(path)
        complete = end >= len(whole) - 1  # with or without the line break, the row is finished
        assert [row_key(r) for r in directory.rows] == ["0/direct/0", "1/direct/0", "2/direct/0"][: 2 + complete]
        assert directory.cut == (last < end < len(whole) - 1)
        if not complete:
            directory.add(row(2))
        directory.close()
        assert (path / "rows.jsonl").read_bytes() == whole


def test_a_last_line_of_zeros_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\0\0\0\0\n')
    assert mend_tail(path) is True
    assert path.read_bytes() == b'{"a": 1}\n'


def test_a_last_line_longer_than_one_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "' + b"x" * 1_000_000)
    assert mend_tail(path) is True
    assert path.read_bytes() == b'{"a": 1}\n'
    path.write_bytes(b"x" * 1_000_000)
    assert mend_tail(path) is True
    assert path.read_bytes() == b""
    assert mend_tail(path) is False


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run"
    filled(path).close()
    lines = (path / "rows.jsonl").read_bytes().split(b"\n")
    (path / "rows.jsonl").write_bytes(b"\n".join([lines[0], b"oops", lines[2], b""]))
    with pytest.raises(RunDirError, match="line 2"):
        RunDir.resume(path)


def test_doubled_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "run"
    directory = filled(path)
    directory.add(row(1))
    directory.close()
    with pytest.raises(RunDirError, match="lines 2 and 4 are both 1/direct/0"):
        RunDir.resume(path)


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    directory = filled(tmp_path / "run")
    with pytest.raises(RunDirError, match="Another process"):
        RunDir.resume(tmp_path / "run")
    directory.close()
    RunDir.resume(tmp_path / "run").close()


def test_a_directory_in_use_or_unwritable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    with pytest.raises(RunDirError, match="not empty"):
        RunDir.create(tmp_path / "full")
    with pytest.raises(RunDirError, match="is a file"):
        RunDir.create(tmp_path / "full/x")
    with pytest.raises(RunDirError, match="cannot be written"):
        RunDir.create(tmp_path / "full/x/y")
    with pytest.raises(RunDirError, match=r"no run\.json"):
        RunDir.resume(tmp_path / "full")


KILLED = """
    import os, signal, sys
    from pathlib import Path
    import by_hand
    from rrm_engine.runs.directory import RunDir
    directory = RunDir.create(Path(sys.argv[1]))
    if sys.argv[2] == "while run.json is written":
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        directory.write_manifest(by_hand.manifest())
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("when", ["before run.json", "while run.json is written"])
def test_a_run_killed_before_its_manifest_leaves_a_directory_to_start_in(tmp_path: Path, when: str) -> None:
    path = tmp_path / "run"
    killed = subprocess.run([sys.executable, "-c", HELPED + textwrap.dedent(KILLED), str(path), when], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = {file.name for file in path.iterdir()}
    assert left == {"rows.jsonl", "trace.jsonl"} | ({"run.json.tmp"} if when.startswith("while") else set())
    with pytest.raises(RunDirError, match=rf"no run\.json, so .* start one in it by --out {path}"):
        RunDir.resume(path)
    with pytest.raises(RunDirError, match="Another process"), closing(RunDir.create(path)):
        RunDir.create(path)
    filled(path).close()
    directory = RunDir.resume(path)
    assert directory.rows == [row(0), row(1), row(2)]
    directory.close()
    assert {file.name for file in path.iterdir()} == {"run.json", "rows.jsonl", "trace.jsonl"}


@pytest.mark.parametrize("name", ["rows.jsonl", "trace.jsonl", "run.json", "notes.txt"])
def test_a_directory_with_something_to_lose_is_not_started_in(tmp_path: Path, name: str) -> None:
    for file in ("rows.jsonl", "trace.jsonl"):
        (tmp_path / file).touch()
    (tmp_path / name).write_text('{"id": "0"}\n')
    before = {file.name: file.read_text() for file in tmp_path.iterdir()}
    with pytest.raises(RunDirError, match="not empty"):
        RunDir.create(tmp_path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before


def test_discard_removes_only_what_create_made(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "new").discard()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    RunDir.create(tmp_path / "old").discard()
    assert list((tmp_path / "old").iterdir()) == []
    filled(tmp_path / "used").discard()
    assert (tmp_path / "used/rows.jsonl").stat().st_size > 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
def test_a_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    script = """
        import resource, sys
        from pathlib import Path
        import by_hand
        from rrm_engine.runs.directory import RunDir, RunDirError
        directory = RunDir.create(Path(sys.argv[1]))
        directory.write_manifest(by_hand.manifest())
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        try:
            for number in range(100):
                directory.add(by_hand.row(str(number), "rrm", "x" * 100))
        except RunDirError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", HELPED + textwrap.dedent(script), str(tmp_path / "run")], capture_output=True, text=True
    )
    assert "rows.jsonl cannot be written: File too large" in done.stdout, done.stderr
    directory = RunDir.resume(tmp_path / "run")
    assert 0 < len(directory.rows) < 10 and directory.cut == 0
    directory.close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_killed_over_and_over_every_row_comes_once(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        import by_hand
        from rrm_engine.runs.directory import RunDir
        path = Path(sys.argv[1])
        directory = RunDir.resume(path)
        for number in range(len(directory.rows), 400):
            directory.event({"t": number, "event": "x" * 500})
            directory.add(by_hand.row(str(number), "rrm", "x" * 20000))
    """
    path = tmp_path / "run"
    filled(path, rows=0).close()
    for attempt in range(30):
        process = subprocess.Popen([sys.executable, "-c", HELPED + textwrap.dedent(script), str(path)])
        time.sleep(0.05 + 0.01 * attempt)
        process.kill()
        process.wait()
    subprocess.run([sys.executable, "-c", HELPED + textwrap.dedent(script), str(path)], check=True)
    directory = RunDir.resume(path)
    assert [r["id"] for r in directory.rows] == [str(number) for number in range(400)]
    directory.close()
    assert all(json.loads(line) for line in (path / "trace.jsonl").read_text().splitlines())


def test_modes_alternate_pair_by_pair() -> None:
    jobs = plan(TASKS, RunConfig())
    assert [(job.id, job.mode) for job in jobs[:6]] == [
        ("0", "direct"),
        ("0", "rrm"),
        ("1", "rrm"),
        ("1", "direct"),
        ("2", "direct"),
        ("2", "rrm"),
    ]


def test_samples_of_a_task_alternate_too() -> None:
    jobs = plan(TASKS[:1], RunConfig(samples=2))
    assert [(job.sample, job.mode) for job in jobs] == [(0, "direct"), (0, "rrm"), (1, "rrm"), (1, "direct")]


def test_the_plan_leaves_out_what_is_done() -> None:
    config = RunConfig(samples=3)
    everything = plan(TASKS, config)
    done = [by_hand.row(job.id, job.mode, sample=job.sample) for job in everything[::3]]
    missing = plan(TASKS, config, done)
    assert len(missing) + len(done) == len(everything) == len({job.key for job in everything}) == 24
    assert {job.key for job in missing}.isdisjoint(map(row_key, done))

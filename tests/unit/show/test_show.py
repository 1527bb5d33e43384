"""What ``show`` says of runs: whole ones, broken ones, and one that goes on."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import by_hand
import pytest
from recorded_runs import row, save
from scripted import Scripted, Text, pieces, solve

from rrm_engine.graph.types import EndReason
from rrm_engine.runs.directory import FLUSH_S, RunDir, is_written
from rrm_engine.runs.reader import Appended
from rrm_engine.show.cli import main
from rrm_engine.show.follow import PAUSE_S
from rrm_engine.solver.result import Job

THOUGHT = "<think>" + "so " * 100 + "</think>\n"
PLAN = THOUGHT + (
    '{"type":"child","id":"a","task":"one"}\n{"type":"child","id":"b","task":"\\u001b[31mtwo","depends_on":["a"]}\n'
    '{"type":"await"}\n'
)
EVIL = '\x1b]0;title\x07 [red]x[/red]\n{"type":"atomic","answer":"FINAL: 2"}'
SCRIPT = {
    "root": [Text(pieces(PLAN)), Text(pieces('{"type":"atomic","answer":"FINAL: 3"}'))],
    "root.a": [Text(pieces('{"type":"atomic","answer":"FINAL: 1"}'))],
    "root.b": [Text(pieces(EVIL))],
}
SILENT = {"root": [Text([], EndReason.LENGTH)], "root!direct": [Text(pieces("FINAL: 7"))]}


def events_of(*jobs: Job) -> list[dict[str, Any]]:
    _, events = solve(Scripted({"t": SCRIPT, "s": SILENT}), jobs, concurrency=1)
    return events


def recorded(path: Path, events: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> Path:
    save(path, rows)
    (path / "trace.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    jobs = [Job("t", "Add one and two."), Job("s", "Say seven.")]
    return recorded(tmp_path_factory.mktemp("show") / "run", events_of(*jobs), [row("t", "rrm"), row("s", "rrm")])


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What the command prints for the arguments."""

    def say(*argv: object, code: int = 0) -> str:
        assert main([str(arg) for arg in argv]) == code
        out, err = capsys.readouterr()
        found = out + err
        assert all(char.isprintable() or char == "\n" for char in found)
        return found

    return say


def test_rows_and_their_trees(run: Path, said: Callable[..., str]) -> None:
    assert [line.split(":")[0] for line in said(run).splitlines()] == ["t/rrm/0", "s/rrm/0"]
    tree = said(run, "t")
    assert [line.split("root")[1][:2] for line in tree.splitlines() if "── root" in line] == ["  ", ".a", ".b"]
    for part in ("Add one and two.", "task: one", "answer: FINAL: 3", "answer: FINAL: 1", "[thought, 31", "after: a"):
        assert part in tree
    assert "\\x1b[31mtwo" in tree and "[red]x[/red]" in tree and "so so" not in tree
    fallback = said(run, "s/rrm")
    assert "ended by length" in fallback and "root!direct" in fallback and "FINAL: 7" in fallback


def test_a_node_is_shown_with_all_that_it_was_told_and_wrote(run: Path, said: Callable[..., str]) -> None:
    root = said(run, "t", "--node", "root")
    assert root.index("-- system") < root.index("-- prompt") < root.index("so so so") < root.index("-- told")
    assert "a = 1" in root.split("-- told")[1] and root.rstrip().endswith("-- answer\nFINAL: 3")
    assert "\\x1b]0;title" in said(run, "t", "--node", "root.b")


@pytest.mark.parametrize("kept", range(0, 24, 3))
def test_what_is_left_of_a_run_that_broke_off(tmp_path: Path, kept: int, said: Callable[..., str]) -> None:
    whole = events_of(Job("t", "Add one and two."))
    broken = recorded(tmp_path / "run", whole[:kept], [])
    with (broken / "trace.jsonl").open("a") as file:
        file.write('{"t": 1, "jo')
    if not kept:
        assert "Nothing has begun" in said(broken)
        return
    assert "no row" in said(broken) and "no row" in said(broken, "t")
    paths = list(dict.fromkeys(event["node"] for event in whole[:kept]))
    for path in paths[1:]:
        assert path in said(broken, "t") and path in said(broken, "t", "--node", path)


def test_refusals(run: Path, tmp_path: Path, said: Callable[..., str]) -> None:
    assert "ROW nope: there is no such job; there are t/rrm/0, s/rrm/0" in said(run, "nope", code=2)
    assert "--node root.x: there is no such node; there are root, root.a" in said(run, "t", "--node", "root.x", code=2)
    assert "name one row with it" in said(run, "--node", "root", code=2)
    assert "leave --node out" in said(run, "--node", "root", "--follow", code=2)
    assert "holds no run.json" in said(tmp_path, code=2)
    bare = save(tmp_path / "bare", [row("t", "rrm")])
    listed, without = said(bare).splitlines()
    assert (
        listed.startswith("t/rrm/0: graph, correct") and without == "It holds no trace.jsonl, and so nothing of nodes."
    )
    assert "holds no trace.jsonl" in said(bare, "t", code=2)
    with (recorded(tmp_path / "run", [], []) / "trace.jsonl").open("a") as file:
        file.write("[]\n")
    assert "line 1: not what a run writes there" in said(tmp_path / "run", code=2)


def test_a_run_is_followed_to_its_end(tmp_path: Path, said: Callable[..., str]) -> None:
    """Events are told of before their row is there, and within a second although nothing follows them."""
    path, events = tmp_path / "run", events_of(Job("t", "Add one and two."))
    directory = RunDir.create(path)
    directory.write_manifest(by_hand.manifest())
    manifest = json.loads((path / "run.json").read_text())
    manifest["settings"] = {"modes": ["rrm"], "samples": 1}
    (path / "run.json").write_text(json.dumps(manifest))
    code = "import sys; from rrm_engine.show.cli import main; sys.exit(main(sys.argv[1:]))"
    following = subprocess.Popen(
        [sys.executable, "-c", code, str(path), "--follow"], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert following.stdout is not None
    lines: list[str] = []
    reading = threading.Thread(target=lambda: lines.extend(following.stdout or ()))
    reading.start()
    for event in events[:-1]:
        directory.event(event)
    time.sleep(FLUSH_S)
    directory.flush()  # as the writer of rows does while it has nothing to write
    until = time.monotonic() + 60
    while not any("FINAL: 3" in line for line in lines):
        assert time.monotonic() < until and following.poll() is None, lines
        time.sleep(0.05)
    directory.event(events[-1])
    directory.add(row("t", "rrm"))
    assert following.wait(60) == 0
    reading.join()
    directory.close()
    told = "".join(lines)
    assert told.index("begins: Add") < told.index("root declares a: one") < told.index("root.a concludes: FINAL: 1")
    assert told.index("root goes on to continue with root.a, root.b") < told.index("t/rrm/0: graph, correct")
    assert "\x1b" not in told and said(path, "--follow") == told


def test_a_run_that_loads_its_model_is_waited_for(tmp_path: Path, said: Callable[..., str]) -> None:
    directory = RunDir.create(tmp_path / "run")
    assert "holds no run.json yet: its run is about to begin" in said(tmp_path / "run", code=2)

    def go_on() -> None:
        time.sleep(3 * PAUSE_S)
        directory.write_manifest(by_hand.manifest())
        directory.close()

    loading = threading.Thread(target=go_on)
    loading.start()
    assert said(tmp_path / "run", "--follow") == ""  # it has no modes, and so no rows
    loading.join()
    RunDir.create(tmp_path / "ended").close()
    assert "was ended before it did" in said(tmp_path / "ended", "--follow", code=2)


def test_what_is_written_between_two_looks_is_told_of(
    tmp_path: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends right after the follower's first look at whatever it looks at first: events before their row."""
    events = events_of(Job("t", "Add one and two."))
    directory = RunDir.create(tmp_path / "run")
    manifest = by_hand.manifest()
    manifest.settings.update(modes=["rrm"], samples=1)
    directory.write_manifest(manifest)

    def ending(look: Callable[[Appended], Any]) -> Callable[[Appended], Any]:
        def looked(self: Appended) -> Any:
            found = look(self)
            while events:
                directory.event(events.pop(0))
                if not events:
                    directory.add(row("t", "rrm"))
                    directory.close()
            return found

        return looked

    monkeypatch.setattr(Appended, "rows", ending(Appended.rows))
    monkeypatch.setattr(Appended, "events", ending(Appended.events))
    told = said(tmp_path / "run", "--follow")
    assert told.index("begins: Add") < told.index("FINAL: 3") < told.index("t/rrm/0: graph, correct")


WRITER = """
import json, sys, time
from pathlib import Path
from rrm_engine.runs.directory import RunDir
import by_hand
directory = RunDir.create(Path(sys.argv[1]))
manifest = by_hand.manifest()
manifest.settings.update(modes=["rrm"], samples=1)
directory.write_manifest(manifest)
for event in json.loads(sys.stdin.readline()):
    directory.event(event)
directory.flush()
print("there", flush=True)
time.sleep(600)
"""


def test_following_ends_when_the_writer_is_killed(tmp_path: Path) -> None:
    """And not before that, however long nothing comes."""
    events = events_of(Job("t", "Add one and two."))[:9]
    support = str(Path(by_hand.__file__).parent)
    writer = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.append({support!r})\n{WRITER}", str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdin and writer.stdout
    writer.stdin.write(json.dumps(events) + "\n")
    writer.stdin.flush()
    assert writer.stdout.readline() == "there\n"
    command = [sys.executable, "-m", "rrm_engine.show", str(tmp_path / "run"), "--follow"]
    following = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert following.stdout and "begins: Add" in following.stdout.readline()
    time.sleep(5 * PAUSE_S)
    assert following.poll() is None
    writer.kill()
    writer.communicate()
    out, err = following.stdout.read(), following.stderr.read() if following.stderr else ""
    assert following.wait(60) == 1 and "declares a" in out
    assert "over without its last 1 row" in err and "--resume" in err and err.count("\n") == 1
    RunDir.resume(tmp_path / "run").close()


def test_looking_for_the_writer_keeps_nobody_from_writing(tmp_path: Path) -> None:
    RunDir.create(tmp_path / "run").close()
    (tmp_path / "run" / "run.json").write_text(json.dumps(by_hand.manifest().as_json()))
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            is_written(tmp_path / "run")
            done.wait(0.002)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        for _ in range(20):
            directory = RunDir.resume(tmp_path / "run")
            assert is_written(tmp_path / "run")
            directory.close()
    finally:
        done.set()
        looking.join()
    assert not is_written(tmp_path / "run")


def test_the_bench_puts_events_on_the_disk_while_no_row_comes(tmp_path: Path) -> None:
    from rrm_engine.bench.progress import SilentDisplay
    from rrm_engine.bench.rows import RowWriter

    directory = RunDir.create(tmp_path / "run")
    with RowWriter(directory, SilentDisplay(), {}, {}):
        directory.event({"event": "x"})
        until = time.monotonic() + 60
        while not (tmp_path / "run" / "trace.jsonl").stat().st_size:
            assert time.monotonic() < until
            time.sleep(0.05)
    directory.close()

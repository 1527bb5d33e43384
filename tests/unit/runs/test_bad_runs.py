"""Every command that reads a run, on runs in a bad state: it does its work, or says in one sentence why it cannot."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("scipy")

from rrm_engine import runs
from rrm_engine.bench.cli import main as bench
from rrm_engine.bench.tasks import load_tasks
from rrm_engine.errors import RrmError
from rrm_engine.runs.reader import chosen_jobs

IDS = ("t/1", "ü,2")
DEEP = b"[" * 100_000 + b"\n"
HUGE, NAN = 10**400, float("nan")
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows in each mode of the packaged model, under names that are hard to write."""
    folder = tmp_path_factory.mktemp("bad")
    tasks = load_tasks("embedded").tasks[:2]
    lines = [{"id": id, "problem": task.problem, "answer": task.expected} for id, task in zip(IDS, tasks, strict=True)]
    (folder / "tasks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = folder / "läuft\x1b[31m nicht\n"
    assert bench([str(folder / "tasks.jsonl"), "--quiet", "--out", str(path)]) == 0
    return path


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / whole.name))


def manifest(**fields: Any) -> Spoil:
    """Other fields in run.json, in ``resolved`` if they are there."""

    def spoil(run: Path) -> None:
        found = json.loads((run / "run.json").read_text())
        for name, value in fields.items():
            (found["resolved"] if name in ("model", "block_size") else found)[name] = value
        (run / "run.json").write_text(json.dumps(found))

    return spoil


def lines(name: str, change: Callable[[list[dict[str, Any]]], object]) -> Spoil:
    """Other objects in a file; ``change`` changes their list."""

    def spoil(run: Path) -> None:
        found = [json.loads(line) for line in (run / name).open()]
        change(found)
        (run / name).write_text("".join(json.dumps(value) + "\n" for value in found))

    return spoil


def rows(**fields: Any) -> Spoil:
    return lines("rows.jsonl", lambda found: [row.update(fields) for row in found])


def events(**fields: Any) -> Spoil:
    return lines("trace.jsonl", lambda found: [event.update(fields) for event in found])


def without(name: str, *fields: str) -> Spoil:
    return lines(name, lambda found: [value.pop(field, None) for value in found for field in fields])


def cut(name: str, share: float) -> Spoil:
    return lambda run: (run / name).write_bytes((run / name).read_bytes()[: int((run / name).stat().st_size * share)])


def put(name: str, data: bytes) -> Spoil:
    return lambda run: (run / name).write_bytes(data)


def gone(name: str) -> Spoil:
    return lambda run: (run / name).unlink(missing_ok=False)


def as_directory(name: str) -> Spoil:
    def spoil(run: Path) -> None:
        (run / name).unlink()
        (run / name).mkdir()

    return spoil


def emptied(run: Path) -> None:
    for path in run.iterdir():
        path.unlink()


ADDED = ("task", "cut", "critical_path_steps", "drafted", "accepted", "spliced_tokens", "text_joins", "session")
BAD: dict[str, Spoil] = {
    "nothing in it": emptied,
    "no settings": gone("run.json"),
    "no rows file": gone("rows.jsonl"),
    "no trace": gone("trace.jsonl"),
    "settings cut": cut("run.json", 0.6),
    "settings too deep": put("run.json", DEEP),
    "settings of another version": manifest(format=2),
    "settings in disorder": manifest(settings=None),
    "odd hardware": manifest(hardware={"gpus": [1, "x"], "cpu": 7}, versions={"torch": None}, git={}),
    "gpus that are no list": manifest(hardware={"gpus": 5}),
    "another block size": manifest(block_size="16"),
    "a model that is no name": manifest(model=["a"]),
    "verdict too deep": put("verify.json", DEEP),
    "rows cut in a line": cut("rows.jsonl", 0.7),
    "no whole row": cut("rows.jsonl", 0.1),
    "no row": put("rows.jsonl", b""),
    "rows too deep": put("rows.jsonl", DEEP),
    "rows twice": lines("rows.jsonl", lambda found: found.extend(list(found))),
    "rows of an older version": without("rows.jsonl", *ADDED),
    "rows of another version": without("rows.jsonl", "latency_s"),
    "rows without a time": rows(latency_s=NAN),
    "rows that took no time": rows(latency_s=0.0, total_tokens=0, critical_path_tokens=0),
    "rows that took too long": rows(latency_s=HUGE),
    "rows of too many tokens": rows(total_tokens=HUGE),
    "rows of servers in disorder": rows(servers={"replicas": 5}),
    "rows whose counts are none": rows(cut={"x": "y"}, repairs={"x": None}),
    "rows of another mode": rows(mode="other"),
    "ids that do not print": rows(id="\ud800\x1b[31m<b>"),
    "rows are a directory": as_directory("rows.jsonl"),
    "trace cut in a line": cut("trace.jsonl", 0.6),
    "no event": put("trace.jsonl", b""),
    "trace too deep": put("trace.jsonl", DEEP),
    "trace of zeros": put("trace.jsonl", b"\0" * 100 + b"\n"),
    "trace of an older version": without("trace.jsonl", "text", "prompt", "appended", "system"),
    "trace of another version": without("trace.jsonl", "step"),
    "events without a time": events(t=NAN),
    "events at no time": events(t=float("inf")),
    "events of too many tokens": events(tokens=HUGE),
    "events of a node without a name": events(node=""),
    "events in another order": lines("trace.jsonl", list.reverse),
    "every second event": lines("trace.jsonl", lambda found: found.__setitem__(slice(None), found[::2])),
    "trace is a directory": as_directory("trace.jsonl"),
}


def calls(run: Path, out: Path) -> dict[str, list[object]]:
    return {
        "analyze": [run, "--rows"],
        "show": [run],
        "render": [run, "--out", out / "page.html"],
        "export": [run, "--labels", "headline,direct", "--out", out / "data.jsonl"],
        "trace": [run, "--json", out / "trace.json", "--perfetto", out / "trace.pftrace"],
    }


def called(capsys: pytest.CaptureFixture[str], command: str, argv: Sequence[object]) -> tuple[int, list[str]]:
    """The exit code, and the lines on standard error but for those about rows that are left out."""
    code = import_module(f"rrm_engine.{command}.cli").main([str(word) for word in argv])
    said = capsys.readouterr().err
    assert all(char.isprintable() or char == "\n" for char in said), said
    return code, [line for line in said.splitlines() if not line.startswith("left out: ")]


def test_a_whole_run_is_refused_by_none(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, argv in calls(whole, tmp_path).items():
        assert called(capsys, command, argv) == (0, []), command
    assert set(runs.load(whole).rows["id"]) == set(IDS)


@pytest.mark.parametrize("state", BAD)
def test_one_sentence_or_the_work(state: str, copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    BAD[state](copied)
    for command, argv in calls(copied, tmp_path).items():
        code, said = called(capsys, command, argv)
        assert code in ((0, 1, 2) if command == "trace" else (0, 2)), (command, said)
        assert code != 2 or (len(said) == 1 and said[0].startswith("error: ")), (command, said)
        assert not any("(a bug)" in line for line in said), (command, said)
    try:
        found = runs.load(copied)
        assert len(found.rows) >= 0 and found._repr_html_() and len(found.events) >= len(found.nodes)
    except RrmError:
        pass


def refused(capsys: pytest.CaptureFixture[str], command: str, *argv: object) -> str:
    code, said = called(capsys, command, argv)
    assert code == 2 and len(said) == 1, said
    return said[0]


def test_where_nothing_can_be_written_nothing_is_read(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("rrm_engine.runs.reader._objects", None)
    monkeypatch.setattr("rrm_engine.runs.manifest.json", None)
    flags = {"render": ["out"], "export": ["out"], "trace": ["json", "plot", "perfetto"], "verify": ["json"]}
    for command, named in {**flags, "replay": ["json", "save"]}.items():
        for flag in (f"--{name}" for name in named):
            run = ["--from", whole] if command == "replay" else [whole]
            gone, inside = tmp_path / "none" / "x", tmp_path / "file" / "x"
            assert f"there is no directory {tmp_path / 'none'}" in refused(capsys, command, *run, flag, gone)
            assert "cannot be written" in refused(capsys, command, *run, flag, inside)
            assert "is a directory: name a file in it" in refused(capsys, command, *run, flag, tmp_path)
            assert "is a file of the run in" in refused(capsys, command, *run, flag, whole / "rows.jsonl")
    assert "is a file; pass another" in refused(capsys, "analyze", whole, "--out", tmp_path / "file" / "x" / "y")


def test_what_there_is_not_is_said_before_anything_heavy_is_imported(whole: Path, tmp_path: Path) -> None:
    """Where files are slow, torch alone takes a minute."""
    asked = {command: list(map(str, argv)) for command, argv in calls(tmp_path, tmp_path).items()}
    asked |= {"verify": [str(tmp_path)], "replay": ["--from", str(tmp_path)], "bench": ["--resume", str(tmp_path)]}
    code = f"""if True:
        import sys
        from importlib import import_module
        for name, argv in {asked!r}.items():
            assert import_module(f"rrm_engine.{{name}}.cli").main(argv) == 2, name
        for name in ("analyze", "render", "export", "trace", "verify"):
            argv = [{str(whole)!r}, "--jobs", "nobody", *{asked!r}[name][1:]]
            assert import_module(f"rrm_engine.{{name}}.cli").main(argv) == 2, name
        heavy = {{"torch", "transformers", "numpy", "scipy", "rich"}} & sys.modules.keys()
        assert not heavy, heavy"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert len(said) == 8 + 5 and all(line.startswith("error: ") for line in said), said


def test_jobs_are_chosen_by_every_command(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, data, trace = tmp_path / "page.html", tmp_path / "data.jsonl", tmp_path / "trace.json"
    assert called(capsys, "render", [whole, "--jobs", "t/1", "--out", page]) == (0, [])
    assert '"id":"t/1"' in page.read_text() and "\\u00fc,2" not in page.read_text() and "ü,2" not in page.read_text()
    assert called(capsys, "export", [whole, "--jobs", "t/1/rrm", "--labels", "headline", "--out", data]) == (0, [])
    assert {json.loads(line)["id"] for line in data.open()} == {"t/1"}
    assert called(capsys, "trace", [whole, "--jobs", "t/1/rrm/0", "--json", trace]) == (0, [])
    assert called(capsys, "analyze", [whole, "--jobs", "t/1", "--out", tmp_path]) == (0, [])
    found = json.loads((tmp_path / "analysis.json").read_text())
    assert [row["id"] for row in found["rows"]] == ["t/1", "t/1"] and found["arms"][0]["batch"]["jobs"] == 2
    for command, argv in calls(whole, tmp_path).items():
        if command != "show":
            said = refused(capsys, command, *argv, "--jobs", "t/1,nobody")
            assert "--jobs nobody: there is no such job; there are t/1/direct/0, t/1/rrm/0" in said
    assert "give it with --from" in refused(capsys, "replay", "--jobs", "t/1")


def test_of_several_runs_those_that_have_the_job(whole: Path, copied: Path, tmp_path: Path) -> None:
    lines("rows.jsonl", lambda found: [row.update(id="other") for row in found if row["id"] != "t/1"])(copied)
    assert {run.path for run in read(whole, copied, jobs=["other"])} == {copied}
    assert {run.path for run in read(whole, copied, jobs=["t/1"])} == {whole, copied}


def read(*paths: Path, jobs: Sequence[str]) -> list[Any]:
    from rrm_engine.runs.arms import read_runs

    return read_runs(paths, jobs)


def test_names_of_jobs() -> None:
    keys = ["a/b/direct/0", "a/b/rrm/0", "a/b/rrm/1", "a/rrm/0", "b/direct/0"]
    for name, found in [
        ("a/b", keys[:3]),
        ("a/b/rrm", keys[1:3]),
        ("a/b/rrm/", keys[1:3]),
        ("a", keys[:4]),
        ("b/direct/0", keys[4:]),
    ]:
        assert chosen_jobs(keys, [name]) == set(found), name
    for name in ("a/", "b/d", "/", "rrm", "a/b/rrm/2", "A"):
        if name != "a/":
            with pytest.raises(RrmError, match="there is no such job"):
                chosen_jobs(keys, [name])
    many = [f"t{i}/rrm/0" for i in range(20_000)]
    assert len(chosen_jobs(many, many)) == 20_000  # in a time that grows as they do


@pytest.mark.parametrize("command", ["render", "analyze"])
def test_a_trace_is_read_once(
    command: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = Path.open

    def noted(path: Path, *mode: Any, **more: Any) -> Any:
        opened.append(path.name)
        return real(path, *mode, **more)

    monkeypatch.setattr(Path, "open", noted)
    assert called(capsys, command, calls(whole, tmp_path)[command]) == (0, [])
    assert opened.count("trace.jsonl") == opened.count("rows.jsonl") - 1 == 1  # a trace is read with its rows

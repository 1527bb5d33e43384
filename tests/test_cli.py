"""The command line: every setting is a flag, wrong values get one sentence, nothing heavy is imported early."""

import json
import os
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from rrm_engine.bench import cli
from rrm_engine.bench.flags import flag, parse, show
from rrm_engine.bench.tasks import Task, TaskSet
from rrm_engine.config import RunConfig


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(argv)
    assert caught.value.code == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ") and second.endswith("--help")
    return first


def test_no_arguments_are_the_defaults() -> None:
    options = parse([])
    assert options.config() == RunConfig()
    assert (options.tasks, options.given, options.out, options.resume, options.quiet) == (None, {}, None, None, False)


def test_every_setting_is_a_flag_that_takes_its_own_default() -> None:
    for f in fields(RunConfig):
        assert f.default is not MISSING
        if f.default is not None:
            assert parse([flag(f.name), show(f.default)]).given == {f.name: f.default}


def test_values_of_every_kind() -> None:
    line = (
        "tasks.csv --samples 4 --temperature 0.6 --prefix-cache off --direct-thinking on "
        "--modes rrm,direct --kv-blocks 100 --child-context parent --out x --quiet"
    )
    options = parse(line.split())
    assert options.tasks == "tasks.csv" and options.out == Path("x") and options.quiet
    config = options.config()
    assert (config.samples, config.temperature, config.prefix_cache, config.direct_thinking) == (4, 0.6, False, True)
    assert (config.modes, config.kv_blocks, config.child_context) == (("rrm", "direct"), 100, "parent")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--samples", "x"], ["--samples takes a whole number", "'x'"]),
        (["--samples", "1.5"], ["--samples takes a whole number"]),
        (["--samples", "0"], ["--samples must be at least 1"]),
        (["--temperature", "hot"], ["--temperature takes a number"]),
        (["--temperature", "nan"], ["--temperature takes a number"]),
        (["--temperature", "-1"], ["--temperature must not be negative"]),
        (["--prefix-cache", "true"], ["--prefix-cache takes on or off", "'true'"]),
        (["--dtype", "int8"], ["--dtype takes auto, float32"]),
        (["--modes", "direct,fast"], ["--modes takes direct, rrm"]),
        (["--modes", ""], ["--modes takes direct, rrm"]),
        (["--sampels", "3"], ["--sampels", "did you mean --samples?"]),
        (["--samp", "3"], ["--samp", "did you mean --samples?"]),
        (["--seed"], ["--seed"]),
        (["one.json", "two.json"], ["second task set 'two.json'"]),
        (["--out", "a", "--resume", "b"], ["--out and --resume"]),
    ],
)
def test_wrong_values(capsys: pytest.CaptureFixture[str], argv: list[str], parts: list[str]) -> None:
    message = refused(capsys, *argv)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("columns", [80, 120])
def test_help_teaches_and_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(flag(f.name) in text for f in fields(RunConfig))
    assert text.count("  python -m rrm_engine.bench") == 3
    assert "(default: on)" in text and "KV memory:" in text
    assert max(map(len, text.splitlines())) <= columns


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom rrm_engine.bench.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'sympy', 'math_verify', 'rich', 'rrm_engine.backends.local'}\n"
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def bench(*argv: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    path = os.pathsep.join([str(Path(cli.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "rrm_engine.bench", *argv],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def test_refusals_before_the_run_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").touch()
    (tmp_path / "good.jsonl").write_text('{"problem": "p", "answer": 1}\n')
    for argv, part in [
        (["bad.jsonl"], "bad.jsonl, line 1"),
        (["nothing.csv"], "no task set or file named 'nothing.csv'"),
        (["good.jsonl", "--out", "full"], "full is not empty"),
        (["good.jsonl", "--out", "good.jsonl/x"], "cannot be written"),
        (["--resume", "full"], "holds no run.json"),
        (["good.jsonl", "--limit", "none"], "--limit takes a whole number"),
    ]:
        done = bench(*argv, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert part in done.stderr and "Traceback" not in done.stderr
        assert done.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.jsonl", "full", "good.jsonl"]


def recorded(tasks: TaskSet, config: RunConfig) -> dict[str, object]:
    """The part of run.json that resuming compares, as it comes back from disk."""
    settings = {f.name: getattr(config, f.name) for f in fields(RunConfig)}
    text = json.dumps({"settings": settings, "tasks": {"name": tasks.name, "sha256": tasks.sha256}})
    loaded: dict[str, object] = json.loads(text)
    return loaded


def test_resume_names_every_difference() -> None:
    tasks = TaskSet("t", "/t.jsonl", (Task("1", "p", "2"),))
    run = recorded(tasks, RunConfig(samples=2, prefix_cache=True))
    assert cli.differences(parse(["--samples", "2", "--modes", "direct,rrm"]).given, tasks, run) == []
    assert cli.differences(parse(["--quiet", "--out", "x"]).given, tasks, run) == []
    found = cli.differences(
        parse(["--samples", "3", "--prefix-cache", "off", "--temperature", "0"]).given,
        TaskSet("t", "/t.jsonl", (Task("1", "p", "3"),)),
        run,
    )
    assert found == [
        "--samples is 3, was 2",
        "--prefix-cache is off, was on",
        "--temperature is 0.0, was default",
        "the tasks of /t.jsonl are not those of the recorded t",
    ]

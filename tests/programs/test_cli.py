"""The command line: every setting is a flag, wrong values get one sentence, nothing heavy is imported early."""

import dataclasses
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

import by_hand
import pytest

import rrm_engine
from rrm_engine import RrmError, Solver, __main__
from rrm_engine.bench import cli
from rrm_engine.bench.flags import flag, parse, show
from rrm_engine.bench.tasks import Task, TaskSet
from rrm_engine.config import SERVERS_ONLY, RunConfig
from rrm_engine.runs.manifest import Manifest, TaskSource


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
    servers = ["--backend", "openai", "--base-urls", "http://127.0.0.1:1/v1", "--model", "m"]
    for f in fields(RunConfig):
        assert f.default is not MISSING
        if f.default not in (None, ()):  # which stand for a flag that is left out
            asked = servers if f.name in SERVERS_ONLY else []
            assert parse([*asked, flag(f.name), show(f.default)]).given[f.name] == f.default


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
    assert text.count("  python -m rrm_engine.bench") == 4
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


def test_refusals_before_the_run_leave_no_files(tmp_path: Path) -> None:
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


def recorded(tasks: TaskSet, config: RunConfig) -> Manifest:
    """The part of run.json that resuming compares, as it comes back from disk."""
    settings = {f.name: getattr(config, f.name) for f in fields(RunConfig)}
    source = TaskSource(tasks.name, tasks.source, tasks.sha256, 1, 1)
    return dataclasses.replace(by_hand.manifest(), settings=json.loads(json.dumps(settings)), tasks=source)


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": "a"}, "--seed takes a whole number, not 'a'"),
        ({"seed": True}, "--seed takes a whole number, not True"),
        ({"seed": None}, "--seed takes a whole number, not None"),
        ({"seed": 1.0}, "--seed takes a whole number, not 1.0"),
        ({"limit": "3"}, "--limit takes a whole number"),
        ({"temperature": math.nan}, "--temperature takes a number, not nan"),
        ({"temperature": math.inf}, "--temperature takes a number, not inf"),
        ({"top_p": "0.9"}, "--top-p takes a number"),
        ({"min_p": False}, "--min-p takes a number, not False"),
        ({"prefix_cache": 1}, "--prefix-cache takes on or off (True or False), not 1"),
        ({"direct_thinking": "on"}, "--direct-thinking takes on or off"),
        ({"model": None}, "--model takes a text, not None"),
        ({"model": b"x"}, "--model takes a text"),
        ({"dtype": ["auto"]}, "--dtype takes a text"),
        ({"modes": "direct"}, "--modes takes names, not 'direct'"),
        ({"modes": {"direct"}}, "--modes takes names"),
        ({"modes": [1]}, "--modes takes names"),
        ({"modes": ("rrm", "rrm")}, "--modes rrm,rrm names a mode twice"),
        ({"modes": []}, "--modes takes direct, rrm"),
    ],
)
def test_settings_of_another_type(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RrmError, match=re.escape(message)):
        RunConfig(**settings)


def test_what_will_do_for_a_setting() -> None:
    config = RunConfig(model=Path("some/dir"), prompt_style=Path("x.toml"), modes=["rrm"], temperature=1)  # type: ignore[arg-type]
    assert (config.model, config.prompt_style, config.modes) == ("some/dir", "x.toml", ("rrm",))
    assert RunConfig(**asdict(config)) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_sequence_tokens": 1}, "--max-sequence-tokens 1: the longest prompt has {longest} tokens"),
        (
            {"max_sequence_tokens": "longest"},
            "--max-sequence-tokens {longest}: the longest prompt has {longest} tokens",
        ),
        ({"devices": ","}, "--devices ,: a name is missing beside a comma"),
        ({"devices": "cpu,,cpu"}, "--devices cpu,,cpu: a name is missing"),
        ({"devices": ""}, "--devices : a name is missing"),
    ],
)
def test_refused_at_the_start_with_the_numbers(settings: dict[str, Any], message: str, solver: Solver) -> None:
    tasks = ["\ud800", "short", "Work modulo 1000. " * 9]
    solved = solver.solve(tasks[2], "direct")
    longest = solved.forward_prefilled + solved.reused
    if settings.get("max_sequence_tokens") == "longest":
        settings = {"max_sequence_tokens": longest}
    with pytest.raises(RrmError, match=re.escape(message.format(longest=longest))):
        Solver.load(RunConfig(modes=("direct",), **settings), tasks)


@pytest.mark.parametrize("program", ["bench", "trace", "verify"])
def test_every_command_complains_alike(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = importlib.import_module(f"rrm_engine.{program}.cli").main
    for argv, said in [
        (["--foo"], "error: there is no flag --foo\n"),  # nothing is like it
        (["--jso" if program != "bench" else "--see", "1"], "; did you mean --"),
        (["x", "y"], "error: there is no " + ("second task set" if program == "bench" else "argument") + " 'y'\n"),
    ]:
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 2
        out, err = capsys.readouterr()
        assert out == "" and said in err and err.endswith(f"See python -m rrm_engine.{program} --help\n")
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"rrm-engine {rrm_engine.__version__}\n"


def test_the_package_itself_names_its_commands() -> None:
    for argv, code, said in [([], 0, "rrm verify RUN_DIR"), (["--version"], 0, "rrm-engine "), (["x"], 2, "")]:
        done = subprocess.run([sys.executable, "-m", "rrm_engine", *argv], capture_output=True, text=True)
        assert done.returncode == code and said in done.stdout
        assert (done.stderr != "") == (code == 2)


def test_a_closed_stream_from_the_start() -> None:
    """Not even a file that is opened later comes to lie where standard output was."""
    for closed, code, said in [(">&-", 1, "error: standard output cannot be written"), ("2>&-", 0, ""), ("<&-", 0, "")]:
        command = f"{shlex.quote(sys.executable)} -m rrm_engine {closed}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert done.returncode == code and done.stderr.startswith(said) and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_each_command_is_one_of_rrm(name: str) -> None:
    """It calls itself as it was called, and answers as the module does."""
    code = "import sys; sys.argv[0] = '/usr/bin/rrm'; from rrm_engine.__main__ import console; console()"
    helped = subprocess.run([sys.executable, "-c", code, name, "--help"], capture_output=True, text=True)
    assert helped.returncode == 0 and helped.stdout.startswith(f"usage: rrm {name}")
    assert "python -m rrm_engine." not in helped.stdout
    wrong = subprocess.run([sys.executable, "-c", code, name, "--no-such-flag"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.endswith(f"See rrm {name} --help\n")
    as_module = subprocess.run([sys.executable, "-m", "rrm_engine", name, "--help"], capture_output=True, text=True)
    assert as_module.stdout.replace("python -m rrm_engine.", "rrm ").split() == helped.stdout.split()

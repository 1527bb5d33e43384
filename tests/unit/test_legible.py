"""Whatever ids, names and texts hold, the terminal, tables, pictures and traces stay whole."""

import io
import sys
import unicodedata
import xml.dom.minidom
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import by_hand
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from traced import edited

from rrm_engine.bench.progress import PlainDisplay, describe_row, first_line
from rrm_engine.bench.table import error_line
from rrm_engine.bench.tasks import Task, TaskSet
from rrm_engine.command import say
from rrm_engine.legible import legible, legible_key, spelled
from rrm_engine.replay.report import rich_table
from rrm_engine.runs.directory import RunDir
from rrm_engine.runs.rows import Row
from rrm_engine.trace.cli import main

HOSTILE = [
    "\x1b[31mred", "\x1b]0;title", "\x9b2J", "a\nb\r\nc\x85d\u2028e", "\u202eright to left", "\u2066a\u2069", "\a\b\0",
    "x" * 5000, "$x_{$", "$\\frac{$", "[red]a[/blue]", "[/]", "[link=http://a.b]c[/link]", "\ud800", "\u05d0\u05d1 1/2",
    "%s {0} {x}", "a,b/c/d", "<b>&amp;", "\u200b\ufeff", "\u4f60\u597d" * 300, "\U000e0041", "e" + "\u0301" * 500,
    "\x7f\t|\\", "]]>",
]  # fmt: skip
OBEYED = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def harmless(text: str) -> bool:
    return not any(
        unicodedata.category(char) in OBEYED for char in text if char != "\n" and not "\udc80" <= char <= "\udcff"
    )


@settings(max_examples=300)
@given(st.text(st.characters(), max_size=300) | st.sampled_from(HOSTILE), st.integers(10, 80))
def test_what_is_legible_is_one_short_line(text: str, most: int) -> None:
    line = legible(text, most)
    assert harmless(line) and "\n" not in line
    assert len(line) <= most
    line.encode()
    assert harmless(spelled(text)) and spelled(text).count("\n") == text.count("\n")
    if text.isprintable() and len(text) <= most:
        assert line == text == spelled(text)


def test_both_ends_of_a_long_key_are_seen() -> None:
    key = legible_key("a" * 5000 + "/rrm/0")
    assert key.startswith("aaa") and key.endswith("/rrm/0") and "..." in key and len(key) == 60
    assert legible("\x1b[31m") == "\\x1b[31m"


def run_of(names: Sequence[str], calm: Path, tmp_path: Path) -> Path:
    """The recorded run with its four tasks' ids changed."""

    def rename(rows: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
        new = dict(zip(sorted({row["id"] for row in rows}), names, strict=True))
        for row in rows:
            row["id"] = new[row["id"]]
        for event in events:
            task, rest = event["job"].split("/", 1)
            event["job"] = f"{new[task]}/{rest}"

    return edited(calm, tmp_path / "run", rename)


@pytest.mark.parametrize("first", range(0, len(HOSTILE), 4))
def test_commands_that_read_a_run(
    first: int, calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("perfetto")
    from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as pb2

    names = HOSTILE[first : first + 4]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    run = run_of(names, calm, tmp_path)
    assert main([str(run), "--plot", "a.svg", "--json", "a.json"]) == 0
    assert main([str(run), "--perfetto", "a.pftrace"]) == 0
    assert main([str(run), "--jobs", "nobody"]) == 2
    said = capsys.readouterr()
    assert harmless(said.out) and harmless(said.err)
    assert max(cell_len(line) for line in said.out.splitlines()) <= 140
    drawing = xml.dom.minidom.parse("a.svg").documentElement
    assert drawing is not None and float(drawing.getAttribute("width").removesuffix("pt")) < 1000
    parsed = pb2.Trace()
    parsed.ParseFromString(Path("a.pftrace").read_bytes())
    processes = [p.track_descriptor.process.process_name for p in parsed.packet if p.HasField("track_descriptor")]
    assert all(harmless(one) and len(one) <= 120 for one in processes)
    assert "longest" in said.out and "0.\u2026" not in said.out  # numbers are whole beside names of any length
    for name in names:
        assert legible(name)[:20] in said.out
        assert any(one.startswith(legible(name)[:20]) and one.endswith("/rrm/0") for one in processes)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_run_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = by_hand.row(name, "rrm")
    row |= {"status": "graph", "correct": True, "latency_s": 1.0, "total_tokens": 5, "critical_path_tokens": 3}
    error = f"ValueError: {name}\nmore"
    failed: Row = {**row, "error": error}
    say(f"error: {name}")
    stream = io.StringIO()
    display = PlainDisplay(Console(file=stream, width=80))
    display.start(2, [], dict)
    display.row(row)
    display.row(failed)
    tasks = TaskSet("t", "t", (Task(name, "p"),))
    said = [
        describe_row(row),
        describe_row(failed),
        error_line([failed]),
        tasks.ungraded(),
        first_line(error),
    ]
    assert all(harmless(line) and "\n" not in line and len(line) < 400 for line in said)
    assert harmless(capsys.readouterr().err) and harmless(stream.getvalue())
    assert len(stream.getvalue().splitlines()) == 2


def test_a_path_in_the_title_of_a_table_is_no_markup() -> None:
    stream = io.StringIO()
    Console(file=stream, width=200).print(rich_table([], "runs/[red]\x1b[1m[/x]", wide=False))
    assert "runs/[red]\\x1b[1m[/x]" in stream.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux takes any bytes as a file's name")
def test_bytes_of_a_path_that_are_no_text_come_back_from_the_manifest(tmp_path: Path) -> None:
    source = "/tasks/\udcff.jsonl"
    directory = RunDir.create(tmp_path / "\udcfe")
    directory.write_manifest(by_hand.manifest(source))
    directory.event({"job": source})
    directory.close()
    again = RunDir.resume(tmp_path / "\udcfe")
    assert again.manifest.tasks.source == source
    again.close()

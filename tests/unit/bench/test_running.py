"""The graphs that run, as the live view shows them."""

import re
from io import StringIO

import pytest
from recorded_runs import row
from rich.console import Console
from scripted import Script, Scripted, Text, pieces, solve

from rrm_engine.bench.progress import LiveDisplay
from rrm_engine.bench.running import RunningRows
from rrm_engine.graph.types import EndReason
from rrm_engine.solver.result import Job

PLAN = (
    '{"type":"child","id":"a","task":"one","depends_on":[]}\n'
    '{"type":"child","id":"b","task":"two","depends_on":["a"]}\n'
    '{"type":"await"}\n'
)


def answer(text: str) -> list[Text]:
    return [Text(pieces(f'{{"type":"atomic","answer":"FINAL: {text}"}}'))]


GRAPH: Script = {"root": [Text(pieces(PLAN)), *answer("3")], "root.a": answer("1\x1b[2J"), "root.b": answer("2")}


def shown(script: Script, most: int = 40) -> list[list[str]]:
    """The lines after each event that changes them, without times."""
    _, events = solve(Scripted({"t": script}), [Job("t", "Add one and two.")], max_depth=1)
    rows, seen = RunningRows(), list[list[str]]()
    for event in events:
        rows.tell(event)
        lines = [re.sub(r"  \d+ s$", "", line) for line in rows.lines(most)]
        if not seen or lines != seen[-1]:
            seen.append(lines)
    return seen


def test_a_tree_grows_and_is_gone_with_its_row() -> None:
    top = "t/rrm/0"
    assert shown(GRAPH) == [
        [top],
        [top, "  root plans"],
        [top, "  root plans", "    a solves"],
        [top, "  root plans", "    a found 1\\x1b[2J"],
        [top, "  root plans", "    a found 1\\x1b[2J", "    b solves"],
        [top, "  root waits", "    a found 1\\x1b[2J", "    b solves"],
        [top, "  root waits", "    a found 1\\x1b[2J", "    b found 2"],
        [top, "  root continues", "    a found 1\\x1b[2J", "    b found 2"],
        [top, "  root found 3", "    a found 1\\x1b[2J", "    b found 2"],
        [],
    ]


def test_the_fallback_stands_under_its_root() -> None:
    script = {"root": [Text([""], EndReason.EOS)], "root!direct": [Text(pieces("FINAL: 3"))]}
    assert ["t/rrm/0", "  root failed", "    root!direct solves"] in shown(script)


def test_where_there_is_little_room_nodes_that_are_over_go_first() -> None:
    assert ["t/rrm/0", "  root waits", "    b solves"] in shown(GRAPH, 3)
    assert ["t/rrm/0", "... and 2 lines more"] in shown(GRAPH, 2)
    assert all(len(lines) <= most for most in range(4) for lines in shown(GRAPH, most))


def test_the_live_view_shows_the_tree_and_leaves_nothing() -> None:
    _, events = solve(Scripted({"t": GRAPH}), [Job("t", "Add one and two.")], max_depth=1)
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=30)
    display = LiveDisplay(console)
    display.start(1, [], lambda: {"tokens_per_s": 7.0, "running": 2})
    for event in events:
        display.event(event)
        if event["event"] == "start" and event["node"] == "root.b":
            display._live.refresh()
    display.stop()
    assert "b solves" in out.getvalue() and "7 tok/s" in out.getvalue() and "\x1b[2J" not in out.getvalue()
    assert out.getvalue().rstrip().endswith("\x1b[2K")


@pytest.mark.parametrize(("width", "bar"), [(36, False), (120, True)])
def test_times_are_seen_on_a_narrow_terminal(width: int, bar: bool) -> None:
    out = StringIO()
    display = LiveDisplay(Console(file=out, force_terminal=True, width=width, height=30, color_system=None))
    display.start(4, [], lambda: {"tokens_per_s": 7.0})
    display.row(row("t", "rrm"))
    display._live.refresh()
    display.stop()
    seen = re.findall(r"1/4 rows 0:00:0\d about 0:00 left", out.getvalue())
    assert seen and ("\u2501" in out.getvalue()) is bar and "\u2026" not in out.getvalue()

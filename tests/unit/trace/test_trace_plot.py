"""The picture of a recorded run: its bars, arrows and critical path are where the events say."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from traced import known_graph, recursive

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex

from rrm_engine.runs.events import parse
from rrm_engine.runs.reader import RecordedJob, believed, read_run
from rrm_engine.runs.timeline import JobTrace
from rrm_engine.trace.cli import main
from rrm_engine.trace.plot import COLOURS, MOST_ROWS, QUEUED, WAITING, draw

Bars = dict[str, list[tuple[str, float, float]]]


def bars(axes: Any) -> Bars:
    """By the label of a line what is drawn in it, in order of time: colour, begin and end."""
    labels = [label.get_text() for label in axes.get_yticklabels()]
    found: Bars = defaultdict(list)
    for patch in axes.patches:
        if patch.get_width() > 0:
            line = round(patch.get_y() + patch.get_height() / 2)
            begin = patch.get_x()
            found[labels[line]].append((to_hex(patch.get_facecolor()), begin, begin + patch.get_width()))
    return {label: sorted(drawn, key=lambda bar: bar[1]) for label, drawn in found.items()}


def seconds(drawn: Bars, *colours: str) -> float:
    return sum(end - begin for line in drawn.values() for colour, begin, end in line if colour in colours)


def test_a_known_graph_is_drawn_as_it_was() -> None:
    trace = known_graph()
    (axes,) = draw([trace]).axes
    drawn = bars(axes)
    assert set(drawn) == set(trace.nodes) and next(iter(drawn)) == "root"
    began = trace.events[0].t
    for path, line in drawn.items():
        running = [(s.admitted_t - began, s.end_t - began) for s in trace.real(path)]
        assert min(begin for _, begin, _ in line) == pytest.approx(trace.real(path)[0].ready_t - began)
        assert max(end for _, _, end in line) == pytest.approx(running[-1][1])
        splits = any(other.startswith(f"{path}.") for other in trace.nodes)
        assert (COLOURS["plan"] in {colour for colour, _, _ in line}) == splits
    arrows = {(text.xyann[1], text.xy[1], round(text.xy[0])) for text in axes.texts}
    rank = {path: i for i, path in enumerate(trace.nodes)}
    starts = {path: round(trace.nodes[path][0].ready_t - began) for path in trace.nodes}
    resumed = trace.nodes["root"][1]
    giver = resumed.after[-1]
    assert (rank["root"], rank["root.a"], starts["root.a"]) in arrows
    assert (rank[giver], rank["root"], round(resumed.ready_t - began)) in arrows
    assert len(arrows) == sum(len(trace.real(path)) for path in trace.nodes) - 1  # but the root's start


def test_siblings_stand_in_the_order_in_which_they_began() -> None:
    known = known_graph()
    lines = [json.dumps(event.as_json()).replace("root.a", "root.c") for event in known.events]
    renamed = [parse(json.loads(line)) for line in lines]
    (axes,) = draw([believed(RecordedJob(known.key, 0, renamed, known.row))]).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["root", "root.c", "root.b"]


def test_all_time_of_a_recorded_run_is_drawn_once(each: Path) -> None:
    found = recursive(each)[:MOST_ROWS]
    figure = draw([trace for trace, _ in found])
    for axes, (trace, attribution) in zip(figure.axes, found, strict=True):
        drawn = bars(axes)
        stretches = [s for path in trace.nodes for s in trace.real(path)]
        queued = sum(end - start for s in stretches for start, end in s.queued)
        waited = sum(trace.events[end].t - trace.events[begin].t for p in trace.nodes for begin, end in trace.waits(p))
        assert seconds(drawn, QUEUED) == pytest.approx(queued, abs=1e-6)
        assert seconds(drawn, WAITING) == pytest.approx(waited, abs=1e-6)
        ran = sum(s.end_t - s.admitted_t for s in stretches)
        assert seconds(drawn, *COLOURS.values()) == pytest.approx(ran, abs=1e-6)
        path = [(line.get_xdata()[0], line.get_xdata()[1]) for line in axes.lines]
        assert path == [(hop.ready_s, hop.until_s) for hop in attribution.hops]


def test_nodes_that_split_planned_and_others_solved(each: Path) -> None:
    for trace, _ in recursive(each):
        (axes,) = draw([trace]).axes
        drawn = bars(axes)
        for path in trace.nodes:
            splits = any(other.startswith(f"{path}.") for other in trace.nodes)
            phases = {stretch.phase for stretch in trace.real(path)}
            planned = COLOURS["plan"] in {colour for colour, _, _ in drawn.get(path, [])}
            assert planned == (splits and "graph" in phases), path


def test_the_direct_solve_of_the_same_task_stands_above(calm: Path) -> None:
    jobs = read_run(calm).jobs
    axes = draw(jobs).axes[0]
    key = axes.get_title(loc="left").split(":")[0].replace("rrm", "direct")
    direct: JobTrace = next(trace for trace in jobs if trace.key == key)
    assert axes.get_yticklabels()[0].get_text() == "direct" and axes.get_yticklabels()[1].get_text() == "root"
    assert bars(axes)["direct"][-1][2] == pytest.approx(direct.nodes["root"][-1].end_t - direct.events[0].t)
    assert f"directly {direct.row['latency_s']:.2f} s" in axes.get_title(loc="left")


@pytest.mark.parametrize(("name", "magic"), [("p.png", b"\x89PNG"), ("p.svg", b"<?xml"), ("p.pdf", b"%PDF")])
def test_the_command_writes_it(calm: Path, tmp_path: Path, capsys: Any, name: str, magic: bytes) -> None:
    assert main([str(calm), "--plot", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes().startswith(magic)
    assert f"Written to {tmp_path / name}: 4 recursive rows" in capsys.readouterr().out


def test_what_cannot_be_drawn_is_said(calm: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*arguments: str) -> str:
        assert main([str(calm), *arguments]) == 2
        return str(capsys.readouterr().err)

    assert "not supported" in said("--plot", str(tmp_path / "p.xyz"))
    assert "there is no directory /no/where" in said("--plot", "/no/where/p.png")
    direct = next(trace.key for trace in read_run(calm).jobs if "/direct/" in trace.key)
    assert "there is none" in said("--plot", str(tmp_path / "p.png"), "--jobs", direct)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install 'rrm-engine[plot]'" in said("--plot", str(tmp_path / "p.png"))

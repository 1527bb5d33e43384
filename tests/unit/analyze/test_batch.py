"""What nodes did with their time, in a graph whose times are known (`traced.known_graph`)."""

from dataclasses import replace
from pathlib import Path

import pytest
from recorded_runs import both, save
from traced import known_graph

pytest.importorskip("scipy")

from rrm_engine.analyze.batch import (
    POINTS,
    _figures,
    at_work,
    batch_figures,
    over_time,
    tokens_of,
    useful,
)
from rrm_engine.runs.arms import arms, read_runs
from rrm_engine.runs.timeline import JobTrace


def test_when_nodes_were_in_the_batch() -> None:
    # Root waits for its place until 3, then from 1023 to 2047; b lost its place from 191 to 255.
    assert sorted(at_work(known_graph())) == [(3, 33), (15, 255), (31, 191), (255, 767), (2047, 8191)]


def test_figures_of_a_known_graph() -> None:
    figures = _figures([(0, known_graph())])
    work = 30 + 240 + 160 + 512 + 6144
    assert figures["nodes_at_work"] == pytest.approx(work / (764 + 6144))
    assert figures["idle_parents"] == pytest.approx((1023 - 33) / (8191 - 1))
    assert figures["queued"] == pytest.approx((2 + 1024 + 64) / (2 + 1024 + 64 + work))
    assert figures["queued_s_max"] == 1024
    assert figures["recursive"]["nodes"] == 3 and figures["recursive"]["of_no_use"] == 0


def test_the_batch_over_time_adds_up() -> None:
    trace = known_graph()
    (found,) = over_time([(0, trace)])
    assert found["span_s"] == trace.span_s
    width = trace.span_s / POINTS
    total = sum(end - start for start, end in at_work(trace))
    assert sum(found["nodes"]["rrm"]) * width == pytest.approx(total, rel=1e-3)
    assert max(found["nodes"]["rrm"]) <= 3 and min(found["nodes"]["rrm"]) >= 0


def test_processes_have_clocks_of_their_own() -> None:
    one, other = known_graph(), replace_session(known_graph())
    assert [(f["run"], f["session"]) for f in over_time([(0, other), (0, one), (1, one)])] == [(0, 0), (0, 1), (1, 0)]
    assert _figures([(0, one), (0, other)])["nodes_at_work"] == pytest.approx(_figures([(0, one)])["nodes_at_work"])


def replace_session(trace: JobTrace) -> JobTrace:
    return replace(trace, session=1)


def test_a_node_is_of_use_if_its_conclusion_led_to_the_answer() -> None:
    trace = known_graph()
    assert useful(trace) == {"root", "root.a", "root.b"}
    assert [tokens_of(trace, path) for path in trace.nodes] == [5 + 3, 2, 9]
    first, second = trace.nodes["root"]
    trace.nodes["root"] = [first, replace(second, after=("root.b",))]
    assert useful(trace) == {"root", "root.b"}
    figures = _figures([(0, trace)])["recursive"]
    assert figures["of_no_use"] == pytest.approx(1 / 3)
    assert figures["tokens_of_no_use"] == pytest.approx(2 / 19)
    start = trace.nodes["root.b"][0]
    trace.nodes["root.b"] = [replace(start, after=("root.a",))]  # by way of its sibling
    assert useful(trace) == {"root", "root.a", "root.b"}


def test_rows_without_events_are_analysed_without_them(tmp_path: Path) -> None:
    (arm,) = arms(read_runs([save(tmp_path / "run", both("a"))]))
    found = batch_figures(arm)
    assert found["jobs"] == 0 and "holds no trace.jsonl" in found["problem"]
    (tmp_path / "run" / "trace.jsonl").write_text("")
    assert batch_figures(arm) == {"jobs": 0, "left_out": 2, "problem": None}

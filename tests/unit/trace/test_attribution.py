"""Recorded runs of the real solver, read back: the latency in parts, and what is missing is never made up."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from traced import edited, known_graph, recursive

from rrm_engine.runs.checks import critical_path_tokens
from rrm_engine.runs.errors import RunError
from rrm_engine.runs.events import (
    DidNotFit,
    Event,
    Finished,
    FirstToken,
    Paused,
    Readmitted,
    Resumed,
    Wrote,
    WroteAtomic,
    WroteAwait,
    WroteChild,
    WroteMalformed,
)
from rrm_engine.runs.reader import RecordedJob, believed, read_run
from rrm_engine.runs.rows import Row, row_key
from rrm_engine.runs.timeline import Incomplete, JobTrace
from rrm_engine.trace.attribution import PARTS, attribute
from rrm_engine.trace.cli import main

# the recorded runs are worth the tests


def test_the_runs_hold_what_is_to_be_tested(calm: Path, crowded: Path, cramped: Path, packaged: Path) -> None:
    traces = [trace for trace, _ in recursive(calm)]
    assert len(traces) == 4
    events = [event for trace in traces for event in trace.events]
    assert {type(event) for event in events} >= {WroteChild, WroteAwait, WroteAtomic}
    assert any(s.phase == "continuation" and len(s.after) > 1 for t in traces for n in t.nodes.values() for s in n)
    assert any(path.count(".") == 2 for trace in traces for path in trace.nodes)
    stretches = [s for trace, _ in recursive(crowded) for found in trace.nodes.values() for s in found]
    assert any(s.admitted_t > s.ready_t for s in stretches) and any(s.put_back for s in stretches)
    refused = {trace.nodes[e.node][0].phase for trace, _ in recursive(cramped) for e in trace.events if no_room(e)}
    assert refused == {"no_room", "graph"}  # some could not start, some not go on
    assert all(trace.row["status"] == "graph" and len(trace.nodes) > 2 for trace, _ in recursive(packaged))


# the critical path


def test_parts_add_up_to_the_measured_latency(each: Path) -> None:
    for trace, found in recursive(each):
        assert tuple(found.parts) == PARTS and min(found.parts.values()) >= -1e-9
        assert sum(found.parts.values()) == pytest.approx(trace.span_s, abs=1e-9)
        assert sum(found.parts.values()) == pytest.approx(trace.row["latency_s"], rel=0.02, abs=0.005)


def test_the_longest_chain_of_tokens_follows_from_the_events(each: Path) -> None:
    for trace in read_run(each).jobs:
        assert critical_path_tokens(trace) == trace.row["critical_path_tokens"]


def test_the_path_is_the_longest_chain_where_time_goes_by_tokens(calm: Path) -> None:
    """Every node has one token a step from the step after its start on, so the longest path has the most tokens."""
    comparable = 0
    for trace, found in recursive(calm):
        stretches = [s for path in trace.nodes for s in trace.real(path) if s.first is not None]
        delays = {trace.events[s.first or 0].step - trace.events[s.begin].step for s in stretches}
        assert found.path_tokens <= found.critical_path_tokens
        if delays == {1} and not any(s.put_back for s in stretches):
            comparable += len(trace.nodes) > 1
            assert found.path_tokens == found.critical_path_tokens
    assert comparable > 0


def test_the_path_goes_from_each_stretch_to_what_it_waited_for_last(each: Path) -> None:
    for trace, found in recursive(each):
        hops, end = found.hops, 0.0
        assert hops[0].node == "root" and hops[-1].node in ("root", "root!direct")
        for before, hop in zip([None, *hops], hops, strict=False):
            assert end <= hop.ready_s <= hop.until_s
            end = hop.until_s
            stretch = next(s for s in trace.nodes[hop.node] if s.ready_t - trace.events[0].t == hop.ready_s)
            over = {p: trace.events[trace.over[p]].t for p in stretch.after if p in trace.nodes}
            if isinstance(trace.events[stretch.begin], Resumed) and before:
                last = max(over, key=lambda p: over[p], default=hop.node)
                pause = next(e for e in reversed(trace.events[: stretch.begin]) if is_pause(e, hop.node))
                assert before.node == (last if over and over[last] > pause.t else hop.node)
        assert sum(hop.tokens for hop in hops) == found.path_tokens


def no_room(event: Event) -> bool:
    return isinstance(event, DidNotFit)


def is_pause(event: Event, node: str) -> bool:
    return isinstance(event, Paused) and event.node == node


def test_first_tokens_and_resumes_are_where_the_row_measured_them(each: Path) -> None:
    for trace, _ in recursive(each):
        first = next(e for e in trace.events if isinstance(e, FirstToken))
        assert first.t - trace.events[0].t == pytest.approx(trace.row["ttft_s"], abs=0.02)
        stretches = [s for path in trace.nodes for s in trace.real(path) if s.first is not None]
        resumed = [s.first_t - s.ready_t for s in stretches if isinstance(trace.events[s.begin], Resumed)]
        assert sorted(resumed) == pytest.approx(sorted(trace.row["resume_latency_s"]), abs=0.02)


def test_queueing_is_found_where_steps_were_missed_and_only_there(each: Path) -> None:
    for trace, found in recursive(each):
        for stretch in (s for path in trace.nodes for s in trace.real(path)):
            if stretch.first is None:
                continue
            missed = trace.events[stretch.first].step - trace.events[stretch.begin].step - 1
            assert missed > 0 or stretch.admitted_t == stretch.ready_t
            steps = trace.events[stretch.end].step - trace.events[stretch.first].step
            sampled = trace.tokens_to(stretch, stretch.end)
            assert bool(stretch.put_back) == (steps + 1 > sampled)
        assert found.parts["queued"] < found.latency_s


def test_a_prompt_in_many_chunks_is_prefill_and_not_queueing(crowded: Path) -> None:
    trace = min((trace for trace, _ in recursive(crowded)), key=lambda trace: trace.events[0].t)
    root = trace.nodes["root"][0]
    assert root.first is not None and trace.events[root.first].step - trace.events[root.begin].step > 5
    assert root.admitted_t == root.ready_t < root.first_t


def test_the_parts_of_a_known_graph() -> None:
    """Two children, one of them slower by itself; every time is a power of two, so that each part is one sum."""
    found = attribute(known_graph())
    assert found.parts == {
        "root": 8 + 16 + 4096,  # 4096 after the resume
        "children": 128,
        "straggler": 512,
        "prefill": 4 + 32 + 2048,
        "queued": 2 + 64 + 1024,
        "gaps": 1 + 256 + 8192,
    }
    assert [(hop.node, hop.tokens) for hop in found.hops] == [("root", 5), ("root.b", 9), ("root", 3)]


# what is not there is never made up


def without(trace: JobTrace, drop: int, recount: bool) -> JobTrace:
    events = [event for index, event in enumerate(trace.events) if index != drop]
    if recount and isinstance(last := events[-1], Finished):
        events[-1] = replace(last, events=last.events - 1)
    return believed(RecordedJob(trace.key, trace.session, events, trace.row))


def test_a_missing_event_is_noticed(each: Path) -> None:
    trace = max((t for t, _ in recursive(each)), key=lambda t: len(t.events))
    for index in range(len(trace.events)):
        with pytest.raises(Incomplete):
            without(trace, index, recount=False)


def test_most_missing_events_are_noticed_without_the_count(each: Path) -> None:
    """Whatever the attribution is made of is checked a second time, by what the events say about each other."""
    trace = max((t for t, _ in recursive(each)), key=lambda t: len(t.events))
    short = {s.first for path in trace.nodes for s in trace.real(path) if trace.tokens_to(s, s.end) < 2}
    for index, event in enumerate(trace.events):
        needed = not isinstance(event, Wrote | WroteMalformed | Readmitted | DidNotFit)
        if (needed and index not in short) or (isinstance(event, WroteChild) and event.child in trace.nodes):
            with pytest.raises(Incomplete):
                without(trace, index, recount=True)


@pytest.mark.parametrize(
    "change",
    [{"latency_s": 99.0}, {"nodes": 99}, {"resumes": 99}, {"critical_path_tokens": 1}],
    ids=lambda change: next(iter(change)),
)
def test_a_row_of_another_run_is_noticed(calm: Path, change: dict[str, Any]) -> None:
    trace = max((t for t, _ in recursive(calm)), key=lambda t: len(t.events))
    with pytest.raises(Incomplete, match="its row says"):
        believed(RecordedJob(trace.key, trace.session, trace.events, cast(Row, {**trace.row, **change})))


def test_the_command_leaves_out_what_is_incomplete_and_says_so(
    calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose_a_resume(rows: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
        del events[next(i for i, e in enumerate(events) if e["event"] == "resume")]

    run = edited(calm, tmp_path / "run", lose_a_resume)
    complete = {trace.key for trace in read_run(run).jobs}
    assert main([str(run), "--json", str(tmp_path / "a.json")]) == 1
    document = json.loads((tmp_path / "a.json").read_text())
    (lost,) = document["incomplete"]
    out, err = capsys.readouterr()
    assert err.startswith(f"left out: {lost}: it had ") and lost not in complete
    assert lost.removesuffix("/rrm/0") not in out.split()
    assert {row["key"] for row in document["rows"]} == {k for k in complete if "/rrm/" in k}
    assert main([str(run), "--jobs", lost, "--perfetto", str(tmp_path / "x")]) == 2
    assert "no job with a complete trace" in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_an_interrupted_session_is_replaced_by_the_one_that_finished(calm: Path, tmp_path: Path) -> None:
    def interrupt_first(rows: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
        key = row_key(cast(Row, rows[0]))
        began = [dict(e) for e in events if e["job"] == key][:3]
        for item in (rows[0], *(e for e in events if e["job"] == key)):
            item["session"] = 1
        events[:0] = began

    def kill_last(rows: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
        del rows[-1]

    run = read_run(edited(calm, tmp_path / "again", interrupt_first))
    assert not run.incomplete and len(run.jobs) == 8
    run = read_run(edited(calm, tmp_path / "killed", kill_last))
    assert len(run.jobs) == 7 and "has no row" in next(iter(run.incomplete.values()))


def test_a_half_written_line_is_left_out_and_a_spoilt_one_refused(calm: Path, tmp_path: Path) -> None:
    run = edited(calm, tmp_path / "run", lambda rows, events: None)
    with (run / "trace.jsonl").open("a") as file:
        file.write('{"t": 12')
    assert len(read_run(run).jobs) == 8
    with (run / "trace.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(RunError, match=r"trace.jsonl, line \d+: not what"):
        read_run(run)


# the command


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits(
    calm: Path, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main([str(calm)]) == 0
    out, err = capsys.readouterr()
    assert err == "" and all(len(line) <= width for line in out.splitlines())
    assert all(name in out for name in (*PARTS, "t0", "t3", "median", "median share"))
    assert ("path tokens" in out) == (width == 120)


def test_jobs_are_chosen(calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["t1/rrm/0", "t2"]
    assert main([str(calm), "--jobs", ",".join(keys), "--json", str(tmp_path / "a.json")]) == 0
    assert [row["key"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]] == ["t1/rrm/0", "t2/rrm/0"]
    assert [trace.key for trace in read_run(calm, keys).jobs] == ["t1/rrm/0", "t2/direct/0", "t2/rrm/0"]
    assert main([str(calm), "--jobs", "t"]) == 2
    assert "there is no such job; there are t0/direct/0" in capsys.readouterr().err

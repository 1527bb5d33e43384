"""The Perfetto trace of recorded runs: its slices, flows, instants and counters are those of the events."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as pb2
from traced import known_graph, recursive

from rrm_engine.runs.events import Event
from rrm_engine.runs.reader import RunTrace, read_run
from rrm_engine.trace.cli import main
from rrm_engine.trace.perfetto import session_shifts


def as_json(event: Event) -> dict[str, Any]:
    return event.as_json()


@pytest.fixture
def exported(each: Path, tmp_path: Path) -> tuple[RunTrace, Any]:
    assert main([str(each), "--perfetto", str(tmp_path / "out.pftrace")]) == 0
    parsed = pb2.Trace()
    parsed.ParseFromString((tmp_path / "out.pftrace").read_bytes())
    assert {packet.trusted_packet_sequence_id for packet in parsed.packet} == {1}
    return read_run(each), parsed


def tracks_of(parsed: Any) -> dict[int, str]:
    """Each track's name, preceded by those of its parents: ``flat-000/rrm/0:root.c1``."""
    found = {p.track_descriptor.uuid: p.track_descriptor for p in parsed.packet if p.HasField("track_descriptor")}
    assert len({d.process.pid for d in found.values() if d.HasField("process")} - {0}) == sum(
        d.HasField("process") for d in found.values()
    )

    def name(uuid: int) -> str:
        descriptor = found[uuid]
        if descriptor.HasField("process"):
            return str(descriptor.process.process_name)
        between = ":" if found[descriptor.parent_uuid].HasField("process") else "."
        return name(descriptor.parent_uuid) + between + str(descriptor.name)

    return {uuid: name(uuid) for uuid in found}


def slices_of(parsed: Any) -> Iterator[tuple[int, str, int, int, tuple[str, ...], Any]]:
    """(track, name, begin, end, names of the slices around it, event); every slice is ended, inside its parents."""
    open_slices: dict[int, list[tuple[int, Any]]] = defaultdict(list)
    times: dict[int, int] = defaultdict(int)
    for packet in parsed.packet:
        event, t = packet.track_event, packet.timestamp
        if event.type not in (pb2.TrackEvent.TYPE_SLICE_BEGIN, pb2.TrackEvent.TYPE_SLICE_END):
            continue
        stack = open_slices[event.track_uuid]
        assert t >= times[event.track_uuid]
        times[event.track_uuid] = t
        if event.type == pb2.TrackEvent.TYPE_SLICE_BEGIN:
            stack.append((t, event))
        else:
            begin, opened = stack.pop()
            yield event.track_uuid, opened.name, begin, t, tuple(e.name for _, e in stack), opened
    assert not any(open_slices.values())


def events_of(parsed: Any, kind: int) -> Iterator[tuple[str, Any, int]]:
    """(track's name, event, time) of all events of one kind."""
    names = tracks_of(parsed)
    for packet in parsed.packet:
        if packet.track_event.type == kind:
            yield names[packet.track_event.track_uuid], packet.track_event, packet.timestamp


def test_slices_are_the_phases_of_the_nodes(exported: tuple[RunTrace, Any]) -> None:
    run, parsed = exported
    names = tracks_of(parsed)
    found: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for track, name, begin, end, around, event in slices_of(parsed):
        found[names[track], name].append((begin, end))
        inside = around[0] if around else ""
        assert inside in {"prefill": ("plan", "solve", "continue"), "queued": ("", "plan", "solve", "continue")}.get(
            name, ("",)
        )
        notes = {note.name: note.int_value for note in event.debug_annotations}
        assert name not in ("plan", "solve", "continue") or notes["tokens"] >= 1
    titles = {"graph": "plan", "solver": "solve", "direct": "solve", "continuation": "continue"}
    expected: dict[tuple[str, str], list[int]] = defaultdict(list)
    for trace in run.jobs:
        for path in trace.nodes:
            for stretch in trace.real(path):
                node = f"{trace.key}:{path}"
                expected[node, "queued"] += [round(end * 1e9) for begin, end in stretch.queued if end > begin]
                if stretch.first is not None:
                    expected[node, "prefill"].append(round(trace.events[stretch.first].t * 1e9))
                    expected[f"{trace.key}:{path}", titles[stretch.phase]].append(round(stretch.end_t * 1e9))
            for _, end in trace.waits(path):
                expected[f"{trace.key}:{path}", "wait"].append(round(trace.events[end].t * 1e9))
    assert {key: [end for _, end in value] for key, value in found.items()} == {k: v for k, v in expected.items() if v}


def test_flows_connect_what_started_whom(exported: tuple[RunTrace, Any]) -> None:
    run, parsed = exported
    names, leaving, arriving = tracks_of(parsed), {}, {}
    for packet in parsed.packet:
        event = packet.track_event
        for flow in event.flow_ids:
            assert flow not in leaving and event.type == pb2.TrackEvent.TYPE_INSTANT
            leaving[flow] = (names[event.track_uuid], event.name, packet.timestamp)
        for flow in event.terminating_flow_ids:
            assert flow not in arriving and event.type == pb2.TrackEvent.TYPE_SLICE_BEGIN
            arriving[flow] = (names[event.track_uuid], packet.timestamp)
    assert leaving.keys() == arriving.keys() and len(leaving) > 0
    edges = set()
    for flow, (source, name, left) in leaving.items():
        target, arrived = arriving[flow]
        assert left <= arrived
        assert name == "concluded" or name.startswith("child ")
        edges.add((source, target, "concluded" if name == "concluded" else "child"))
    expected = set()
    for trace in run.jobs:
        for event in map(as_json, trace.events):
            node = f"{trace.key}:{event['node']}"
            if event["event"] == "start" and "." in event["node"]:
                expected.add((node.rpartition(".")[0], node, "child"))
            for path in event.get("after", ()):
                if path in trace.nodes:
                    expected.add((f"{trace.key}:{path}", node, "concluded"))
    assert edges == expected


def test_instants_are_the_events(exported: tuple[RunTrace, Any]) -> None:
    run, parsed = exported
    found: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for track, event, t in events_of(parsed, pb2.TrackEvent.TYPE_INSTANT):
        found[track].append((event.name, t))
    expected: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for trace in run.jobs:
        for event in map(as_json, trace.events):
            name, t = str(event.get("kind", event["event"])), round(event["t"] * 1e9)
            if name in ("job", "start", "resume", "pause", "first_token", "readmitted"):
                continue
            name = f"child {event['id']}" if name == "child" else name
            repairs = [f"repair {repair}" for repair in event.get("repairs", [])]
            expected[f"{trace.key}:{event['node']}"] += [(n, t) for n in [name, *repairs]]
    assert found == expected


def test_counters_are_the_traces(exported: tuple[RunTrace, Any]) -> None:
    run, parsed = exported
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for track, event, t in events_of(parsed, pb2.TrackEvent.TYPE_COUNTER):
        found[track].append((t, event.counter_value))
    events = sorted((as_json(e) for trace in run.jobs for e in trace.events), key=lambda e: e["t"])
    assert found["engine:KV blocks used"] == [(round(e["t"] * 1e9), e["blocks"]) for e in events]
    live = [dict(found[f"engine:sequences {state}"]) for state in ("running", "queued", "waiting")]
    assert all(min(values.values()) >= 0 and list(values.values())[-1] == 0 for values in live)

    queue = [(t, v) for t, v in found["engine:sequences queued"]]
    queued_ns = sum(v * (after - t) for (t, v), (after, _) in pairwise(queue))
    assert queued_ns / 1e9 == pytest.approx(sum(e.get("queued_s", 0.0) for e in events), abs=0.01)

    def at(moment: int) -> tuple[int, int]:
        now = [next((v for t, v in reversed(values.items()) if t <= moment), 0) for values in live]
        return now[0] + now[1], now[2]

    decoding: set[str] = set()
    waiting: set[str] = set()
    for index, event in enumerate(events):
        who, kind = event["job"] + event["node"], event["event"]
        if kind in ("start", "resume"):
            decoding.add(who)
            waiting.discard(who)
        elif kind == "pause":
            decoding.discard(who)
            waiting |= {who} if event["reason"] not in ("concluded", "cancelled") else set()
        elif kind in ("no_room", "concluded", "cancelled"):
            waiting.discard(who)
        following = events[index + 1] if index + 1 < len(events) else None
        ends = following is not None and following["event"] == "concluded" and kind == "pause"
        if following is not None and following["t"] > event["t"] and not ends:
            assert at(round(event["t"] * 1e9)) == (len(decoding), len(waiting)), event


def test_a_job_that_failed_is_exported_but_not_attributed(record_tiny: Callable[..., Path], tmp_path: Path) -> None:
    run = record_tiny(1, fail_at=130, modes=("rrm",))
    (trace,) = read_run(run).jobs
    assert trace.row["status"] == "failed" and "ZeroDivisionError" in str(trace.row["error"])
    assert main([str(run), "--perfetto", str(tmp_path / "out")]) == 0
    parsed = pb2.Trace()
    parsed.ParseFromString((tmp_path / "out").read_bytes())
    assert {name for _, name, *_ in slices_of(parsed)} >= {"plan", "prefill"}
    assert recursive(run) == []


def test_sessions_whose_clock_went_back_follow_each_other() -> None:
    first = known_graph()
    later = replace(first, session=1)
    much_later = replace(later, session=2, events=[replace(e, t=e.t + 1e6) for e in first.events])
    shifts = session_shifts([much_later, later, first])
    assert shifts[0] == 0 and shifts[1] == first.events[-1].t + 1 and shifts[2] == 0


def test_refusals(calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no rows.jsonl; pass the directory of a recorded run" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "perfetto", None)
    for name in [name for name in sys.modules if name.startswith("perfetto.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main([str(calm), "--perfetto", str(tmp_path / "x")]) == 2
    assert "pip install rrm-engine[trace]" in capsys.readouterr().err and not (tmp_path / "x").exists()

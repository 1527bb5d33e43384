"""Recorded runs of the real solver, read back: the latency in parts, and the Perfetto trace."""

import copy
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rrm_engine.backends.local import Solver
from rrm_engine.bench.progress import SilentDisplay
from rrm_engine.bench.run import execute, plan
from rrm_engine.bench.tasks import Task, load_tasks
from rrm_engine.config import RunConfig
from rrm_engine.trace.attribution import PARTS, Attribution, attribute, is_attributed
from rrm_engine.trace.checks import build, critical_path_tokens
from rrm_engine.trace.cli import main
from rrm_engine.trace.perfetto import session_shifts
from rrm_engine.trace.reader import RunTrace, TraceError, read_run
from rrm_engine.trace.record import RunDir, row_key
from rrm_engine.trace.timeline import Event, Incomplete, JobTrace

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPES = [
    '{"type":"child","id":"c1","task":"Find a + b.","depends_on":[]}\n{"type":"child","id":"c2","task":"',
    '{"type":"await","children":["c1","c2"],"rule":"c1 + c2"}\n{"type":"atomic","answer":"So FINAL: 204"}\n',
    "".join(map(chr, range(32, 127))) + "\n",
]
TASKS = [Task(f"t{i}", f"What is {i} + {i * i}?", str(i + i * i)) for i in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3 with a small BPE vocabulary in which many tokens begin or end a string."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core.train_from_iterator(SHAPES * 4, trainers.BpeTrainer(vocab_size=180, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id,
    )
    path = tmp_path_factory.mktemp("model")
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def record(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def run(tasks: int, fail_at: int = 0, **settings: Any) -> Path:
        config = RunConfig(
            model=str(model),
            prompt_style="embedded",
            constrain="on",
            temperature=1.0,
            direct_max_tokens=30,
            planner_max_tokens=220,
            solver_max_tokens=40,
            continuation_max_tokens=60,
            **settings,
        )
        chosen = TASKS[:tasks]
        solver = Solver.load(config, [task.problem for task in chosen])
        if fail_at:
            step = solver.engine.step
            solver.engine.step = lambda: step() if solver.engine.steps < fail_at else 1 / 0  # type: ignore
        directory = RunDir.create(tmp_path_factory.mktemp("runs") / "run")
        execute(solver, plan(chosen, solver.resolved), chosen, directory, SilentDisplay())
        solver.close()
        directory.close()
        return directory.path

    return run


@pytest.fixture(scope="module")
def calm(record: Callable[..., Path]) -> Path:
    """Two tasks at a time, a place for everybody."""
    return record(4, task_concurrency=2)


@pytest.fixture(scope="module")
def crowded(record: Callable[..., Path]) -> Path:
    """Three tasks at once in two places and little memory, prompts in small chunks, children forked."""
    settings = {"max_sequence_tokens": 700, "block_size": 4, "kv_blocks": 180, "step_tokens": 16}
    return record(
        3, modes=("rrm",), task_concurrency=3, max_concurrency=2, child_context="parent", max_depth=1, **settings
    )


@pytest.fixture(scope="module")
def cramped(record: Callable[..., Path]) -> Path:
    """Sequences so short that some nodes cannot start or go on."""
    return record(3, modes=("rrm",), max_sequence_tokens=375, child_context="parent")


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged model, whose graphs lead to answers."""
    tasks = load_tasks("embedded").tasks[:1]
    solver = Solver.load(RunConfig(modes=("rrm",)), [task.problem for task in tasks])
    directory = RunDir.create(tmp_path_factory.mktemp("runs") / "run")
    execute(solver, plan(tasks, solver.resolved), tasks, directory, SilentDisplay())
    directory.close()
    return directory.path


def recursive(path: Path) -> list[tuple[JobTrace, Attribution]]:
    run = read_run(path)
    assert not run.incomplete
    return [(trace, attribute(trace)) for trace in run.jobs if is_attributed(trace)]


@pytest.fixture(params=["calm", "crowded", "cramped", "packaged"])
def each(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


# the recorded runs are worth the tests


def test_the_runs_hold_what_is_to_be_tested(calm: Path, crowded: Path, cramped: Path, packaged: Path) -> None:
    traces = [trace for trace, _ in recursive(calm)]
    assert len(traces) == 4
    events = [event for trace in traces for event in trace.events]
    assert {e["kind"] for e in events if e["event"] == "event"} >= {"child", "await", "atomic"}
    assert any(s.phase == "continuation" and len(s.after) > 1 for t in traces for n in t.nodes.values() for s in n)
    assert any(path.count(".") == 2 for trace in traces for path in trace.nodes)
    stretches = [s for trace, _ in recursive(crowded) for found in trace.nodes.values() for s in found]
    assert any(s.admitted_t > s.ready_t for s in stretches) and any(s.put_back for s in stretches)
    refused = {trace.nodes[e["node"]][0].phase for trace, _ in recursive(cramped) for e in trace.events if no_room(e)}
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
    """One token a step for everybody from the step after the start on: what takes longest has most tokens."""
    comparable = 0
    for trace, found in recursive(calm):
        stretches = [s for path in trace.nodes for s in trace.real(path) if s.first is not None]
        delays = {trace.events[s.first or 0]["step"] - trace.events[s.begin]["step"] for s in stretches}
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
            stretch = next(s for s in trace.nodes[hop.node] if s.ready_t - trace.events[0]["t"] == hop.ready_s)
            over = {p: trace.events[trace.over[p]]["t"] for p in stretch.after if p in trace.nodes}
            if trace.events[stretch.begin]["event"] == "resume" and before:
                last = max(over, key=lambda p: over[p], default=hop.node)
                pause = next(e for e in reversed(trace.events[: stretch.begin]) if is_pause(e, hop.node))
                assert before.node == (last if over and over[last] > pause["t"] else hop.node)
        assert sum(hop.tokens for hop in hops) == found.path_tokens


def no_room(event: Event) -> bool:
    return bool(event["event"] == "no_room")


def is_pause(event: Event, node: str) -> bool:
    return bool(event["event"] == "pause" and event["node"] == node)


def test_first_tokens_and_resumes_are_where_the_row_measured_them(each: Path) -> None:
    for trace, _ in recursive(each):
        first = next(e for e in trace.events if e["event"] == "first_token")
        assert first["t"] - trace.events[0]["t"] == pytest.approx(trace.row["ttft_s"], abs=0.02)
        stretches = [s for path in trace.nodes for s in trace.real(path) if s.first is not None]
        resumed = [s.first_t - s.ready_t for s in stretches if trace.events[s.begin]["event"] == "resume"]
        assert sorted(resumed) == pytest.approx(sorted(trace.row["resume_latency_s"]), abs=0.02)


def test_queueing_is_found_where_steps_were_missed_and_only_there(each: Path) -> None:
    for trace, found in recursive(each):
        for stretch in (s for path in trace.nodes for s in trace.real(path) if s.first is not None):
            missed = trace.events[stretch.first]["step"] - trace.events[stretch.begin]["step"] - 1
            assert missed > 0 or stretch.admitted_t == stretch.ready_t
            steps = trace.events[stretch.end]["step"] - trace.events[stretch.first]["step"]
            sampled = trace.tokens_to(stretch, stretch.end)
            assert bool(stretch.put_back) == (steps + 1 > sampled)
        assert found.parts["queued"] < found.latency_s


def test_a_prompt_in_many_chunks_is_prefill_and_not_queueing(crowded: Path) -> None:
    trace = min((trace for trace, _ in recursive(crowded)), key=lambda trace: trace.events[0]["t"])
    root = trace.nodes["root"][0]
    assert root.first is not None and trace.events[root.first]["step"] - trace.events[root.begin]["step"] > 5
    assert root.admitted_t == root.ready_t < root.first_t


def test_the_parts_of_a_known_graph() -> None:
    """Two children, one of them slower by itself; every time is a power of two, so that each part is one sum."""
    found = attribute(known_graph())
    assert found.parts == {
        "root": 8 + 16 + 4096,  # 4096 behind the resume
        "children": 128,
        "straggler": 512,
        "prefill": 4 + 32 + 2048,
        "queued": 2 + 64 + 1024,
        "gaps": 1 + 256 + 8192,
    }
    assert [(hop.node, hop.tokens) for hop in found.hops] == [("root", 5), ("root.b", 9), ("root", 3)]


def known_graph() -> JobTrace:
    t, events = 0.0, []

    def add(seconds: float, event: str, node: str = "root", **fields: Any) -> None:
        nonlocal t
        t += seconds
        base = {"t": t, "job": "x/rrm/0", "node": node, "step": len(events), "event": event, "blocks": 0}
        events.append({**base, "tokens": 0, **fields})

    add(0, "job")
    add(1, "start", phase="graph", after=[], tokens=10)
    add(2 + 4, "first_token", queued_s=2, tokens=11)
    add(8, "event", kind="child", child="root.a", id="a", tokens=13)
    add(0, "start", "root.a", phase="solver", after=[], tokens=20)
    add(16, "event", kind="child", child="root.b", id="b", tokens=15)
    add(0, "start", "root.b", phase="solver", after=[], tokens=30)
    add(1, "first_token", "root.a", queued_s=0, tokens=21)
    add(1, "pause", reason="await", tokens=15)
    add(30, "first_token", "root.b", queued_s=0, tokens=31)
    add(64 + 128, "readmitted", "root.b", queued_s=64, ran_s=0, tokens=32)
    add(0, "pause", "root.a", reason="concluded", tokens=22)
    add(0, "concluded", "root.a", sampled=[[20, 22]], tokens=22)
    add(512, "pause", "root.b", reason="concluded", tokens=39)
    add(256, "concluded", "root.b", sampled=[[30, 39]], tokens=39)
    add(0, "resume", phase="continuation", after=["root.a", "root.b"], tokens=50)
    add(1024 + 2048, "first_token", queued_s=1024, tokens=51)
    add(4096, "pause", reason="concluded", tokens=53)
    add(0, "concluded", sampled=[[10, 15], [50, 53]], tokens=53)
    add(8192, "finish", tokens=53, events=20)
    row = {"id": "x", "mode": "rrm", "sample": 0, "status": "graph", "latency_s": t, "preemptions": 0}
    return build("x/rrm/0", 0, events, {**row, "nodes": 3, "resumes": 1, "critical_path_tokens": 5 + 9 + 3})


# the Perfetto trace


@pytest.fixture
def exported(each: Path, tmp_path: Path) -> tuple[RunTrace, Any]:
    assert main([str(each), "--perfetto", str(tmp_path / "out.pftrace")]) == 0
    parsed = pb2.Trace()
    parsed.ParseFromString((tmp_path / "out.pftrace").read_bytes())
    assert {packet.trusted_packet_sequence_id for packet in parsed.packet} == {1}
    return read_run(each), parsed


def tracks_of(parsed: Any) -> dict[int, str]:
    """Each track's name behind that of its parents: ``flat-000/rrm/0:root.c1``."""
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
                track = f"{trace.key}:{path}"
                expected[track, "queued"] += [round(end * 1e9) for begin, end in stretch.queued if end > begin]
                if stretch.first is not None:
                    expected[track, "prefill"].append(round(trace.events[stretch.first]["t"] * 1e9))
                    expected[f"{trace.key}:{path}", titles[stretch.phase]].append(round(stretch.end_t * 1e9))
            for _, end in trace.waits(path):
                expected[f"{trace.key}:{path}", "wait"].append(round(trace.events[end]["t"] * 1e9))
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
        for event in trace.events:
            node = f"{trace.key}:{event['node']}"
            if event["event"] == "start" and "." in event["node"]:
                expected.add((node.rpartition(".")[0], node, "child"))
            for path in event.get("after", ()):
                if path in trace.nodes:
                    expected.add((f"{trace.key}:{path}", node, "concluded"))
    assert edges == expected


def test_instants_are_the_events(exported: tuple[RunTrace, Any]) -> None:
    run, parsed = exported
    names = tracks_of(parsed)
    found: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for packet in parsed.packet:
        if packet.track_event.type == pb2.TrackEvent.TYPE_INSTANT:
            found[names[packet.track_event.track_uuid]].append((packet.track_event.name, packet.timestamp))
    expected: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for trace in run.jobs:
        for event in trace.events:
            name, t = event.get("kind", event["event"]), round(event["t"] * 1e9)
            if name in ("job", "start", "resume", "pause", "first_token", "readmitted"):
                continue
            name = f"child {event['id']}" if name == "child" else name
            repairs = [f"repair {repair}" for repair in event.get("repairs", [])]
            expected[f"{trace.key}:{event['node']}"] += [(n, t) for n in [name, *repairs]]
    assert found == expected


def test_counters_are_the_traces(exported: tuple[RunTrace, Any]) -> None:
    run, parsed = exported
    names = tracks_of(parsed)
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for packet in parsed.packet:
        if packet.track_event.type == pb2.TrackEvent.TYPE_COUNTER:
            found[names[packet.track_event.track_uuid]].append((packet.timestamp, packet.track_event.counter_value))
    events = sorted((e for trace in run.jobs for e in trace.events), key=lambda e: e["t"])
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


def test_a_job_that_failed_is_exported_but_not_attributed(record: Callable[..., Path], tmp_path: Path) -> None:
    run = record(1, fail_at=130, modes=("rrm",))
    (trace,) = read_run(run).jobs
    assert trace.row["status"] == "failed" and "ZeroDivisionError" in trace.row["error"]
    assert main([str(run), "--perfetto", str(tmp_path / "out")]) == 0
    parsed = pb2.Trace()
    parsed.ParseFromString((tmp_path / "out").read_bytes())
    assert {name for _, name, *_ in slices_of(parsed)} >= {"plan", "prefill"}
    assert recursive(run) == []


def test_sessions_whose_clock_went_back_follow_each_other() -> None:
    first = known_graph()
    later = replace(first, session=1)
    much_later = replace(later, session=2, events=[{**e, "t": e["t"] + 1e6} for e in first.events])
    shifts = session_shifts([much_later, later, first])
    assert shifts[0] == 0 and shifts[1] == first.events[-1]["t"] + 1 and shifts[2] == 0


# what is not there is never made up


def without(trace: JobTrace, drop: int, recount: bool) -> JobTrace:
    events = copy.deepcopy(trace.events)
    del events[drop]
    if recount and events[-1]["event"] == "finish":
        events[-1]["events"] -= 1
    return build(trace.key, trace.session, events, trace.row)


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
        needed = event["event"] not in ("event", "malformed", "readmitted", "no_room")
        if (needed and index not in short) or event.get("child") in trace.nodes:
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
        build(trace.key, trace.session, trace.events, {**trace.row, **change})


def edited(source: Path, target: Path, edit: Callable[[list[Event], list[Event]], None]) -> Path:
    """A copy of a run with its rows and events changed."""
    rows, events = ([json.loads(line) for line in (source / n).open()] for n in ("rows.jsonl", "trace.jsonl"))
    edit(rows, events)
    target.mkdir()
    for name, values in (("rows.jsonl", rows), ("trace.jsonl", events)):
        (target / name).write_text("".join(json.dumps(value) + "\n" for value in values))
    return target


def test_the_command_leaves_out_what_is_incomplete_and_says_so(
    calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose_a_resume(rows: list[Event], events: list[Event]) -> None:
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
    def interrupt_first(rows: list[Event], events: list[Event]) -> None:
        key = row_key(rows[0])
        began = [dict(e) for e in events if e["job"] == key][:3]
        for item in (rows[0], *(e for e in events if e["job"] == key)):
            item["session"] = 1
        events[:0] = began

    def kill_last(rows: list[Event], events: list[Event]) -> None:
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
    with pytest.raises(TraceError, match=r"trace.jsonl, line \d+: not what"):
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


def test_refusals(calm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no rows.jsonl; pass the directory of a recorded run" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "perfetto", None)
    for name in [name for name in sys.modules if name.startswith("perfetto.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main([str(calm), "--perfetto", str(tmp_path / "x")]) == 2
    assert "pip install rrm-engine[trace]" in capsys.readouterr().err and not (tmp_path / "x").exists()

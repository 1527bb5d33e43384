"""--profile on the real engine: which ranges there are, for which nodes, when; what it writes; and that off is off."""

import gzip
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from oracle import compiled, engine_for, plain_model, prepared, prompt
from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as pb2
from rrm_kernels.native import load_native_layer
from rrm_kernels.products import NativeLinear

import rrm_engine.trace.profile as profile_module
from rrm_engine import Solver
from rrm_engine.bench.cli import main as bench
from rrm_engine.bench.tasks import load_tasks
from rrm_engine.engine.runner import ModelRunner
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.scheduler import SchedulerOutput
from rrm_engine.models.fuse import PackedLinear
from rrm_engine.runs.events import JobBegan, Paused
from rrm_engine.runs.reader import read_run
from rrm_engine.trace.cli import main as trace_command
from rrm_engine.trace.kernel_names import KERNELS
from rrm_engine.trace.perfetto import ranges_of
from rrm_engine.trace.profile import WARM_UP, Profile
from rrm_engine.trace.profile_reader import (
    PROFILE,
    SUMMARY,
    Range,
    RecordedProfile,
    from_chrome,
    range_table,
    read_profile,
)

STEPS = 20
FORWARDS = ("prefill", "decode", "prefill+decode")
CLOCK_S = 1e-4  # far below a step; what the two clocks may differ by

Spied = list[dict[str, int]]  # of each forward: tokens by key of the sequence


def spy(patch: pytest.MonkeyPatch) -> Spied:
    """What the runner was really given, step by step."""
    seen: Spied = []
    run = ModelRunner.run

    def spying(self: ModelRunner, step: SchedulerOutput, *rest: Any) -> Any:
        seen.append({work.sequence.key: work.count for work in step.work})
        return run(self, step, *rest)

    patch.setattr(ModelRunner, "run", spying)
    return seen


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Spied]:
    """A bench run with --profile, and the work of its steps."""
    directory = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        seen = spy(patch)
        arguments = ["--limit", "1", "--modes", "rrm", "--quiet", "--profile", str(STEPS), "--out", str(directory)]
        assert bench(arguments) == 0
    solving = [step for step in seen if all(key.startswith("flat-") for key in step)]  # not those of the load check
    return directory, solving[WARM_UP : WARM_UP + STEPS]


@pytest.fixture
def profile(recorded: tuple[Path, Spied]) -> RecordedProfile:
    found = read_profile(recorded[0])
    assert found is not None
    return found


# ranges


def test_every_step_has_its_ranges(profile: RecordedProfile) -> None:
    steps = [outer for outer in profile.outer if outer.name == "step"]
    assert [step.args["step"] for step in steps] == list(range(WARM_UP + 1, WARM_UP + STEPS + 1))
    for step in steps:
        names = [r.name for r in step.inner]
        assert [*names[:2], *names[3:]] == ["schedule", "pack", "sample", "collect", "parse"] and names[2] in FORWARDS
        assert {r.name for r in step.walk()} <= {"step", *names, "graph"}
    assert any(r.name == "graph" for r in profile.ranges) and any(r.name == "prefill+decode" for r in profile.ranges)


def wrong_nodes(profile: RecordedProfile, spied: Spied) -> list[int]:
    """Steps in which a range names others than the runner worked for."""
    wrong = []
    for outer, work in zip([r for r in profile.outer if r.name == "step"], spied, strict=True):
        found = {r.name: r.args["nodes"] for r in outer.inner}
        forward = next(found[name] for name in FORWARDS if name in found)
        schedule, pack, sample, parse = ({*found[name]} for name in ("schedule", "pack", "sample", "parse"))
        if forward != work or not sample == parse <= pack == {*work} <= schedule:
            wrong.append(outer.args["step"])
    return wrong


def test_ranges_name_the_nodes_they_worked_for(recorded: tuple[Path, Spied], profile: RecordedProfile) -> None:
    spied = recorded[1]
    assert {len(work) for work in spied} >= {1, 2}  # with children beside their parent
    assert {key for work in spied for key in work} >= {"flat-000/rrm/0:root", "flat-000/rrm/0:root.a"}
    assert wrong_nodes(profile, spied) == []
    changes = [i for i in range(1, STEPS) if spied[i] != spied[i - 1]]
    assert len(wrong_nodes(profile, spied[-1:] + spied[:-1])) >= len(changes) > 0  # control: off by a step


def test_a_forward_is_named_by_what_it_holds(recorded: tuple[Path, Spied], profile: RecordedProfile) -> None:
    for forward, work in zip([r for r in profile.ranges if r.name in FORWARDS], recorded[1], strict=True):
        prefilled = sum(count for count in work.values() if count > 1)
        decoded = sum(count for count in work.values() if count == 1)
        assert (forward.args["prefill_tokens"], forward.args["decode_tokens"]) == (prefilled, decoded)
        assert forward.name == "+".join(["prefill"] * bool(prefilled) + ["decode"] * bool(decoded))


def coverage(steps: list[Range], names: Callable[[str], bool]) -> float:
    return median(sum(r.seconds for r in step.inner if names(r.name)) / step.seconds for step in steps)


def test_ranges_cover_most_of_the_steps(profile: RecordedProfile) -> None:
    steps = [outer for outer in profile.outer if outer.name == "step"]
    assert 0.85 < coverage(steps, lambda name: True) <= 1
    assert coverage(steps, lambda name: name not in FORWARDS) < 0.85  # control: without the forwards


# a profiled run on disk


def test_the_files_parse_and_the_table_adds_up(recorded: tuple[Path, Spied], profile: RecordedProfile) -> None:
    text = (recorded[0] / SUMMARY).read_text()
    assert text.startswith(range_table(profile)) and "aten::" in text and "flat-000/rrm/0" in text
    lines = text.split("\n\n")[1].splitlines()[1:]
    shares = {line[:16].strip(): float(line.split()[-1].rstrip("%")) for line in lines}
    assert {"decode", "prefill+decode", "schedule", "sample", "parse", "graph", "pack"} <= shares.keys()
    assert sum(shares.values()) == pytest.approx(100, abs=0.1 * len(shares))
    assert {p.name for p in recorded[0].iterdir()} == {
        *("run.json", "rows.jsonl", "trace.jsonl", "summary.json", PROFILE, SUMMARY)
    }


def test_a_second_profile_in_one_directory_is_refused(
    recorded: tuple[Path, Spied], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(["--resume", str(recorded[0]), "--profile"]) == 2
    assert f"move its {PROFILE} away, or leave --profile out" in capsys.readouterr().err
    for arguments, reason in ((["--profile", "0"], "at least 1"), (["--profile", "embedded"], "tasks before it")):
        with pytest.raises(SystemExit) as stopped:
            bench([*arguments, "--out", str(tmp_path / "x")])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and "--profile" in error and reason in error


def test_times_on_a_device_are_told_beside_those_on_the_host(recorded: tuple[Path, Spied]) -> None:
    """Such events as torch writes for CUDA, added by hand to a trace that has none."""
    trace = json.loads(gzip.decompress((recorded[0] / PROFILE).read_bytes()))
    assert " device " not in range_table(from_chrome(trace))
    kernels = {"ph": "X", "cat": "gpu_user_annotation", "name": "decode", "ts": 1.0, "dur": 1500.0}
    trace["traceEvents"] += [kernels, kernels, {**kernels, "name": "of somebody else"}]
    found = from_chrome(trace)
    assert found.device_s == {"decode": pytest.approx(0.003)}
    assert [line[:6] for line in range_table(found).splitlines() if " device 3.00 ms" in line] == ["decode"]


# the clocks


def misplaced(directory: Path, profile: RecordedProfile) -> list[str]:
    """Events outside of the parse range of the step that they belong to, or of any step."""
    ranges = {r.args["step"]: r for r in profile.ranges if r.name == "parse"}
    (trace,) = read_run(directory).jobs
    found = []
    for event in trace.events:
        parse = ranges.get(event.step)
        in_step = (
            isinstance(event, JobBegan) or parse is None or parse.start - CLOCK_S <= event.t <= parse.end + CLOCK_S
        )
        if not in_step:
            found.append(event.EVENT)
    return found


def shifted(profile: RecordedProfile, by: float) -> RecordedProfile:
    def shift(one: Range) -> Range:
        return replace(one, start=one.start + by, end=one.end + by, inner=[shift(r) for r in one.inner])

    return replace(profile, outer=[shift(one) for one in profile.outer])


def test_ranges_are_on_the_clock_of_the_events(recorded: tuple[Path, Spied], profile: RecordedProfile) -> None:
    directory = recorded[0]
    assert profile.about["clock_error_s"] < CLOCK_S
    assert misplaced(directory, profile) == []
    step = median(outer.seconds for outer in profile.outer if outer.name == "step")
    for by in (-1.0, -step, step, 1.0):  # control: a clock that is wrong by a step or a second
        assert misplaced(directory, shifted(profile, by))


# in the Perfetto trace


def slices(parsed: Any) -> dict[str, list[tuple[str, int, int, Any]]]:
    """(name, begin, end, event) of every slice, by process and track; each ends, in the order of nesting."""
    names, parents = {}, {}
    for packet in parsed.packet:
        if packet.HasField("track_descriptor"):
            d = packet.track_descriptor
            names[d.uuid] = d.process.process_name if d.HasField("process") else d.name
            parents[d.uuid] = d.parent_uuid
    full: Callable[[int], str] = lambda t: f"{full(parents[t])}|{names[t]}" if parents[t] else names[t]  # noqa: E731
    found, stacks = defaultdict(list), defaultdict(list)
    for packet in parsed.packet:
        event = packet.track_event
        if event.type == pb2.TrackEvent.TYPE_SLICE_BEGIN:
            stacks[event.track_uuid].append((packet.timestamp, event))
        elif event.type == pb2.TrackEvent.TYPE_SLICE_END:
            begin, opened = stacks[event.track_uuid].pop()
            found[full(event.track_uuid)].append((opened.name, begin, packet.timestamp, opened))
    assert not any(stacks.values())
    return found


def exported(directory: Path, out: Path) -> Any:
    assert trace_command([str(directory), "--perfetto", str(out)]) == 0
    parsed = pb2.Trace()
    parsed.ParseFromString(out.read_bytes())
    return parsed


def outside(parsed: Any, by: int = 0) -> Iterator[str]:
    """Forwards, moved by some nanoseconds, that are not inside a phase of every node they name."""
    tracks = slices(parsed)
    for name, begin, end, event in tracks["profiler|ranges"]:
        if name in FORWARDS:
            (nodes,) = (note.dict_entries for note in event.debug_annotations if note.name == "nodes")
            for node in nodes:
                phases = tracks[node.name.replace(":", "|", 1).replace(".", "|")]
                if not any(p[1] <= begin + by and end + by <= p[2] for p in phases if p[0] in ("plan", "solve")):
                    yield node.name


def test_ranges_are_merged_into_the_perfetto_trace(
    recorded: tuple[Path, Spied], profile: RecordedProfile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parsed = exported(recorded[0], tmp_path / "out.pftrace")
    assert f"profiled steps {STEPS}" in capsys.readouterr().out
    found = slices(parsed)["profiler|ranges"]
    steps = [r for outer in profile.outer if outer.name == "step" for r in outer.walk()]
    assert sorted((n, b, e) for n, b, e, _ in found) == sorted(
        (r.name, round(r.start * 1e9), round(r.end * 1e9)) for r in steps
    )
    assert list(outside(parsed)) == []
    assert list(outside(parsed, by=10**9)) and list(outside(parsed, by=-(10**9)))  # control: a second off


def test_only_steps_of_the_exported_jobs_are_merged(recorded: tuple[Path, Spied], profile: RecordedProfile) -> None:
    jobs = read_run(recorded[0]).jobs
    assert len(ranges_of(profile, jobs)) == STEPS
    assert ranges_of(profile, [replace(jobs[0], key="other/rrm/0")]) == []
    assert ranges_of(profile, [replace(jobs[0], session=1)]) == []


def test_a_damaged_profile_is_refused(
    recorded: tuple[Path, Spied], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("rows.jsonl", "trace.jsonl"):
        (tmp_path / name).write_bytes((recorded[0] / name).read_bytes())
    (tmp_path / PROFILE).write_bytes((recorded[0] / PROFILE).read_bytes()[:-100])
    assert trace_command([str(tmp_path), "--perfetto", str(tmp_path / "out")]) == 2
    assert "move it away to export without it" in capsys.readouterr().err


def test_counters_of_blocks_are_in_the_perfetto_trace(recorded: tuple[Path, Spied], tmp_path: Path) -> None:
    parsed = exported(recorded[0], tmp_path / "out.pftrace")
    uuids = {
        packet.track_descriptor.uuid: packet.track_descriptor.name
        for packet in parsed.packet
        if packet.track_descriptor.HasField("counter")
    }
    found = defaultdict(list)
    for packet in parsed.packet:
        if packet.track_event.type == pb2.TrackEvent.TYPE_COUNTER:
            found[uuids[packet.track_event.track_uuid]].append(packet.track_event.counter_value)
    (trace,) = read_run(recorded[0]).jobs
    for field, title in (("blocks", "used"), ("pinned", "pinned"), ("offloaded", "offloaded")):
        assert found[f"KV blocks {title}"] == [getattr(event, field) for event in trace.events]
    paused = next(i for i, e in enumerate(trace.events) if isinstance(e, Paused) and e.reason == "await")
    assert not any(e.pinned for e in trace.events[:paused]) and trace.events[paused].pinned > 0
    assert trace.events[-1].pinned == trace.events[-1].blocks == 0


# the engine's rarer ranges


def test_copies_and_swaps_name_whose_blocks_they_move(tmp_path: Path) -> None:
    engine = engine_for(prepared(plain_model("qwen3")), wait_policy="offload", host_blocks=50)
    profile = Profile(torch.device("cpu"), 100, warm_up=0)
    engine.announce_to(profile)

    def step() -> None:
        with profile.step(engine.steps + 1):
            engine.step()

    parent = engine.submit("job:root", prompt(1, 10), 20, SamplingParams())
    step()
    engine.pause(parent)
    child = engine.submit("job:root.a", [*parent.tokens[:10], 7], 20, SamplingParams(), fork_of=(parent, 10))
    other = engine.submit("job:root.b", prompt(2, 9), 20, SamplingParams())
    assert engine.scheduler.pinned_blocks == len(set(parent.table.blocks)) == 3
    engine.pause(child)
    assert engine.scheduler.pinned_blocks == 3  # shared, so counted once
    engine.scheduler.add(child)
    step()  # the child writes after the shared prefix
    engine.wait(parent)
    moved = engine.space.num_used
    assert moved > 0 and engine.scheduler.pinned_blocks == 3 - moved
    step()  # out
    engine.resume(parent, [5, 6], 5)
    step()  # and in
    assert engine.space.num_used == 0 and child.counters.copied_blocks == 1
    for sequence in (parent, child, other):
        engine.finish(sequence)
    profile.write(tmp_path)
    found = read_profile(tmp_path)
    assert found is not None
    told = [(r.args["step"], r.name, list(r.args["nodes"])) for r in found.ranges if r.name in ("offload", "fork copy")]
    assert told == [
        (2, "fork copy", ["job:root.a"]),
        (3, "offload", ["job:root"]),
        (4, "offload", ["job:root"]),
    ]
    assert [r.name for r in found.ranges if r.name in FORWARDS] == ["prefill", "prefill", "decode", "prefill+decode"]


def test_whose_kv_is_taken_and_for_whom(tmp_path: Path) -> None:
    engine = engine_for(prepared(plain_model("qwen3")), blocks=8, max_sequence_tokens=32, prefix_cache=False)
    profile = Profile(torch.device("cpu"), 100, warm_up=0)
    engine.announce_to(profile)
    for i in range(2):
        engine.submit(f"job{i}:root", prompt(i, 12), 18, SamplingParams(), root=i)
    while engine.has_work:
        with profile.step(engine.steps + 1):
            engine.step()
    profile.write(tmp_path)
    found = read_profile(tmp_path)
    assert found is not None
    taken = [(r.args["nodes"], r.args["needed_by"]) for r in found.ranges if r.name == "reclaim"]
    one, other = (["job1:root"], "job0:root"), (["job0:root"], "job1:root")  # which has paused by then
    assert taken == [one, other]


# operators


def operators_of_forwards(directory: Path) -> list[Counter[str]]:
    """By name the operators and compiled kernels that ran within each forward."""
    trace = json.loads(gzip.decompress((directory / PROFILE).read_bytes()))
    assert trace["schemaVersion"] == 1 and trace["rrm_engine"]["session"] == 0
    of = lambda category: [e for e in trace["traceEvents"] if e.get("cat") == category]  # noqa: E731
    forwards = [(e["ts"], e["ts"] + e["dur"]) for e in of("user_annotation") if e["name"] in FORWARDS]
    found = [(e["ts"], e["name"]) for e in of("cpu_op")]
    return [Counter(name for ts, name in found if start <= ts <= stop) for start, stop in forwards]


def products(operators: Counter[str]) -> int:
    """The methods that multiply."""
    return sum(operators[name] for name in ("rrm::linear", "aten::linear", "mkldnn::_linear_pointwise"))


def kernels(forwards: list[Counter[str]]) -> int:
    return sum(forward[name] for forward in forwards for name, *_ in KERNELS)


def test_the_trace_file_is_one_that_torch_wrote(recorded: tuple[Path, Spied], solver: Solver) -> None:
    """What was added is in args of its events and in one entry; every product of every forward is in it."""
    forwards = operators_of_forwards(recorded[0])
    assert [products(forward) for forward in forwards] == [4 * len(solver.model.shapes) + 1] * STEPS
    if isinstance(PackedLinear(torch.ones(8, 8), None).product, NativeLinear):
        assert "rrm::linear" in (recorded[0] / SUMMARY).read_text()


def test_compiled_kernels_are_named_while_they_are_recorded(recorded: tuple[Path, Spied], solver: Solver) -> None:
    compiled(load_native_layer)
    layers = len(solver.model.shapes)
    calls = {"paged_attention": layers, "rope_store": layers, "silu_mul": layers, "norm": 1, "add_norm": 2 * layers}
    for forward in operators_of_forwards(recorded[0]):
        assert {name: forward[f"rrm::{name}"] for name in calls} == calls


def test_kernels_have_no_names_before_and_after(
    solver: Solver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off, they are called as ever; and a profile without names is the control of the two tests above."""
    compiled(load_native_layer)
    as_ever = [getattr(owner, method) for _, owner, method in KERNELS]
    seen: list[bool] = []

    def look(event: dict[str, Any]) -> None:
        seen.append([getattr(owner, method) for _, owner, method in KERNELS] == as_ever)

    with solver.profile(tmp_path / "named", 5, session=0):
        solver.solve(load_tasks("embedded").tasks[0].problem, on_event=look)
    assert seen[0] and seen[-1] and [getattr(owner, method) for _, owner, method in KERNELS] == as_ever
    monkeypatch.setattr(profile_module, "named_kernels", nullcontext)
    with solver.profile(tmp_path / "nameless", 5, session=0):
        solver.solve(load_tasks("embedded").tasks[0].problem)
    named, nameless = (kernels(operators_of_forwards(tmp_path / name)) for name in ("named", "nameless"))
    assert named >= 5 * (5 * len(solver.model.shapes) + 1) and nameless == 0

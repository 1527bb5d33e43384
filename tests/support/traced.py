"""Runs of a tiny random model as the bench records them, for the tests of what is read back from them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from oracle import SPECIAL, chat_model, chat_tokenizer

from rrm_engine.backends.local import Solver
from rrm_engine.bench.progress import SilentDisplay
from rrm_engine.bench.run import execute, plan
from rrm_engine.bench.tasks import Task
from rrm_engine.config import RunConfig
from rrm_engine.graph.types import Phase, Status
from rrm_engine.runs.directory import RunDir
from rrm_engine.runs.events import (
    Concluded,
    Event,
    Finished,
    FirstToken,
    JobBegan,
    Paused,
    Range,
    Readmitted,
    Resumed,
    Started,
    Transcript,
    WroteChild,
)
from rrm_engine.runs.reader import RecordedJob, believed, read_run
from rrm_engine.runs.rows import Row
from rrm_engine.runs.timeline import JobTrace
from rrm_engine.trace.attribution import Attribution, attribute, is_attributed

SHAPES = [
    '{"type":"child","id":"c1","task":"Find a + b.","depends_on":[]}\n{"type":"child","id":"c2","task":"',
    '{"type":"await","children":["c1","c2"],"rule":"c1 + c2"}\n{"type":"atomic","answer":"So FINAL: 204"}\n',
    "".join(map(chr, range(32, 127))) + "\n",
]
TASKS = [Task(f"t{i}", f"What is {i} + {i * i}?", str(i + i * i)) for i in range(4)]


def save_model(path: Path) -> None:
    """A tiny random Qwen3 with a small BPE vocabulary in which many tokens begin or end a string."""
    tokenizer = chat_tokenizer(SHAPES * 4, vocab_size=180, special_tokens=["<|endoftext|>", *SPECIAL])
    model = chat_model(tokenizer, hidden_size=32, intermediate_size=48, initializer_range=0.02)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def record_tiny(model: Path, out: Path, tasks: int, fail_at: int = 0, **settings: Any) -> Path:
    """A run of the model saved at ``model``; the engine's step fails from step ``fail_at`` on."""
    config = RunConfig(
        model=str(model),
        prompt_style="embedded",
        constrain="on",
        temperature=1.0,
        top_k=0,
        direct_max_tokens=30,
        planner_max_tokens=220,
        solver_max_tokens=40,
        continuation_max_tokens=60,
        **settings,
    )
    return record(config, TASKS[:tasks], out, fail_at)


def record(config: RunConfig, tasks: Sequence[Task], out: Path, fail_at: int = 0) -> Path:
    solver = Solver.load(config, [task.problem for task in tasks])
    if fail_at:
        step = solver.engine.step
        solver.engine.step = lambda: step() if solver.engine.steps < fail_at else 1 / 0  # type: ignore
    directory = RunDir.create(out)
    execute(solver, plan(tasks, solver.resolved), tasks, directory, SilentDisplay())
    solver.close()
    directory.close()
    return directory.path


def recursive(path: Path) -> list[tuple[JobTrace, Attribution]]:
    run = read_run(path)
    assert not run.incomplete
    return [(trace, attribute(trace)) for trace in run.jobs if is_attributed(trace)]


def edited(source: Path, target: Path, edit: Callable[[list[dict[str, Any]], list[dict[str, Any]]], None]) -> Path:
    """A copy of a run with its rows and events changed."""
    rows, events = ([json.loads(line) for line in (source / n).open()] for n in ("rows.jsonl", "trace.jsonl"))
    edit(rows, events)
    target.mkdir()
    for name, values in (("rows.jsonl", rows), ("trace.jsonl", events)):
        (target / name).write_text("".join(json.dumps(value) + "\n" for value in values))
    return target


def known_graph() -> JobTrace:
    t, events = 0.0, list[Event]()
    drawn: dict[str, Any] = {"sampling": {}, "grammar": None, "budget": 100}

    def add(seconds: float, cls: type[Event], node: str = "root", tokens: int = 0, **fields: Any) -> None:
        nonlocal t
        t += seconds
        state = {"step": len(events), "blocks": 0, "pinned": 0, "offloaded": 0}
        events.append(cls(t=t, job="x/rrm/0", node=node, tokens=tokens, **state, **fields))

    def start(seconds: float, node: str, phase: Phase, tokens: int) -> None:
        add(seconds, Started, node, tokens, phase=phase, after=(), prompt_tokens=tokens, task="", **drawn)

    def child(seconds: float, tokens: int, id: str) -> None:
        fields = {"id": id, "task": "", "depends_on": (), "child": f"root.{id}", "repairs": ()}
        add(seconds, WroteChild, "root", tokens, **fields)

    def conclude(seconds: float, node: str, tokens: int, *sampled: Range) -> None:
        transcript = Transcript(counters={}, token_ids=[0] * tokens, sampled=sampled)
        add(seconds, Concluded, node, tokens, answer="", ok=True, transcript=transcript)

    add(0, JobBegan, mode="rrm", task="")
    start(1, "root", Phase.GRAPH, 10)
    add(2 + 4, FirstToken, "root", 11, queued_s=2)
    child(8, 13, "a")
    start(0, "root.a", Phase.SOLVER, 20)
    child(16, 15, "b")
    start(0, "root.b", Phase.SOLVER, 30)
    add(1, FirstToken, "root.a", 21, queued_s=0)
    add(1, Paused, "root", 15, reason="await")
    add(30, FirstToken, "root.b", 31, queued_s=0)
    add(64 + 128, Readmitted, "root.b", 32, queued_s=64, ran_s=0)
    add(0, Paused, "root.a", 22, reason="concluded")
    conclude(0, "root.a", 22, (20, 22))
    add(512, Paused, "root.b", 39, reason="concluded")
    conclude(256, "root.b", 39, (30, 39))
    resumed: dict[str, Any] = {"after": ("root.a", "root.b"), "appended_tokens": 35, "notes": (), **drawn}
    add(0, Resumed, "root", 50, phase=Phase.CONTINUATION, **resumed)
    add(1024 + 2048, FirstToken, "root", 51, queued_s=1024)
    add(4096, Paused, "root", 53, reason="concluded")
    conclude(0, "root", 53, (10, 15), (50, 53))
    add(8192, Finished, "root", 53, status=Status.GRAPH, answer="", events=20)
    row = {"id": "x", "mode": "rrm", "sample": 0, "status": "graph", "latency_s": t, "preemptions": 0}
    counted = {"nodes": 3, "resumes": 1, "critical_path_tokens": 5 + 9 + 3}
    return believed(RecordedJob("x/rrm/0", 0, events, cast(Row, {**row, **counted})))


def known_direct() -> list[Event]:
    """The events of a direct solve of 40 tokens in 40 seconds."""
    base: dict[str, Any] = {"job": "x/direct/0", "node": "root", "step": 0, "blocks": 0, "pinned": 0, "offloaded": 0}
    drawn: dict[str, Any] = {"sampling": {}, "grammar": None, "budget": 100}
    transcript = Transcript(counters={}, token_ids=[0] * 50, sampled=((10, 50),))
    return [
        JobBegan(t=0, tokens=0, mode="direct", task="", **base),
        Started(t=0, tokens=10, phase=Phase.DIRECT, after=(), prompt_tokens=10, task="", **drawn, **base),
        FirstToken(t=1, tokens=11, queued_s=0, **base),
        Paused(t=40, tokens=50, reason="eos", **base),
        Concluded(t=40, tokens=50, answer="", ok=True, transcript=transcript, **base),
        Finished(t=40, tokens=50, status=Status.ATOMIC, answer="", events=6, **base),
    ]


def rewrite(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change events of a trace."""
    path = run / "trace.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        change(event)
    path.write_text("".join(json.dumps(event) + "\n" for event in events))

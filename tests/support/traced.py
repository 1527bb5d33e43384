"""Runs of a tiny random model as the bench records them, for the tests of what is read back from them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from oracle import SPECIAL, chat_model, chat_tokenizer

from rrm_engine.backends.local import Solver
from rrm_engine.bench.progress import SilentDisplay
from rrm_engine.bench.run import execute, plan
from rrm_engine.bench.tasks import Task
from rrm_engine.config import RunConfig
from rrm_engine.runs.checks import build
from rrm_engine.runs.directory import RunDir
from rrm_engine.runs.reader import read_run
from rrm_engine.runs.timeline import Event, JobTrace
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


def edited(source: Path, target: Path, edit: Callable[[list[Event], list[Event]], None]) -> Path:
    """A copy of a run with its rows and events changed."""
    rows, events = ([json.loads(line) for line in (source / n).open()] for n in ("rows.jsonl", "trace.jsonl"))
    edit(rows, events)
    target.mkdir()
    for name, values in (("rows.jsonl", rows), ("trace.jsonl", events)):
        (target / name).write_text("".join(json.dumps(value) + "\n" for value in values))
    return target


def known_graph() -> JobTrace:
    t = 0.0
    events: list[dict[str, Any]] = []

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


def rewrite(run: Path, change: Callable[[Event], None]) -> None:
    """Change events of a trace."""
    path = run / "trace.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        change(event)
    path.write_text("".join(json.dumps(event) + "\n" for event in events))

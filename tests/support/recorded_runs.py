"""Run directories made of rows and events, for the tests of what reads them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import by_hand

from rrm_engine.bench.grader import Verdict
from rrm_engine.bench.rows import make_row
from rrm_engine.graph.types import Status
from rrm_engine.runs.manifest import TaskSource
from rrm_engine.runs.rows import Row
from rrm_engine.solver.result import Job, JobResult


def row(task: str, mode: str, *, right: bool | None = True, sample: int = 0, **measured: Any) -> Row:
    """A row through the code that writes rows, so that its fields are the real ones."""
    usual: dict[str, Any] = {
        "status": Status.ATOMIC if mode == "direct" else Status.GRAPH,
        "answer": "FINAL: 7" if right else "FINAL: 8",
        "latency_s": 2.0 if mode == "direct" else 1.0,
        "critical_path_tokens": 300 if mode == "direct" else 100,
        "total_tokens": 300,
        "nodes": 1 if mode == "direct" else 3,
        "max_depth": 0 if mode == "direct" else 1,
        "max_sibling_width": 0 if mode == "direct" else 2,
        "overlap_s": 0.0 if mode == "direct" else 0.5,
    }
    result = JobResult(job=Job(task, f"What is {task}?", mode, sample), **{**usual, **measured})
    verdict = Verdict(right if right is None else right and result.error is None)
    return make_row(result, None if right is None else "7", verdict, {}, 0)


def both(task: str, sample: int = 0, direct: dict[str, Any] | None = None, **recursive: Any) -> list[Row]:
    return [row(task, "direct", sample=sample, **direct or {}), row(task, "rrm", sample=sample, **recursive)]


def save(path: Path, rows: Sequence[Row], *, seed: int = 0, tasks: str = "set", **settings: Any) -> Path:
    """A run's directory with the settings named, and the rows."""
    path.mkdir(parents=True)
    asked = {"model": "tiny", "wait_policy": "pin", "seed": seed, "limit": None, "modes": ["direct", "rrm"], **settings}
    manifest = replace(
        by_hand.manifest(**asked, dtype="float32", device="cpu", prompt_style="embedded"),
        seed=seed,
        tasks=TaskSource(tasks, tasks, tasks, 9, 9),
        settings=asked,
        versions={"torch": "2.13"},
        hardware={"cpu": "Test", "cores": 2, "gpus": []},
        git={"commit": "c0ffee", "dirty": False},
    )
    (path / "run.json").write_text(json.dumps(manifest.as_json()))
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

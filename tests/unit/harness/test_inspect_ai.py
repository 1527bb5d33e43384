"""The provider ``rrm`` inside of the real Inspect, on tasks of the embedded model."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("inspect_ai", reason="Inspect is not installed: pip install inspect_ai")

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import think

import rrm_engine.harness.inspect_ai  # noqa: F401  (makes the provider known)
from rrm_engine.backends.local import Solver
from rrm_engine.bench.tasks import load_tasks
from rrm_engine.config import RunConfig

TASKS = load_tasks("embedded").tasks[:3]


@pytest.fixture(autouse=True, scope="module")
def quiet() -> None:
    torch.set_num_threads(1)
    os.environ["INSPECT_DISPLAY"] = "none"


def evaluated(folder: Path, solver: Any = None, epochs: int = 1, mode: str = "rrm", **config: Any) -> EvalLog:
    samples = [Sample(input=task.problem, target=f"FINAL: {task.expected}") for task in TASKS]
    task = Task(dataset=samples, solver=solver or generate(), scorer=includes(), epochs=epochs)
    model = get_model("rrm/embedded", config=GenerateConfig(**config), mode=mode, memoize=False)
    (log,) = eval(task, model=model, log_dir=str(folder), display="none")
    return log


def answers(log: EvalLog) -> dict[Any, list[str]]:
    found: dict[Any, list[str]] = {}
    for sample in log.samples or ():
        found.setdefault(sample.id, []).append(sample.output.completion)
    return found


def test_tasks_are_solved_recursively(tmp_path: Path) -> None:
    log = evaluated(tmp_path, temperature=0.0)
    solver = Solver.load(RunConfig(temperature=0.0))
    assert list(answers(log).values()) == [[solver.solve(task.problem).answer] for task in TASKS]
    assert log.results is not None and log.results.scores[0].metrics["accuracy"].value == 1.0
    assert log.samples
    one = log.samples[0]
    assert one.output.metadata is not None and one.output.metadata["nodes"] > 1
    assert one.output.usage is not None and one.output.usage.output_tokens > one.output.metadata["critical_path_tokens"]


def test_epochs_are_samples_of_their_own(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"temperature": 6.0, "max_tokens": 40, "epochs": 3, "mode": "direct"}
    drawn = answers(evaluated(tmp_path, **settings))
    assert [len(set(one)) for one in drawn.values()] == [3, 3, 3]
    again = answers(evaluated(tmp_path, **settings))
    assert {name: sorted(one) for name, one in again.items()} == {name: sorted(one) for name, one in drawn.items()}
    other = answers(evaluated(tmp_path, **settings, seed=5))
    assert all(not set(one) & set(drawn[name]) for name, one in other.items())


def test_stop_strings(tmp_path: Path) -> None:
    (first, *_) = answers(evaluated(tmp_path, temperature=0.0, mode="direct", stop_seqs=["FINAL"])).values()
    assert first[0] and "FINAL" not in first[0]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"solver": [use_tools(think()), generate()]}, "calls no tools"),
        ({"num_choices": 2}, "rrm has no num_choices"),
        ({"solver": [generate(), generate()]}, "not a conversation"),
    ],
)
def test_refusals(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    log = evaluated(tmp_path, mode="direct", **{"max_tokens": 5, **changes})
    assert log.status == "error" and log.error is not None and sentence in log.error.message

"""The model ``rrm`` inside of the real lm-evaluation-harness, on a task made here."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm-eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from rrm_engine.backends.local import Solver  # noqa: E402
from rrm_engine.bench.tasks import load_tasks  # noqa: E402
from rrm_engine.config import RunConfig  # noqa: E402
from rrm_engine.errors import RrmError  # noqa: E402
from rrm_engine.harness.cli import main  # noqa: E402
from rrm_engine.harness.lm_eval import RrmModel  # noqa: E402
from rrm_engine.harness.settings import cut  # noqa: E402

TASKS = load_tasks("embedded").tasks[:2]
GREEDY = {"until": ["</s>"], "do_sample": False, "max_gen_toks": 700}
SAMPLED = {"until": ["</s>"], "do_sample": True, "temperature": 6.0, "max_gen_toks": 60}


@pytest.fixture(scope="module")
def direct() -> RrmModel:
    torch.set_num_threads(1)
    return RrmModel(mode="direct", model="embedded", batch_size=1, max_batch_size=None, device=None)


def task_of(folder: Path) -> dict[str, Any]:
    return {
        "task": "mini",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "FINAL: {{a}}",
        "metric_list": [{"metric": "exact_match"}],
    }


def evaluated(folder: Path, model: Any, settings: dict[str, Any], **more: Any) -> tuple[float, list[list[str]]]:
    (folder / "data.jsonl").write_text("\n".join(json.dumps({"q": t.problem, "a": t.expected}) for t in TASKS))
    task = {**task_of(folder), "generation_kwargs": settings, **more}
    kind = {"model": model} if not isinstance(model, str) else {"model": model, "model_args": {"model": "embedded"}}
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(**kind, tasks=[task], task_manager=manager, bootstrap_iters=0)
    return found["results"]["mini"]["exact_match,none"], [one["resps"][0] for one in found["samples"]["mini"]]


def asked(context: str, settings: dict[str, Any], idx: int = 0) -> Instance:
    return Instance("generate_until", {}, (context, settings), idx, metadata=("mini", idx, 1))


def test_tasks_are_solved_recursively(tmp_path: Path) -> None:
    """By the name; the answers are those of the solver."""
    score, answers = evaluated(tmp_path, "rrm", GREEDY)
    solver = Solver.load(RunConfig(temperature=0.0))
    assert answers == [[solver.solve(task.problem).answer] for task in TASKS] and score == 1.0


def test_repeats_are_samples_of_their_own(tmp_path: Path, direct: RrmModel) -> None:
    _, answers = evaluated(tmp_path, direct, SAMPLED, repeats=3)
    assert [len(set(one)) for one in answers] == [3, 3]
    assert evaluated(tmp_path, direct, SAMPLED, repeats=3)[1] == answers
    greedy = evaluated(tmp_path, direct, {**SAMPLED, "do_sample": False}, repeats=2)[1]
    assert [len(set(one)) for one in greedy] == [1, 1] and greedy[0][0] not in answers[0]


def test_stop_strings_and_lengths(direct: RrmModel) -> None:
    problem = TASKS[0].problem
    (whole,) = direct.generate_until([asked(problem, GREEDY)])
    assert "FINAL" in whole
    short, stopped, one = direct.generate_until(
        [
            asked(problem, {**GREEDY, "max_gen_toks": 20}, 0),
            asked(problem, {**GREEDY, "until": ["FINAL", "\n"]}, 1),
            asked(problem, {**GREEDY, "until": "FINAL"}, 2),
        ]
    )
    tokenizer = direct._solver.model.tokenizer
    assert whole.startswith(short) and 10 <= len(tokenizer(short, add_special_tokens=False)["input_ids"]) <= 20
    assert stopped == whole.split("\n")[0] and one == whole.split("FINAL")[0]
    assert cut("a b") == "a b" and cut("a b", "", "x") == "a b" and cut("abc", "c", "b") == "a"


def test_what_says_nothing_of_sampling_is_greedy(direct: RrmModel) -> None:
    first, second = direct.generate_until([asked(TASKS[0].problem, {"max_gen_toks": 30}, i) for i in (1, 2)])
    assert first == second
    assert dict(direct._settings({"temperature": 0.7, "max_gen_toks": 5}))["temperature"] == 0.7


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The harness gives every model a device of its own where nobody asked for one; here there is none of that name."""
    (tmp_path / "data.jsonl").write_text(json.dumps({"q": TASKS[0].problem, "a": TASKS[0].expected}))
    task = {**task_of(tmp_path), "generation_kwargs": {**GREEDY, "max_gen_toks": 700}}
    (tmp_path / "mini.json").write_text(json.dumps(task))
    (tmp_path / "mini.json").rename(tmp_path / "mini.yaml")  # which JSON is
    model = ["--model", "rrm", "--model_args", "model=embedded"]
    words = [*model, "--include_path", str(tmp_path), "--tasks", "mini"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words])
    assert main() == 0
    out = capsys.readouterr().out
    assert re.search(r"\|mini .*\|exact_match\|.*\| +1\|", out)
    monkeypatch.setattr(sys, "argv", ["lm_eval", *words, "--device", "nowhere"])
    assert main() == 2 and "nowhere" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["lm_eval", *model, "--tasks", "none-such"])
    assert main() == 1 and "Tasks not found" in capsys.readouterr().err


def test_refusals(direct: RrmModel, tmp_path: Path) -> None:
    with pytest.raises(RrmError, match="cannot score given texts"):
        direct.loglikelihood_rolling([])
    choices = {"output_type": "multiple_choice", "doc_to_choice": ["1", "2"], "doc_to_target": 0}
    with pytest.raises(RrmError, match="choose a task with output_type generate_until"):
        evaluated(tmp_path, direct, {}, **choices, metric_list=[{"metric": "acc"}])
    with pytest.raises(RrmError, match="rrm has no num_beams"):
        direct.generate_until([asked("x", {"num_beams": 4})])
    with pytest.raises(RrmError, match="leave --apply_chat_template out"):
        direct.apply_chat_template([])
    with pytest.raises(RrmError, match="colour is no setting of a solve"):
        RrmModel(colour="red")
    with pytest.raises(RrmError, match="mode takes direct or rrm"):
        RrmModel(mode="both")

"""Whole recursive runs on the in-process backend, with real forwards of a tiny random model.

Every sampled token must be the one that plain transformers, the same grammar and the same keyed noise give on that
node's own transcript, and no setting of memory or batching may change a single token.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import broken
import pytest
import torch
from foretold import Foretold
from lab import JOBS, SETTINGS, SMALLEST, Lab, Recorded, engine_of, recorded, wrong_tokens
from transformers import AutoModelForCausalLM

import rrm_engine
from rrm_engine.backends.local import Solver
from rrm_engine.config import RunConfig
from rrm_engine.engine.draft import MOST
from rrm_engine.loading.prepare import LoadedModel, load_model
from rrm_engine.solver.result import Job

# exactness


def test_a_random_model_under_the_grammar_lives_through_every_kind_of_graph(reference: Recorded) -> None:
    """What the tests below rest on: depth, failures, dependencies, several rounds, and budgets that run out."""
    statuses = {str(r.status) for r in reference.results.values()}
    assert {"graph", "fallback"} <= statuses
    assert max(r.max_depth for r in reference.results.values()) == 2
    assert any(e.get("depends_on") for e in reference.events)
    assert any("eos" in e["reason"] for e in reference.events if e["event"] == "pause")
    assert any("length" in e["reason"] for e in reference.events if e["event"] == "pause")
    assert max(len(e["sampled"]) for e in reference.ends().values()) >= 3
    assert {e["ok"] for e in reference.events if e["event"] == "concluded"} == {True, False}


def test_every_sampled_token_equals_plain_transformers(lab: Lab, reference: Recorded) -> None:
    assert wrong_tokens(lab.plain, reference) == {}
    assert sum(b - a for e in reference.ends().values() for a, b in e["sampled"]) > 1000


def test_greedy_tokens_equal_plain_transformers(lab: Lab, greedy: Recorded) -> None:
    assert wrong_tokens(lab.plain, greedy) == {}


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {"kv_blocks": 200, "block_size": 4, "step_tokens": 5, "max_concurrency": 3, "seed": 9},
    ],
    ids=["nucleus", "small pool"],
)
def test_exact_under_other_settings(lab: Lab, changes: dict[str, Any]) -> None:
    assert wrong_tokens(lab.plain, recorded(lab, **changes)) == {}


def test_a_wrong_seed_is_noticed(lab: Lab, reference: Recorded) -> None:
    """Negative control: with other noise the oracle disagrees."""
    other = Recorded(reference.solver, events=reference.events)
    for key, phases in reference.phases.items():
        other.phases[key] = [SimpleNamespace(**{**vars(p), "noise_key": p.noise_key + 1}) for p in phases]
    assert len(wrong_tokens(lab.plain, other)) > 5


def test_a_missing_copy_is_noticed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a fork that writes into its parent's block changes tokens."""
    run = Recorded(lab.solver(child_context="parent"))
    broken.no_copies(monkeypatch)
    assert wrong_tokens(lab.plain, run.run(JOBS, 4)) != {}


# nothing about memory, batching, lookahead, pipelines or drafts changes a token

PIPELINE: dict[str, Any] = {"lookahead": "on"}
OTHERWISE: dict[str, dict[str, Any]] = {
    "plenty": {},
    "smallest pool": {"kv_blocks": SMALLEST},
    "forks": {"child_context": "parent"},
    "drop": {"wait_policy": "drop", "lookahead": "on"},
}
SAME: dict[str, dict[str, Any]] = {
    "one node at a time": {"max_concurrency": 1},
    "one task at a time": {"concurrency": 1},
    "smallest pool": {"kv_blocks": SMALLEST},
    "small steps": {"step_tokens": 8},
    "no prefix cache": {"prefix_cache": False},
    "small blocks": {"block_size": 4, "kv_blocks": 4 * SMALLEST},
    **{policy: {"wait_policy": policy} for policy in ("offload", "drop", "lru")},
    "auto in the smallest pool": {"wait_policy": "auto", "kv_blocks": SMALLEST},
    "offload in the smallest pool": {"wait_policy": "offload", "kv_blocks": SMALLEST, "host_kv_blocks": 20},
    "all of it": {
        "max_concurrency": 3,
        "kv_blocks": 4 * SMALLEST,
        "block_size": 4,
        "step_tokens": 8,
        "prefix_cache": False,
    },
    **{f"looking ahead, {name}": {"lookahead": "on", **changes} for name, changes in OTHERWISE.items()},
    **{f"pipeline of {n}": {"lookahead": "on", "stages": n} for n in (2, 3)},
    **{
        f"pipeline of {n} in the smallest pool": {"lookahead": "on", "stages": n, "kv_blocks": SMALLEST} for n in (2, 3)
    },
    **{f"drafts looked up, {name}": {"draft": str(MOST), **changes} for name, changes in OTHERWISE.items()},
    **{f"drafts foretold, {name}": {"foretold": True, **changes} for name, changes in OTHERWISE.items()},
    "drafts looked up, greedy": {"draft": str(MOST), "temperature": 0.0},
    "drafts foretold, greedy": {"foretold": True, "temperature": 0.0},
}


@pytest.fixture(scope="module")
def greedy(lab: Lab) -> Recorded:
    return recorded(lab, temperature=0.0)


def run_as(
    lab: Lab, base: Recorded, stages: int = 1, foretold: bool = False, concurrency: int = 4, **changes: Any
) -> Recorded:
    """``stages``: of a pipeline; ``foretold``: drafts are what ``base`` wrote."""
    run = Recorded(replace(lab, model=replace(lab.model, stages=stages)).solver(**changes))
    engine = engine_of(run.solver)
    if foretold:
        engine.draft(Foretold({key: end["token_ids"] for key, end in base.ends().items()}, engine.eos_ids))
    assert engine.scheduler.stages == stages and engine.settings.lookahead == ("lookahead" in changes)
    return run.run(JOBS, concurrency)


def counted(run: Recorded) -> list[tuple[int, int]]:
    """Of each job: tokens sampled, and tokens prefilled or found in the cache, for which of both hangs on the time."""
    return [(r.forward_decoded, r.forward_prefilled + r.reused) for _, r in sorted(run.results.items())]


@pytest.mark.parametrize("name", SAME)
def test_same_rows_and_tokens(
    lab: Lab, reference: Recorded, forked_reference: Recorded, greedy: Recorded, name: str
) -> None:
    """Grammars are asked in time, noise falls where it did, counters count the same."""
    changes = SAME[name]
    base = forked_reference if "child_context" in changes else greedy if "temperature" in changes else reference
    run = run_as(lab, base, **changes)
    assert run.rows() == base.rows()
    if name.endswith("plenty"):
        assert counted(run) == counted(base)
    paths = [(r.critical_path_steps, r.critical_path_tokens) for r in run.results.values()]
    if not name.startswith("drafts"):
        assert all(steps == tokens for steps, tokens in paths)
    else:
        assert all(steps <= tokens for steps, tokens in paths) and sum(a for a, _ in paths) < sum(b for _, b in paths)
        counters = [end["counters"] for end in run.ends().values()]
        came_true = sum(c["accepted"] for c in counters) / sum(c["decoded"] for c in counters)
        assert came_true > (0.5 if "foretold" in changes else 0.02)
    if name.startswith("offload"):
        assert sum(r.restored_blocks for r in run.results.values()) > 0
    if name == "smallest pool":
        assert sum(r.preemptions for r in run.results.values()) > 0
        assert sum(r.preemptions for r in reference.results.values()) == 0


def test_a_seed_changes_the_rows(lab: Lab, reference: Recorded) -> None:
    """Negative control of the test above."""
    assert recorded(lab, seed=SETTINGS["seed"] + 1).rows() != reference.rows()


# forks


def test_children_that_start_from_their_parents_context(lab: Lab, forked_reference: Recorded) -> None:
    run = forked_reference
    assert wrong_tokens(lab.plain, run) == {}
    split = [r for r in run.results.values() if r.nodes > 2]
    assert split
    assert all(r.forked_blocks > 0 and r.copied_blocks > 0 for r in split)
    tight = recorded(lab, child_context="parent", kv_blocks=SMALLEST, max_concurrency=3)
    assert tight.rows() == run.rows()


def test_a_forked_child_reads_its_parents_text_up_to_its_own_event(lab: Lab, forked_reference: Recorded) -> None:
    decode = lab.model.tokenizer.decode
    ends = forked_reference.ends()
    children = 0
    for event in forked_reference.events:
        if event["event"] != "event" or event["kind"] != "child":
            continue
        key = f"{event['job']}:{event['node']}"
        if (child := ends.get(f"{key}.{event['id']}")) is None:
            continue
        texts = [decode(end["token_ids"]) for end in (ends[key], child)]
        differs = next(i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
        shared, rest = texts[1][:differs].rstrip("\n"), texts[1][differs:]
        last = json.loads(shared[shared.rindex('{"type":"child"') :])
        assert (last["id"], last["task"].strip()) == (event["id"], event["task"])
        assert rest.startswith(f"<|im_end|>\n<|im_start|>user\nYou are {event['id']}:")
        children += 1
    assert children > 5


# the embedded model: what it was trained for is not of interest here, only that it is run exactly

FOLDER = Path(rrm_engine.__file__).parent / "data"
embedded_model = pytest.mark.skipif(
    not (FOLDER / "embedded_model" / "config.json").is_file(), reason="the embedded model is not packaged yet"
)


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, LoadedModel, list[Job]]:
    """The packaged model, plain and prepared, and one packaged task of each kind."""
    plain = AutoModelForCausalLM.from_pretrained(FOLDER / "embedded_model", dtype=torch.float32)
    tasks: dict[str, str] = {}
    for line in (FOLDER / "embedded_tasks.jsonl").read_text().splitlines():
        tasks.setdefault(json.loads(line)["kind"], json.loads(line)["problem"])
    jobs = [Job(kind, problem) for kind, problem in tasks.items()]
    return plain.eval(), load_model("embedded"), [*jobs, Job("alone", jobs[0].task, "direct")]


def run_embedded(model: LoadedModel, jobs: list[Job], concurrency: int = 5, **changes: Any) -> Recorded:
    solver = Solver(model, RunConfig(**changes), [job.task for job in jobs])
    return Recorded(solver).run(jobs, concurrency)


HOT = {"temperature": 1.0, "constrain": "on", "planner_max_tokens": 150, "continuation_max_tokens": 60}
HOT |= {"solver_max_tokens": 60, "direct_max_tokens": 60}


@embedded_model
@pytest.mark.parametrize("changes", [{}, HOT, {"child_context": "parent"}], ids=["as is", "hot", "fork"])
def test_the_embedded_model_is_run_exactly(
    embedded: tuple[Any, LoadedModel, list[Job]], changes: dict[str, Any]
) -> None:
    plain, model, jobs = embedded
    run = run_embedded(model, jobs, **changes)
    assert wrong_tokens(plain, run) == {}
    assert len(run.results) == 5
    assert sum(b - a for e in run.ends().values() for a, b in e["sampled"]) > 500


@embedded_model
def test_the_embedded_models_rows_do_not_depend_on_memory_or_batching(
    embedded: tuple[Any, LoadedModel, list[Job]],
) -> None:
    _, model, (*jobs, _) = embedded
    plenty = run_embedded(model, jobs)
    longest = max(len(end["token_ids"]) for end in plenty.ends().values()) + 1
    blocks = -(-longest // 16)
    tight = run_embedded(model, jobs, max_sequence_tokens=longest, kv_blocks=blocks, step_tokens=24)
    assert tight.rows() == plenty.rows()
    assert sum(r.preemptions for r in tight.results.values()) > 0
    one_by_one = run_embedded(model, jobs[:2], concurrency=1, max_concurrency=1, prefix_cache=False)
    assert one_by_one.rows().items() <= plenty.rows().items()
    assert len(one_by_one.rows()) > 6

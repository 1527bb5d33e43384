"""Replays compared with each other and with plain Transformers; and what is spoilt on purpose is noticed."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import plain_model, wrong_tokens
from replays import CARRIED, CONTINUATION, DEEP, FLAT, NAMES, PLAN, PREFIX, PROMPT, drawn, memory_for, run

from rrm_engine.engine.packing import lay_out
from rrm_engine.kv.cache import KVCache
from rrm_engine.loading.prepare import LoadedModel
from rrm_engine.replay.check import ReplayMismatch, check_logits, check_transcripts
from rrm_engine.replay.graph import Graph
from rrm_engine.replay.measure import best_logits, check, limit_pools
from rrm_engine.replay.variant import parse_variant


@pytest.mark.parametrize("lookahead", [True, False])
def test_every_variant_has_the_logits_of_pin(model: LoadedModel, lookahead: bool) -> None:
    """With room for everything, and in pools in which memory runs out again and again."""
    graph = drawn(DEEP)
    memory = memory_for(model, graph, lookahead=lookahead)
    variants = [parse_variant(name) for name in NAMES]
    compared = check(memory, variants, [graph])
    assert compared == len(NAMES) * sum(node.decoded for node in graph.nodes.values())
    limit_pools(memory, [graph], 0.5)
    assert check(memory, variants, [graph]) == compared
    assert run("pin", memory, graph).preemptions


@pytest.mark.parametrize("lookahead", [True, False])
def test_free_choices_are_those_of_plain_transformers(model: LoadedModel, lookahead: bool) -> None:
    """What the model would have written at each place, by plain transformers on the forced tokens."""
    graph = drawn(DEEP)
    plain = plain_model("qwen3")
    replayed = run("offload", memory_for(model, graph, lookahead=lookahead), graph)
    for name, tokens in replayed.tokens.items():
        logits = plain(input_ids=torch.tensor([tokens]), use_cache=False).logits[0].argmax(-1).tolist()
        places: list[int] = []
        at = graph.context(name)
        for step in graph.nodes[name].steps:
            size = len(getattr(step, "tokens", ()))
            places += range(at, at + size) if type(step).__name__ == "Decode" else []
            at += size
        assert replayed.sampled[name] == [logits[i - 1] for i in places], name
    assert wrong_tokens(plain, replayed.tokens["root"], [(20, 40)]) != []  # the forced ones are others


def test_a_step_that_runs_the_sampled_token_is_noticed(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a sequence that runs ahead runs the model's own token, not the graph's."""

    def unforced(work: Any, block_size: int) -> Any:
        work = list(work)
        kept = [(item.sequence, item.sequence.probe.forced) for item in work]
        for item in work:
            item.sequence.probe.forced = ()
        layout = lay_out(work, block_size)
        for sequence, forced in reversed(kept):
            sequence.probe.forced = forced
        return layout

    monkeypatch.setattr("rrm_engine.engine.static_steps.lay_out", unforced)
    test_free_choices_are_those_of_plain_transformers(model, lookahead=False)
    with pytest.raises(AssertionError):
        test_free_choices_are_those_of_plain_transformers(model, lookahead=True)


SPLICING = ["splice", "drop+splice", "offload+splice+nocache", "splice+serial", "splice+fork", "transcript+fork"]


def test_attached_kv_is_exact_up_to_where_it_is(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = drawn(CARRIED)
    memory = memory_for(model, graph.transcribed())
    variants = [parse_variant(name) for name in SPLICING]
    decoded = sum(node.decoded for node in graph.nodes.values())
    assert check(memory, variants, [graph]) == len(variants) * (decoded - CONTINUATION)
    limit_pools(memory, [graph], 0.6)
    assert check(memory, variants, [graph]) == len(variants) * (decoded - CONTINUATION)
    memory.limits.clear()
    monkeypatch.setattr(Graph, "exact", Graph.length)  # control: as if all of it were
    with pytest.raises(
        ReplayMismatch, match=r"splice: graph carried has other logits .* in \d of 31 decode steps \(root"
    ):
        check(memory, variants[:1], [graph])


def test_a_fork_of_attached_kv_is_approximate_too() -> None:
    value = json.loads(json.dumps(CARRIED))
    value["nodes"]["root"]["steps"] += [{"child": "c"}, {"await": ["c"]}, {"append": 2, "of": "c"}, {"decode": 1}]
    value["nodes"]["c"] = {"prompt": 3, "steps": [{"decode": 4}], "fork": True}
    graph = drawn(value)
    at = PREFIX + PROMPT + PLAN + 1
    assert (graph.exact("root"), graph.exact("c"), graph.exact("a")) == (at, at, graph.length("a"))
    value["nodes"]["c"]["fork"] = False
    assert drawn(value).exact("c") == drawn(value).length("c")


def spoil_swap_in(monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = KVCache.swap_in

    def spoiled(self: KVCache, copy: Any, blocks: Any) -> None:
        for rows in copy.payload:
            rows[:, 0, 0] += 1.0
        genuine(self, copy, blocks)

    monkeypatch.setattr(KVCache, "swap_in", spoiled)


def lose_swap_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "swap_in", lambda self, copy, blocks: None)


def lose_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KVCache, "copy", lambda self, copies: None)


@pytest.mark.parametrize(
    ("name", "spoil"), [("offload", spoil_swap_in), ("offload", lose_swap_in), ("pin+fork", lose_copies)]
)
def test_a_spoilt_block_is_noticed(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, name: str, spoil: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """Negative control of the check: a restored block with one wrong token, none restored, a fork without a copy."""
    graph = drawn(FLAT)
    memory, variant = memory_for(model, graph), parse_variant(name)
    expected = best_logits(memory, variant.reference, graph)
    check_logits(name, graph, best_logits(memory, variant, graph), expected)
    spoil(monkeypatch)
    found = best_logits(memory, variant, graph)
    with pytest.raises(ReplayMismatch, match=r": graph flat has other logits than the reference in \d+ of 31 decode"):
        check_logits(name, graph, found, expected)


def test_other_tokens_are_noticed(model: LoadedModel) -> None:
    graph = drawn(FLAT)
    replayed = run("pin", memory_for(model, graph), graph)
    replayed.tokens["b"][-1] += 1
    with pytest.raises(ReplayMismatch, match="pin: b of graph flat did not end with the graph's tokens"):
        check_transcripts("pin", graph, replayed.tokens)

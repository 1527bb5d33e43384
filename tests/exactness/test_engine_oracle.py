"""Every node's greedy tokens in fp32 equal plain transformers on that node's own transcript."""

import pytest
from graph_scripts import GREEDY, Script, live_graph, mistakes
from oracle import FAMILIES, engine_for, plain_model, prepared, prompt


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_fork_pause_and_resume_equal_plain_transformers(family: str, attention: str) -> None:
    plain = plain_model(family)
    model = prepared(plain, attention)
    engine = engine_for(model)
    script = live_graph(engine)
    assert mistakes(plain, script) == {}
    assert sum(b - a for ranges in script.ranges.values() for a, b in ranges) == 9 + 30 + 20 + 15 + 8 + 6 + 7
    engine.check()
    assert engine.pool.num_used == 0


@pytest.mark.parametrize("blocks", [22, 24, 30, 45])
def test_smallest_pools_give_the_same_tokens_as_plenty(blocks: int) -> None:
    plain = plain_model("qwen3")
    model = prepared(plain)
    plenty = live_graph(engine_for(model, max_sequence_tokens=88))
    engine = engine_for(model, blocks=blocks, max_sequence_tokens=88)
    tight = live_graph(engine)
    assert tight.done == plenty.done
    assert mistakes(plain, tight) == {}
    assert engine.pool.num_used == 0


def test_small_pools_do_preempt_and_drop() -> None:
    """Negative control of the test above: with 22 blocks memory really ran out."""
    engine = engine_for(prepared(plain_model("qwen3")), blocks=22, max_sequence_tokens=88)
    script = Script(engine)
    sequences = [script.submit(f"r{i}", prompt(i, 30), 40, root=i) for i in range(3)]
    script.run()
    assert sum(s.counters.preemptions for s in sequences) > 0
    assert {len(s.tokens) for s in sequences} == {70}


@pytest.mark.parametrize("concurrency", [1, 3, 64])
@pytest.mark.parametrize("step_tokens", [1, 7, 512])
def test_batching_never_changes_tokens(concurrency: int, step_tokens: int) -> None:
    plain = plain_model("llama")
    engine = engine_for(prepared(plain), max_sequences=concurrency, step_tokens=step_tokens)
    script = Script(engine)
    sequences = [script.submit(f"r{i}", prompt(i, 3 + 11 * i), 12, root=i) for i in range(5)]
    script.run()
    script.finish(*sequences)
    assert mistakes(plain, script) == {}


def test_prefix_cache_reuses_and_stays_exact() -> None:
    plain = plain_model("qwen3")
    model = prepared(plain)
    for prefix_cache, expected in ((True, 32), (False, 0)):
        engine = engine_for(model, prefix_cache=prefix_cache)
        script = Script(engine)
        first = script.submit("first", prompt(1, 33), 5)
        script.run()
        second = script.submit("second", prompt(1, 33) + prompt(9, 4), 10)
        script.run()
        assert second.counters.reused == expected
        script.finish(first, second)
        assert mistakes(plain, script) == {}


def test_a_full_prefix_hit_still_recomputes_its_last_token() -> None:
    plain = plain_model("qwen3")
    engine = engine_for(prepared(plain))
    script = Script(engine)
    first = script.submit("first", prompt(1, 32), 4)
    script.run()
    second = script.submit("second", prompt(1, 32), 4)
    script.run()
    assert second.counters.reused == 28
    assert second.tokens == first.tokens
    script.finish(first, second)
    assert mistakes(plain, script) == {}


def test_a_fork_prefills_nothing_that_is_computed_and_copies_one_block() -> None:
    engine = engine_for(prepared(plain_model("qwen3")), prefix_cache=False)
    script = Script(engine)
    parent = script.submit("root", prompt(1, 41), 5)
    script.run()
    child = script.submit("root.a", [*parent.tokens, *prompt(2, 2)], 9, fork_of=(parent, len(parent.tokens)))
    script.run()
    assert child.counters.reused == 45  # all but the parent's last token, whose KV is not there yet
    assert child.counters.prefilled == 3
    assert child.counters.copied_blocks == 1
    assert parent.counters.copied_blocks == 0


def test_a_broken_copy_on_write_is_noticed() -> None:
    """Negative control: without the block copy the child writes into its parent's block, and tokens change."""
    plain = plain_model("qwen3")
    engine = engine_for(prepared(plain))
    engine.runner.cache.copy = lambda copies: None  # type: ignore[method-assign]
    assert mistakes(plain, live_graph(engine)) != {}


def test_a_wrong_position_is_noticed() -> None:
    """Negative control: KV that is truncated one token short of what was forgotten leaves a stale token behind."""
    plain = plain_model("qwen3")
    engine = engine_for(prepared(plain), prefix_cache=False)
    script = Script(engine)
    root = script.submit("root", prompt(1, 20), 6)
    script.run()
    root.table.length += 1  # claims KV for a token that was never run
    root.table.append(0)
    script.resume(root, prompt(2, 5), 10)
    script.run()
    script.finish(root)
    assert mistakes(plain, script) != {}


def test_truncation_forgets_tokens_exactly() -> None:
    plain = plain_model("qwen3")
    engine = engine_for(prepared(plain))
    script = Script(engine)
    root = script.submit("root", prompt(1, 20), 12)
    script.run()
    engine.truncate(root, 27)
    script.ranges["root"][-1][1] = 27
    script.resume(root, prompt(2, 5), 10)
    script.run()
    script.finish(root)
    assert mistakes(plain, script) == {}


def test_what_can_never_fit_is_refused_with_the_numbers() -> None:
    model = prepared(plain_model("qwen3"))
    with pytest.raises(ValueError, match=r"88 tokens takes 22 KV blocks of 4, the pool has 21.*--kv-blocks"):
        engine_for(model, blocks=21, max_sequence_tokens=88)
    engine = engine_for(model, blocks=22, max_sequence_tokens=88)
    with pytest.raises(ValueError, match=r"root has 88 tokens and a sequence may have 88"):
        engine.submit("root", prompt(1, 88), 5, GREEDY)

"""What is reused, copied and computed again in lives whose tokens the matrix checks; and what is refused."""

import pytest
from graph_scripts import GREEDY, Script, again, mistakes
from oracle import engine_for, plain_model, prompt

from rrm_engine.loading.prepare import LoadedModel


def test_small_pools_do_preempt_and_drop(model: LoadedModel) -> None:
    """Negative control of the small pools in the matrix: with 22 blocks memory really runs out."""
    engine = engine_for(model, blocks=22, max_sequence_tokens=88)
    script = Script(engine)
    sequences = [script.submit(f"r{i}", prompt(i, 30), 40, root=i) for i in range(3)]
    script.run()
    assert sum(s.counters.preemptions for s in sequences) > 0
    assert {len(s.tokens) for s in sequences} == {70}


@pytest.mark.parametrize(("prefix_cache", "reused"), [(True, [0, 32, 28]), (False, [0, 0, 0])])
def test_a_prefix_hit_leaves_a_token_to_run(model: LoadedModel, prefix_cache: bool, reused: list[int]) -> None:
    """Of 37 tokens that begin like 33 known ones 32 are reused, of 32 known ones 28: the last is run for its logits."""
    script = again(engine_for(model, prefix_cache=prefix_cache))
    assert [counters.reused for counters in script.counters.values()] == reused


def test_a_fork_prefills_nothing_that_is_computed_and_copies_one_block(model: LoadedModel) -> None:
    script = Script(engine_for(model, prefix_cache=False))
    parent = script.submit("root", prompt(1, 41), 5)
    script.run()
    child = script.submit("root.a", [*parent.tokens, *prompt(2, 2)], 9, fork_of=(parent, len(parent.tokens)))
    script.run()
    assert child.counters.reused == 45  # all but the parent's last token, whose KV is not there yet
    assert child.counters.prefilled == 3
    assert child.counters.copied_blocks == 1
    assert parent.counters.copied_blocks == 0


def test_a_wrong_position_is_noticed(model: LoadedModel) -> None:
    """Negative control: KV that is truncated one token too late still holds a stale token."""
    script = Script(engine_for(model, prefix_cache=False))
    root = script.submit("root", prompt(1, 20), 6)
    script.run()
    root.table.length += 1  # claims KV for a token that was never run
    root.table.append(0)
    script.resume(root, prompt(2, 5), 10)
    script.run()
    script.finish(root)
    assert mistakes(plain_model("qwen3"), script) != {}


def test_what_can_never_fit_is_refused_with_the_numbers(model: LoadedModel) -> None:
    with pytest.raises(ValueError, match=r"88 tokens takes 22 KV blocks of 4, the pool has 21.*--kv-blocks"):
        engine_for(model, blocks=21, max_sequence_tokens=88)
    engine = engine_for(model, blocks=22, max_sequence_tokens=88)
    with pytest.raises(ValueError, match=r"root has 88 tokens and a sequence may have 88"):
        engine.submit("root", prompt(1, 88), 5, GREEDY)

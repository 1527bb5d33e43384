"""Random lives on the bookkeeping: nothing wedges, nothing leaks, and every query attends to its own history."""

from collections.abc import Callable
from typing import Any

import broken
import pytest
from hypothesis import given
from lives import Life, Memory, prompt, submitted, two_waiting_parents
from random_lives import ACTIONS, SETTINGS, assert_noticed, live_through, lives

from rrm_engine.engine.sequence import Sequence, State
from rrm_engine.kv.pool import BlockPool

# random lives


@SETTINGS
@given(lives(), ACTIONS)
def test_any_life_ends_and_every_query_reads_its_own_history(life: Life, actions: list[tuple[Any, ...]]) -> None:
    live_through(life, actions)


def test_reclaiming_a_scheduled_sequence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.victims_are_anybody(monkeypatch)
    assert_noticed("taken from the wrong end|a scheduled sequence lost its blocks")


def test_skipping_the_copies_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a shared tail is replaced by a block of its own, but its content is not copied."""

    def live() -> None:
        life = Life(20, 4, 20, prefix_cache=False)
        parent = submitted(life.submit(prompt(6), 4))
        life.step()
        submitted(life.submit([*parent.tokens[:6], 1], 2, depth=1, fork_of=(parent, 6)))
        life.end()
        assert life.memory.copied == 1

    live()
    monkeypatch.setattr(Memory, "copy", lambda self, copies: None)
    with pytest.raises(AssertionError, match="reads what is not its own"):
        live()


def test_parents_that_keep_their_blocks_at_any_price_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.paused_are_spared(monkeypatch)
    assert_noticed("the first sequence runs in every step|nothing to run")


def test_a_prefix_hit_without_a_query_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: a fully cached prompt that leaves no token to run."""
    match = BlockPool.match
    monkeypatch.setattr(BlockPool, "match", lambda self, tokens: match(self, [*tokens, 0]))
    assert_noticed("no query|nothing to run|the first sequence runs in every step")


def test_blocks_kept_after_the_end_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.blocks_of_sequences_that_end_paused(monkeypatch)
    assert_noticed("counted")


@pytest.mark.parametrize("name", ["pause", "_reclaim"])
def test_pinned_blocks_that_are_not_counted_anew_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken.pinned_blocks_are_old(name)(monkeypatch)
    assert_noticed("a wrong number of pinned blocks")


def test_a_place_that_is_taken_and_not_used_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def step_with_a_newcomer() -> None:
        life = Life(20, 4, 30, max_sequences=2)
        for root in range(2):
            life.submit(prompt(3, root), 9, root=root)
        life.step()
        child = submitted(life.submit(prompt(5, 2), 9, root=1, depth=1))
        life.step()
        assert child.state is State.RUNNING

    step_with_a_newcomer()
    broken.newcomers_run_nothing(monkeypatch)
    with pytest.raises(AssertionError, match="a place was taken and not used"):
        step_with_a_newcomer()


# named regressions


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_two_waiting_parents_that_fill_the_pool_do_not_starve_their_children(prefix_cache: bool) -> None:
    parents = two_waiting_parents(Life(8, 2, 16, prefix_cache=prefix_cache), wait=False)
    assert sum(p.counters.dropped for p in parents) > 0


def test_of_two_paused_sequences_that_of_the_younger_root_loses_its_kv() -> None:
    life = Life(6, 4, 24, prefix_cache=False)
    older, younger = (submitted(life.submit(prompt(7, i), 1, root=i)) for i in range(2))
    life.drain()
    submitted(life.submit(prompt(11, 5), 1, root=0, depth=1))
    life.drain()
    assert (older.counters.dropped, younger.counters.dropped) == (0, 1)
    life.end()


def test_a_victim_that_shares_everything_frees_nothing_and_the_next_one_is_taken() -> None:
    """A child's fork holds only blocks that its paused parent holds too; taking them gives no block back."""
    life = Life(4, 2, 8, prefix_cache=False)
    parent = submitted(life.submit(prompt(4, 1), 1, root=1))
    life.drain()
    first = submitted(life.submit(prompt(4), 3, root=0))
    life.step()
    assert life.engine.pool.num_free == 0
    child = submitted(life.submit([*parent.tokens, 1], 2, root=1, depth=1, fork_of=(parent, 4)))
    assert child.table.blocks == parent.table.blocks
    life.step()
    assert (child.counters.preemptions, parent.counters.dropped) == (1, 1)
    assert first.table.length == 5
    life.end()
    assert (len(first.tokens), len(child.tokens)) == (7, 8)


def test_a_fork_whose_parent_is_the_only_victim_takes_the_shared_block_over() -> None:
    """No block is free for the copy of the shared tail, but without the parent it is not shared any more."""
    life = Life(2, 4, 8, prefix_cache=False)
    parent = submitted(life.submit(prompt(5), 1))
    life.drain()
    child = submitted(life.submit([*parent.tokens, 1], 1, depth=1, fork_of=(parent, 6)))
    assert child.table.blocks == parent.table.blocks
    life.drain()
    assert life.memory.copied == 0
    assert (parent.counters.dropped, len(child.tokens)) == (1, 8)
    life.end()


def one_by_one_from_the_last(self: Memory, copies: tuple[tuple[int, int], ...]) -> None:
    for source, destination in reversed(copies):
        for i in range(self.size):
            self.slots[destination * self.size + i] = self.slots[source * self.size + i]


@pytest.mark.parametrize("copy", [Memory.copy, one_by_one_from_the_last])
def test_a_source_may_be_freed_and_copied_into_in_the_same_step(
    copy: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``first`` copies out of a block that is then freed, and ``second`` gets that very block for its own copy.

    Right as long as every source is read before any destination is written; the second case is the control.
    """
    monkeypatch.setattr(Memory, "copy", copy)
    life = Life(3, 2, 6, prefix_cache=False)
    first, second = (submitted(life.submit([i], 4, root=i)) for i in range(2))
    life.step()
    for parent, root in ((first, 3), (second, 2)):  # forks that find no room in the batch
        submitted(life.submit([parent.tokens[0], 1 - parent.tokens[1] % 2], 2, root=root, fork_of=(parent, 1)))
    source, other = first.table.blocks[0], second.table.blocks[0]
    if copy is one_by_one_from_the_last:
        with pytest.raises(AssertionError, match="reads what is not its own"):
            life.step()
        return
    life.step()
    assert life.plan is not None
    assert life.plan.copies == ((source, first.table.blocks[0]), (other, source))
    life.end()


def test_one_free_block_goes_to_the_first_of_two_that_need_one() -> None:
    """Both running sequences stand at a block's end and one block is left."""
    life = Life(5, 2, 10, prefix_cache=False)
    older = submitted(life.submit(prompt(4), 4, root=0))
    younger = submitted(life.submit(prompt(4, 1), 4, root=1))
    life.step()
    assert life.engine.pool.num_free == 1
    life.step()
    assert (older.table.length, younger.table.length) == (5, 4)
    life.step()
    assert (older.table.length, younger.table.length) == (6, 4)  # waits with its blocks until others need them
    life.drain()
    assert (len(older.tokens), len(younger.tokens)) == (8, 8)
    life.end()


@pytest.mark.parametrize("max_sequences", [1, 64])
def test_depth_three_width_eight_in_the_smallest_pool(max_sequences: int) -> None:
    """Two children of eight split again on every level; each node waits for all of its children and goes on."""
    life = Life(6, 4, 24, max_sequences=max_sequences, step_tokens=6)
    waiting: dict[str, int] = {}
    parent_of: dict[str, Sequence] = {}
    splits: dict[str, bool] = {}

    def node(parent: Sequence | None, index: int) -> None:
        depth = parent.depth + 1 if parent else 0
        tokens = [*(parent.tokens if parent and index % 2 else prompt(4, depth)), *prompt(2, index)][-12:]
        fork = (parent, len(parent.tokens)) if parent and tokens[: len(parent.tokens)] == parent.tokens else None
        sequence = submitted(life.submit(tokens, 3, depth=depth, fork_of=fork))
        splits[sequence.key] = depth < 3 and index < 2
        if parent:
            parent_of[sequence.key] = parent

    node(None, 0)
    steps = 0
    while life.sequences:
        life.step()
        steps += 1
        assert steps < 4000
        for sequence in [s for s in life.sequences if s.state is State.PAUSED and not waiting.get(s.key)]:
            if splits.pop(sequence.key, False):
                waiting[sequence.key] = 8
                for index in range(8):
                    node(sequence, index)
                continue
            life.finish(sequence)
            if parent := parent_of.get(sequence.key):
                waiting[parent.key] -= 1
                if not waiting[parent.key]:
                    life.resume(parent, prompt(3), 3)
    assert len(life.finished) == 1 + 8 + 16 + 32
    life.end()


def test_the_last_place_goes_to_the_first_sequence() -> None:
    """A resumed older sequence holds most of the pool while a younger one has the only place in the batch."""
    life = Life(6, 2, 12, max_sequences=1, prefix_cache=False)
    older = submitted(life.submit(prompt(7), 1, root=0))
    life.drain()
    younger = submitted(life.submit(prompt(3, 1), 8, root=1))
    life.step()
    life.resume(older, prompt(1), 2)
    life.drain()
    assert (len(older.tokens), len(younger.tokens)) == (11, 11)
    life.end()


@pytest.mark.parametrize("prepare", ["fork", "truncate"])
def test_nothing_to_run_but_a_token_to_sample(prepare: str) -> None:
    """KV may be there for every token; the last one is run again, for its logits are needed."""
    life = Life(8, 2, 16, prefix_cache=False)
    root = submitted(life.submit(prompt(5), 4))
    life.drain()
    if prepare == "fork":
        other = submitted(life.submit(root.tokens[:6], 3, depth=1, fork_of=(root, 6)))
        assert other.counters.reused == 5
    else:
        life.engine.truncate(root, 6)
        life.resume(root, [], 3)
        other = root
    life.drain()
    assert len(other.tokens) == 9
    assert other.tokens == root.tokens
    life.end()

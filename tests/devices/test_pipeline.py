"""Several steps in flight: a sequence that waits for a token is left out, and whatever becomes of it, nothing is mixed
up.
"""

from typing import Any

import broken
import pytest
from hypothesis import given
from lives import Life, made_up, prompt, submitted
from random_lives import ACTIONS, SETTINGS, assert_noticed, live_through, lives

from rrm_engine.engine.scheduler import Scheduler
from rrm_engine.engine.sequence import Sequence
from rrm_engine.kv.table import BlockTable

PIPELINES = lives(stages=(2, 3, 4))
AHEAD = lives(stages=(2, 3, 4), lookahead=True)


@SETTINGS
@given(PIPELINES, ACTIONS)
def test_any_pipelined_life_ends_and_every_query_reads_its_own_history(life: Life, actions: Any) -> None:
    live_through(life, actions)


@SETTINGS
@given(AHEAD, ACTIONS)
def test_any_pipelined_life_that_looks_ahead_ends_and_every_query_reads_its_own_history(
    life: Life, actions: Any
) -> None:
    live_through(life, actions)


def test_a_sequence_that_ends_in_two_steps_at_once_ran_a_token_that_is_discarded() -> None:
    """Six queries: a prompt of five tokens and, ahead, the first sampled one, which is thrown away with its KV."""
    life = Life(7, 1, 7, max_sequences=1, step_tokens=1, prefix_cache=False, stages=2, lookahead=True)
    fork: tuple[Any, ...] = ("fork", 0, 0.0, [], 1)
    live_through(life, [fork, ("submit", [0, 0, 0, 0, 0], 2, 0), ("step", 4), fork, ("finish", 0)])
    [counters] = [s.counters for s in life.finished]
    assert (life.memory.queries, counters.prefilled, counters.decoded, life.run_for_nothing) == (6, 5, 0, 1)


def test_several_steps_are_in_flight_and_no_sequence_is_in_two() -> None:
    """Eight sequences over four stages: two in each step, and every call of step hands out those of the oldest."""
    life = Life(40, 4, 20, stages=4)
    sequences = [submitted(life.submit(prompt(1, i), 9, root=i)) for i in range(8)]
    life.step()  # all prompts fit into one step, which comes back at once
    handed_out = []
    for _ in range(8):
        before = [len(s.tokens) for s in sequences]
        life.step()
        assert life.engine.launched - life.engine.steps == 3
        handed_out.append({i for i, s in enumerate(sequences) if len(s.tokens) > before[i]})
    assert handed_out == [{0, 1}, {2, 3}, {4, 5}, {6, 7}] * 2
    life.end()


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_with_lookahead_one_step_more_is_in_flight(count: int) -> None:
    """Every stage has a step and the first one has the next: that of the sequence that has waited longest. Few are in
    two at once.
    """
    life = Life(100, 4, 40, stages=4, lookahead=True)
    sequences = [submitted(life.submit(prompt(1, i), 30, root=i)) for i in range(count)]
    for _ in range(8):
        life.step()
    order = []
    for _ in range(12):
        before = [len(s.tokens) for s in sequences]
        life.engine.launch()
        assert life.engine.launched - life.engine.steps == min(5, 2 * count)
        assert max(len(s.flights) for s in sequences) == 2
        life.step()
        order.append([i for i, s in enumerate(sequences) if len(s.tokens) > before[i]])
    each = -(-count // 4)
    assert all(len(step) == each for step in order)
    groups = order[: count // each]
    assert order == (groups * 12)[:12] and sorted(i for group in groups for i in group) == list(range(count))
    life.end()


def test_one_stage_has_nothing_in_flight_between_steps() -> None:
    life = Life(40, 4, 20)
    sequences = [submitted(life.submit(prompt(5, i), 4, root=i)) for i in range(3)]
    while life.engine.has_work:
        life.step()
        assert life.engine.launched == life.engine.steps
        assert not any(s.flights for s in sequences)
    life.end()


def flying(life: Life, tokens: int = 9) -> tuple[Sequence, Sequence]:
    """Two sequences, the second of them in flight."""
    first, second = (submitted(life.submit(prompt(tokens, i), 6, root=i)) for i in range(2))
    life.step()
    life.step()
    assert (bool(first.flights), bool(second.flights)) == (False, True)
    return first, second


@pytest.mark.parametrize("end", ["finish", "pause", "wait", "truncate"])
@pytest.mark.parametrize("policy", ["pin", "drop", "offload", "lru"])
def test_a_sequence_that_ends_in_flight_does_not_get_the_token(end: str, policy: Any) -> None:
    life = Life(20, 4, 40, stages=2, wait_policy=policy, host_blocks=20)
    _, second = flying(life)
    before = list(second.tokens)
    if end == "finish":
        life.finish(second)
    else:
        life.engine.pause(second)
        if end == "wait":
            life.engine.wait(second)
        elif end == "truncate":
            life.engine.truncate(second, 5)
            del before[5:]
    life.step()
    life.step()
    assert second.tokens == before
    if end != "finish":
        life.resume(second, prompt(2), 3)
        life.drain()
        assert len(second.tokens) == len(before) + 5
    life.end()


def test_resumed_before_the_token_of_an_earlier_launch_comes() -> None:
    """Paused, truncated and launched again with other tokens while the first launch is still in flight."""
    life = Life(20, 4, 40, stages=3)
    sequences = [submitted(life.submit(prompt(6, i), 8, root=i)) for i in range(3)]
    life.step()
    life.step()
    last = sequences[2]
    assert (stale := list(last.flights))
    life.engine.pause(last)
    life.engine.truncate(last, 4)
    life.resume(last, [1, 0, 1], 3)
    life.step()
    assert last.flights > stale
    life.drain()
    assert len(last.tokens) == 4 + 3 + 3
    life.end()


def test_a_sequence_in_flight_may_lose_its_blocks_and_still_gets_its_token() -> None:
    """The first sequence needs the block of a younger one, whose step has been launched already."""
    life = Life(5, 2, 10, stages=2, prefix_cache=False)
    older = submitted(life.submit(prompt(3), 5, root=0))
    younger = submitted(life.submit(prompt(4, 1), 4, root=1))
    life.drain()
    assert life.plans.in_flight > 0 and younger.counters.preemptions > 0
    assert (len(older.tokens), len(younger.tokens)) == (8, 8)
    life.end()


@pytest.mark.parametrize("length", [9, 6])
def test_a_fork_of_a_sequence_in_flight(length: int) -> None:
    """It shares the blocks of all tokens whose KV is there, and runs its own one alone."""
    life = Life(30, 4, 40, stages=2)
    _, second = flying(life)
    tokens, blocks = [*second.tokens[:length], 0], list(second.table.blocks)
    child = submitted(life.submit(list(tokens), 5, root=1, depth=1, fork_of=(second, length)))
    assert child.table.blocks == blocks[: -(-length // 4)]
    life.drain()
    assert child.table.blocks[: length // 4] == blocks[: length // 4] == second.table.blocks[: length // 4]
    assert not set(child.table.blocks[length // 4 :]) & set(second.table.blocks)
    for _ in range(5):
        tokens.append(made_up(tokens))
    assert child.tokens == tokens and len(second.tokens) == 9 + 6
    counters = child.counters
    assert (counters.reused, counters.prefilled, counters.decoded, counters.copied_blocks) == (length, 1, 5, 1)
    life.end()


def test_chunks_of_one_prompt_follow_each_other_through_the_stages() -> None:
    """A chunk that samples nothing is not waited for: the next one is launched right after it."""
    life = Life(20, 4, 60, stages=4, step_tokens=8)
    submitted(life.submit(prompt(32), 2))
    life.step()
    assert life.engine.launched == 4
    life.end()


@pytest.mark.parametrize("lookahead", [True, False])
def test_no_sequence_is_left_out_for_long(lookahead: bool) -> None:
    """Sequences come and go in all sizes of batches; one that could run waits for at most a round of the stages."""
    life = Life(200, 4, 60, stages=4, step_tokens=100, lookahead=lookahead)
    waited: dict[str, int] = {}
    for turn in range(60):
        if turn % 7 == 0:
            for i in range(turn % 5 + 1):
                submitted(life.submit(prompt(3, turn + i), 5 + i * 4, root=turn))
        life.step()
        for sequence in life.scheduler.live:
            waited[sequence.key] = 0 if sequence.flights else waited.get(sequence.key, 0) + 1
            assert waited[sequence.key] <= 4
    life.end()


# negative controls


@pytest.mark.parametrize("less", [1, 9])
def test_a_fork_that_shares_less_than_there_is_is_noticed(less: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fork = BlockTable.fork
    monkeypatch.setattr(BlockTable, "fork", lambda self, length: fork(self, max(0, length - less)))
    for length in (9, 6):
        with pytest.raises(AssertionError):
            test_a_fork_of_a_sequence_in_flight(length)


def test_a_sequence_in_flight_that_is_run_again_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler forgets which sequences are in flight."""

    class Forgetful(Scheduler):
        def schedule(self, drawn: Any = ()) -> Any:
            for sequence in self.live:
                sequence.flights = []
            return super().schedule(drawn)

    monkeypatch.setattr("rrm_engine.engine.engine.Scheduler", Forgetful)
    assert_noticed("in flight is run again|the first sequence runs|nothing to run", some_lives=lives(stages=(3,)))


def test_a_token_for_a_sequence_that_does_not_wait_for_it_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.tokens_that_no_sequence_waits_for(monkeypatch)
    for end in ("finish", "pause", "wait", "truncate"):
        with pytest.raises((AssertionError, ValueError)):
            test_a_sequence_that_ends_in_flight_does_not_get_the_token(end, "pin")


def test_tokens_in_the_wrong_order_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    broken.tokens_in_another_order(monkeypatch)
    assert_noticed("not the sequence's token", some_lives=lives(stages=(2,)))


def test_steps_that_run_what_was_launched_last_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first sequence in line runs ahead: devices would wait for a step that has only just been launched."""
    monkeypatch.setattr(Sequence, "launched", 0)
    assert_noticed("others waited longer", some_lives=AHEAD)

"""What becomes of a waiting sequence's KV is a policy; its tokens are the same under every one of them."""

from typing import get_args

import pytest
import torch
from graph_scripts import (
    CHEAP_COPIES,
    DEAR_COPIES,
)
from lives import Life, prompt, submitted, two_waiting_parents
from oracle import engine_for, plain_model, prepared
from random_lives import live_through

from rrm_engine.config import WaitPolicy
from rrm_engine.engine.runner import ModelRunner
from rrm_engine.engine.scheduler import SchedulerOutput
from rrm_engine.engine.sequence import Sequence
from rrm_engine.kv.cache import KVCache, LayerShape
from rrm_engine.kv.host import HostCopy, SwapCosts
from rrm_engine.loading import row_costs
from rrm_engine.loading.prepare import LoadedModel

POLICIES = get_args(WaitPolicy)


def waiting_parent(life: Life, length: int = 10) -> Sequence:
    """A sequence of ``length`` tokens that waits; the KV of all but its last token exists or existed."""
    parent = submitted(life.submit(prompt(length - 1), 1))
    life.drain()
    life.engine.wait(parent)
    life.check()
    return parent


def resumed(life: Life, parent: Sequence) -> int:
    """Tokens prefilled to go on with three more."""
    before = parent.counters.prefilled
    life.resume(parent, prompt(3, 1), 2)
    life.drain()
    return parent.counters.prefilled - before


@pytest.mark.parametrize(
    ("policy", "prefix_cache", "held", "prefilled"),
    [
        ("pin", True, 3, 3),
        ("pin", False, 3, 3),
        ("auto", True, 3, 3),
        ("offload", True, 0, 3),
        ("offload", False, 0, 3),
        ("drop", True, 0, 12),
        ("drop", False, 0, 12),
        ("lru", True, 0, 4),  # two full blocks of four are found again
        ("lru", False, 0, 12),
    ],
)
def test_what_a_policy_holds_and_what_it_computes_again(
    policy: WaitPolicy, prefix_cache: bool, held: int, prefilled: int
) -> None:
    """The parent's last token was sampled and not run before it waited: it never counts as prefilled."""
    life = Life(12, 4, 40, prefix_cache=prefix_cache, wait_policy=policy, host_blocks=12)
    parent = waiting_parent(life)
    assert life.engine.pool.num_used == held
    assert life.engine.space.num_used == (3 if policy == "offload" else 0)
    assert resumed(life, parent) == prefilled
    assert parent.counters.restored_blocks == (3 if policy == "offload" else 0)
    life.end()


def test_blocks_that_others_hold_stay_where_they_are() -> None:
    """A fork shares its parent's blocks: offloading the parent moves only what is its own."""
    life = Life(12, 4, 40, wait_policy="offload", host_blocks=12)
    parent = submitted(life.submit(prompt(9), 4))
    life.drain()
    child = submitted(life.submit([*parent.tokens[:9], 1], 3, depth=1, fork_of=(parent, 8)))
    life.engine.wait(parent)
    assert (len(parent.table.blocks), parent.table.host[0].count) == (2, 1)
    life.drain()
    assert resumed(life, parent) == 3
    assert parent.table.blocks[:2] == child.table.blocks[:2]
    life.end()


def test_a_resume_that_arrives_while_its_parent_is_being_offloaded() -> None:
    """No step lies between wait and resume: the blocks go out and come back in one."""
    life = Life(12, 4, 40, wait_policy="offload", host_blocks=12)
    parent = waiting_parent(life)
    life.resume(parent, prompt(3, 1), 2)
    assert parent.counters.restored_blocks == 0
    life.step()
    assert life.plan is not None
    assert (len(life.plan.swap_outs), len(life.plan.swap_ins)) == (1, 1)
    assert life.plan.swap_outs[0][0] is life.plan.swap_ins[0][0]
    life.end()


def test_a_parent_may_forget_its_end_while_it_is_offloaded() -> None:
    life = Life(12, 4, 40, wait_policy="offload", host_blocks=12)
    parent = waiting_parent(life, 10)
    life.engine.truncate(parent, 5)
    assert (life.engine.space.num_used, parent.table.stored) == (2, 5)
    assert resumed(life, parent) == 3
    life.end()


def test_without_room_in_host_memory_a_parent_stays_pinned() -> None:
    life = Life(12, 4, 40, wait_policy="offload", host_blocks=2)
    parent = waiting_parent(life)
    assert (life.engine.pool.num_used, parent.counters.offloaded_blocks) == (3, 0)
    assert resumed(life, parent) == 3
    life.end()


@pytest.mark.parametrize(
    ("costs", "host_blocks", "moved", "prefilled"),
    [(CHEAP_COPIES, 20, 3, 3), (DEAR_COPIES, 20, 0, 12), (CHEAP_COPIES, 2, 0, 12), (None, 20, 0, 12)],
)
def test_auto_moves_or_drops_by_cost_once_memory_runs_out(
    costs: SwapCosts | None, host_blocks: int, moved: int, prefilled: int
) -> None:
    life = Life(10, 4, 40, prefix_cache=False, wait_policy="auto", host_blocks=host_blocks, costs=costs)
    parent = waiting_parent(life)
    assert parent.counters.offloaded_blocks == 0
    child = submitted(life.submit(prompt(30, 2), 4, depth=1))
    life.drain()
    assert (parent.counters.offloaded_blocks, parent.counters.dropped) == (moved, 0 if moved else 1)
    life.finish(child)
    assert resumed(life, parent) == prefilled
    life.end()


@pytest.mark.parametrize("policy", POLICIES)
def test_two_waiting_parents_that_fill_the_pool_under_every_policy(policy: WaitPolicy) -> None:
    parents = two_waiting_parents(Life(8, 2, 16, wait_policy=policy, host_blocks=3, costs=CHEAP_COPIES), wait=True)
    assert any(p.counters.prefilled > 7 + 3 or p.counters.restored_blocks > 0 for p in parents)  # it did not stay


def test_costs_are_measured_and_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_costs, "SHORTEST_S", 0.0)
    engine = engine_for(prepared(plain_model("qwen3")), wait_policy="auto", drafts=3, weigh_drafts=True)
    costs, drafting = engine.scheduler.costs, engine.drafting
    assert costs is not None and costs.copy_block_s > 0 and costs.prefill_token_s > 0
    assert drafting is not None and drafting.costs is not None and min(drafting.costs.seconds) > 0
    assert (engine.steps, engine.pool.peak_used, engine.pool.num_used) == (0, 0, 0)
    assert engine.pool.match([0] * 50) == []
    engine.check()


def test_drafts_are_not_weighed_where_steps_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    model = prepared(plain_model("qwen3"))
    monkeypatch.setattr(row_costs, "SHORTEST_S", float("inf"))
    assert engine_for(model, drafts=3, weigh_drafts=True).drafting is None
    assert engine_for(model, drafts=3).drafting is not None


def test_a_block_that_was_copied_from_may_be_swapped_into_in_the_same_step() -> None:
    """The only other holder of a fork's shared tail is offloaded to make room; the sequence that comes back gets that
    block.
    """
    life = Life(10, 4, 31, step_tokens=5, prefix_cache=False, eos=True, wait_policy="offload", host_blocks=99)
    actions = [
        ("submit", [1, 0, 0, 1, 1, 1, 0, 1, 0], 1, 0),
        ("submit", [0, 0, 1, 0, 0], 1, 0),
        ("step", 6),
        ("submit", [0, 1, 0, 0, 1], 1, 2),
        ("fork", 33, 0.25, [0, 1, 1, 0, 0], 1),
        ("fork", 16, 0.81, [0, 1], 1),
        ("fork", 27, 1.0, [], 1),
        ("step", 3),
        ("keep and join", 19, 34, 0.18, 0.5, [1, 0], 1),
        ("fork", 7, 0.82, [0, 1, 0, 0], 1),
        ("fork", 45, 0.26, [0, 1, 1, 0], 1),
        ("finish", 22),
    ]
    live_through(life, actions)


def test_a_step_moves_blocks_in_the_order_in_which_they_were_planned(model: LoadedModel) -> None:
    """Out, copied, in: block 2 leaves before a copy takes its place; block 1 is copied before others come into it."""
    shape = LayerShape(1, 2, 2, torch.float32, torch.device("cpu"))
    cache = KVCache(3, 1, {0: shape})
    keys, values = cache.pools(0, shape)
    for block in range(4):
        keys[block], values[block] = block, -block
    elsewhere, leaving = HostCopy(1), HostCopy(1)
    cache.swap_out(elsewhere, [3])
    step = SchedulerOutput(
        (), copies=((1, 2),), swap_outs=((leaving, (2,)),), swap_ins=((elsewhere, (1,)),), swapped=("a", "b")
    )
    ModelRunner(model.forward, cache, torch.device("cpu")).run(step)
    assert keys[:, 0, 0, 0].tolist() == [0, 3, 1, 3]
    assert values[:, 0, 0, 0].tolist() == [0, -3, -1, -3]
    cache.swap_in(leaving, [3])
    assert keys[3, 0, 0, 0] == 2

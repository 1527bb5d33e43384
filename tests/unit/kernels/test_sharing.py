"""The planner of shared-prefix attention: every block is read exactly once, and only where it pays."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rrm_kernels.buffers import batch_of
from rrm_kernels.sharing import MAX_SHARED_QUERIES, SharedRun, SharingCost, SharingPlan, find_shared_runs, plan_sharing

SIZE = 4
ALWAYS = SharingCost(member=0, crossover=0)


@st.composite
def families(draw: Any) -> tuple[list[list[int]], list[int]]:
    """Block tables as forks make them: each grows from a prefix of an earlier one, or from nothing."""
    tables: list[list[int]] = []
    fresh = iter(range(1, 10_000))
    for i in range(draw(st.integers(0, 9))):
        base = tables[draw(st.integers(0, i - 1))] if i and draw(st.booleans()) else []
        table = base[: draw(st.integers(0, len(base)))] + [next(fresh) for _ in range(draw(st.integers(0, 6)))]
        tables.append(table)
    lengths = [draw(st.integers(0, len(table) * SIZE)) for table in tables]
    return tables, lengths


costs = st.builds(SharingCost, member=st.integers(0, 40), crossover=st.integers(0, 60))


def faults(tables: Sequence[Sequence[int]], lengths: Sequence[int], plan: SharingPlan) -> list[str]:
    """What is wrong with a plan; empty if every (sequence, block) is read once and from the right physical block."""
    found = []
    covered: Counter[tuple[int, int]] = Counter()
    for run in plan.runs:
        if len(set(run.members)) != len(run.members) or len(run.members) < 2 or run.first >= run.stop:
            found.append(f"{run} shares nothing")
        if len({tuple(tables[m][run.first : run.stop]) for m in run.members}) != 1:
            found.append(f"{run} is not the same blocks for all members")
        for m in run.members:
            if run.stop * SIZE > lengths[m]:
                found.append(f"{run} reaches beyond what all queries of {m} see")
            covered.update((m, block) for block in range(run.first, run.stop))
    for i, table in enumerate(tables):
        covered.update((i, block) for block in range(plan.private_from[i], len(table)))
        found += [f"block {b} of {i} is read {covered[i, b]} times" for b in range(len(table)) if covered[i, b] != 1]
    return found


@given(families(), costs)
def test_every_block_of_every_sequence_is_read_exactly_once(family: Any, cost: SharingCost) -> None:
    tables, lengths = family
    plan = find_shared_runs(tables, lengths, SIZE, cost)
    assert faults(tables, lengths, plan) == []
    saved = sum(cost.saved(len(run.members), (run.stop - run.first) * SIZE) for run in plan.runs)
    assert not plan.runs or saved >= max(1, cost.crossover)
    # Runs of one sequence come in order, each where the one before ended: what the partial results' numbers rest on.
    for i in range(len(tables)):
        mine = [run for run in plan.runs if i in run.members]
        assert [run.first for run in mine] == [0, *(run.stop for run in mine)][:-1] if mine else True


@given(families())
def test_at_no_cost_no_physical_block_is_read_twice_that_need_not_be(family: Any) -> None:
    tables, lengths = family
    plan = find_shared_runs(tables, lengths, SIZE, ALWAYS)
    reads = Counter(block for run in plan.runs for block in tables[run.members[0]][run.first : run.stop])
    for table, length, first in zip(tables, lengths, plan.private_from, strict=True):
        reads.update(table[first : length // SIZE])
    assert all(count == 1 for count in reads.values())


@pytest.mark.parametrize(
    "broken",
    [
        SharingPlan([SharedRun(0, 2, (0, 1))], [2, 1]),  # one block twice
        SharingPlan([SharedRun(0, 2, (0, 1))], [2, 3]),  # one block never
        SharingPlan([SharedRun(0, 3, (0, 1))], [3, 3]),  # the third is not the same
        SharingPlan([SharedRun(0, 2, (0, 2))], [2, 0, 2]),  # beyond the length
    ],
)
def test_broken_plans_are_noticed(broken: SharingPlan) -> None:
    """Negative control of the check that the property tests rest on."""
    tables, lengths = [[1, 2, 3], [1, 2, 4], [1, 2]], [12, 12, 7]
    broken.private_from.extend([0] * (3 - len(broken.private_from)))
    assert faults(tables, lengths, broken) != []
    assert faults(tables, lengths, find_shared_runs(tables, lengths, SIZE, ALWAYS)) == []


def test_nested_and_separate_groups() -> None:
    tables = [[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 6], [7, 8], [7, 8, 9], [10]]
    plan = find_shared_runs(tables, [len(t) * SIZE for t in tables], SIZE, ALWAYS)
    assert sorted((r.first, r.stop, r.members) for r in plan.runs) == [
        (0, 2, (0, 1, 2)),
        (0, 2, (3, 4)),
        (2, 3, (0, 1)),
    ]
    assert plan.private_from == [3, 3, 2, 2, 2, 0]


def test_a_short_common_start_is_left_to_the_longer_runs_below_it() -> None:
    tables = [[1, *range(10, 20)], [1, *range(10, 20)], [1, *range(20, 30)], [1, *range(20, 30)], [1]]
    plan = find_shared_runs(tables, [len(t) * SIZE for t in tables], SIZE, SharingCost(member=4, crossover=0))
    assert sorted((r.first, r.stop, r.members) for r in plan.runs) == [(0, 11, (0, 1)), (0, 11, (2, 3))]
    assert plan.private_from == [11, 11, 11, 11, 0]


def test_the_crossover_decides_for_the_step_as_a_whole() -> None:
    tables = [[1, 2, 3], [1, 2, 4]]
    lengths = [12, 12]
    assert find_shared_runs(tables, lengths, SIZE, SharingCost(member=0, crossover=8)).runs
    assert not find_shared_runs(tables, lengths, SIZE, SharingCost(member=0, crossover=9)).runs
    assert not find_shared_runs(tables, lengths, SIZE).runs  # the default: nothing so short pays


@pytest.mark.parametrize(("queries", "pieces"), [(MAX_SHARED_QUERIES, 1), (MAX_SHARED_QUERIES + 1, 0)])
def test_a_step_with_a_long_prefill_chunk_shares_nothing(queries: int, pieces: int) -> None:
    """Two decodes over common blocks, and a chunk."""
    step = [1, 1, queries], [9, 14, 11], [[1, 2, 3], [1, 2, 4, 5], [6, 7, 8]], SIZE
    batch = batch_of(*step, torch.device("cpu"), plan_sharing(*step, ALWAYS))
    assert batch.query_start.tolist() == [0, 1, 2, 2 + queries]
    assert batch.context_len.tolist() == [9, 14, 11]
    assert batch.block_table.tolist() == [[1, 2, 3, 0], [1, 2, 4, 5], [6, 7, 8, 0]]
    assert batch.num_seqs.tolist() == [3]
    assert batch.num_pieces.tolist() == [pieces]
    assert batch.first_key.tolist() == [2 * SIZE * pieces] * 2 + [0]
    assert plan_sharing(*step, None) is None

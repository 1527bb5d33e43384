"""Ragged and shared-prefix attention in Triton against the torch reference, on packed random batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from rrm_kernels.batch import Capacity, PagedBatch, Scores
from rrm_kernels.buffers import BatchBuffers, batch_of
from rrm_kernels.reference import paged_attention

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux)")
from rrm_kernels.ragged import ragged_attention
from rrm_kernels.sharing import SharingCost, SharingPlan, find_shared_runs
from rrm_kernels.tile import INTERPRETED, Tile

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
SMALL = Tile(16, 16)  # several tiles even in short contexts
ALWAYS = SharingCost(member=0, crossover=0)


@dataclass
class Case:
    """Random pools whose unused lines are NaN, and sequences of (query tokens, context) with scattered blocks."""

    seqs: Sequence[tuple[int, int]]
    heads: int = 4
    kv_heads: int = 2
    widths: tuple[int, int] = (16, 16)
    block_size: int = 4
    dtype: torch.dtype = torch.float32
    shared: Sequence[tuple[int, int, int]] = ()  # (sequence, from sequence, its leading blocks)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(len(self.seqs) + self.heads)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(self.dtype)

        sizes = [-(-context // self.block_size) for _, context in self.seqs]
        blocks = sum(sizes) + 1
        order = (torch.randperm(blocks - 1, generator=generator) + 1).tolist()
        self.tables = [[order.pop() for _ in range(size)] for size in sizes]
        for row, source, count in self.shared:
            self.tables[row][:count] = self.tables[source][:count]
        self.key = random(blocks, self.block_size, self.kv_heads, self.widths[0])
        self.value = random(blocks, self.block_size, self.kv_heads, self.widths[1])
        self.query = random(sum(q for q, _ in self.seqs), self.heads, self.widths[0])
        self.sinks = random(self.heads)
        used = torch.zeros(blocks, self.block_size, dtype=torch.bool)
        for table, (_, context) in zip(self.tables, self.seqs, strict=True):
            for i in range(context):
                used[table[i // self.block_size], i % self.block_size] = True
        self.unused = ~used

    def expected(self, *options: Any) -> torch.Tensor:
        """The reference in fp32, on the same (rounded) inputs."""
        queries, contexts = zip(*self.seqs, strict=True)
        batch = batch_of(queries, contexts, self.tables, self.block_size, torch.device("cpu"))
        sinks = self.sinks.float() if options and options[-1] else None
        scale, window, softcap = options[:3] if options else (0.25, None, None)
        given = (self.query.float(), self.key.float(), self.value.float(), batch)
        return paged_attention(*given, Scores(scale, window, softcap, sinks))

    def batch(self, sharing: SharingPlan | None = None) -> PagedBatch:
        queries, contexts = zip(*self.seqs, strict=True)
        return batch_of(queries, contexts, self.tables, self.block_size, DEVICE, sharing)

    def plan(self, cost: SharingCost = ALWAYS) -> SharingPlan:
        return find_shared_runs(self.tables, [c - q for q, c in self.seqs], self.block_size, cost)

    def run(
        self,
        scale: float = 0.25,
        window: int | None = None,
        softcap: float | None = None,
        sinks: bool = False,
        *,
        batch: PagedBatch | None = None,
        splits: int = 1,
        tile: Tile | None = SMALL,
    ) -> torch.Tensor:
        key, value = self.key.clone(), self.value.clone()
        key[self.unused], value[self.unused] = float("nan"), float("nan")
        query, key, value = (t.to(DEVICE) for t in (self.query, key, value))
        scores = Scores(scale, window, softcap, self.sinks.to(DEVICE) if sinks else None)
        out = ragged_attention(query, key, value, batch or self.batch(), scores, splits=splits, tile=tile)
        return out.cpu().float()


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest value; NaN counts as infinite."""
    return float(((result - expected).abs().nan_to_num(float("inf")).max() / expected.abs().max()).item())


MIXED = [(1, 37), (1, 1), (5, 23), (1, 16), (7, 7), (2, 30)]
OPTIONS = [(0.25, None, None, False), (0.3, 7, None, True), (0.25, None, 2.0, True), (0.25, 20, 5.0, False)]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("options", OPTIONS)
def test_packed_chunks_and_decodes_equal_the_reference(options: Any, splits: int) -> None:
    case = Case(MIXED)
    assert difference(case.run(*options, splits=splits), case.expected(*options)) < 3e-6


@pytest.mark.parametrize(
    ("heads", "kv_heads", "widths", "block_size"),
    [(5, 1, (24, 24), 16), (6, 3, (20, 12), 5), (8, 8, (16, 16), 3), (71, 1, (8, 40), 16)],
)
def test_odd_shapes(heads: int, kv_heads: int, widths: tuple[int, int], block_size: int) -> None:
    case = Case([(1, 21), (4, 40), (1, 3)], heads, kv_heads, widths, block_size)
    for splits, tile in ((1, None), (2, Tile(128, 16))):
        result = case.run(0.25, 9, None, True, splits=splits, tile=tile)
        assert difference(result, case.expected(0.25, 9, None, True)) < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_fp32(dtype: torch.dtype) -> None:
    case = Case(MIXED, dtype=dtype)
    for splits in (1, 2):
        assert difference(case.run(splits=splits), case.expected(0.25, None, None, False)) < 2 * torch.finfo(dtype).eps


def test_scores_far_apart_do_not_overflow() -> None:
    case = Case(MIXED)
    case.query *= 100
    for splits in (1, 3):
        assert difference(case.run(1.0, splits=splits), case.expected(1.0, None, None, False)) < 1e-4


def test_a_strided_query_is_read_where_it_lies() -> None:
    case = Case(MIXED)
    expected = case.run()
    case.query = case.query.transpose(0, 1).contiguous().transpose(0, 1)  # as transformers hands it over
    assert torch.equal(case.run(), expected)


@pytest.mark.parametrize("broken", ["context", "table", "query_start"])
def test_a_wrong_batch_is_noticed(broken: str) -> None:
    """Negative control: the comparisons above depend on every buffer."""
    case = Case(MIXED)
    batch = case.batch()
    if broken == "context":
        batch.context_len[0] -= 1
    elif broken == "table":
        batch.block_table[0] = batch.block_table[0].flip(0)
    else:
        batch.query_start[3] -= 1
    assert difference(case.run(batch=batch), case.expected(0.25, None, None, False)) > 0.01


def test_buffers_of_fixed_capacity_serve_step_after_step() -> None:
    """As under CUDA graphs: the same buffers and grid, first a large step, then a small one, then none."""
    large = Case([(1, 37), (1, 21), (4, 9), (1, 16)], shared=[(3, 0, 3), (1, 0, 4)])
    small = Case([(1, 9), (3, 14)])
    buffers = BatchBuffers(Capacity(5, 10, 5, 12, pieces=3, members=6, run_members=4, partials=3), 4, DEVICE)
    for case in (large, small):
        queries, contexts = zip(*case.seqs, strict=True)
        plan = case.plan()
        assert bool(plan.runs) == (case is large)
        batch = buffers.update(queries, contexts, case.tables, plan)
        expected = case.expected(0.25, None, None, False)
        case.query = torch.cat([case.query, torch.full((10 - len(case.query), *case.query.shape[1:]), float("nan"))])
        assert difference(case.run(batch=batch, splits=2)[: len(expected)], expected) < 3e-6
    small.run(batch=buffers.update([], [], []), splits=2)


def test_a_step_beyond_the_capacity_is_refused() -> None:
    buffers = BatchBuffers(Capacity(2, 4, 2, 8), 4, DEVICE)
    with pytest.raises(ValueError, match="this step has 3 seqs, the buffers were made for 2"):
        buffers.update([1, 1, 1], [1, 1, 1], [[1], [2], [3]])
    with pytest.raises(ValueError, match="this step has 3 queries, the buffers were made for 2"):
        buffers.update([3], [3], [[1]])


# sequences, and what they share: two groups, one with a group inside it, and outsiders with prefill chunks
FAMILY = [(1, 41), (1, 33), (1, 29), (1, 22), (1, 30), (1, 18), (1, 9), (6, 26)]
FAMILY_SHARES = [(1, 0, 6), (2, 0, 3), (3, 0, 3), (5, 4, 4), (7, 4, 2)]


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[2]])
def test_shared_runs_give_the_same_as_reading_them_for_each(options: Any) -> None:
    case = Case(FAMILY, shared=FAMILY_SHARES)
    plan = case.plan()
    assert sorted((run.first, run.stop, run.members) for run in plan.runs) == [
        (0, 2, (4, 5, 7)),
        (0, 3, (0, 1, 2, 3)),
        (2, 4, (4, 5)),
        (3, 6, (0, 1)),
    ]
    expected = case.expected(*options)
    assert difference(case.run(*options), expected) < 3e-6
    for splits in (1, 2):
        batch = case.batch(plan)
        assert batch.capacity.partials == 2
        assert difference(case.run(*options, batch=batch, splits=splits), expected) < 3e-6


def test_shared_runs_are_really_read_for_all_members() -> None:
    """Negative control: a member's own table may be wrong where a run covers it, the run's owner's may not."""
    case = Case(FAMILY, shared=FAMILY_SHARES)
    expected = case.expected(0.25, None, None, False)
    batch = case.batch(case.plan())
    batch.block_table[1, :6] = 0
    assert difference(case.run(batch=batch), expected) < 3e-6
    batch.block_table[0, 1] = 0
    wrong = (case.run(batch=batch) - expected).abs().amax((1, 2)).nan_to_num(float("inf"))
    assert (wrong[:4] > 0.01).all()
    assert (wrong[4:] < 1e-5).all()


def test_windowed_layers_ignore_shared_runs() -> None:
    case = Case(FAMILY, shared=FAMILY_SHARES)
    result = case.run(0.25, 7, None, False, batch=case.batch(case.plan()))
    assert torch.equal(result, case.run(0.25, 7, None, False))
    assert difference(result, case.expected(0.25, 7, None, False)) < 3e-6


def test_a_long_run_is_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rrm_kernels.buffers.PIECE", 10)
    case = Case(FAMILY, shared=FAMILY_SHARES)
    batch = case.batch(case.plan())
    assert batch.capacity.partials == 4
    assert difference(case.run(batch=batch), case.expected(0.25, None, None, False)) < 3e-6

"""The compiled CPU kernel against the torch reference, and both against plain attention written out."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracle import VARIANTS, compiled
from rrm_kernels import reference
from rrm_kernels.batch import Scores
from rrm_kernels.buffers import batch_of
from rrm_kernels.native import load_native
from rrm_kernels.reference import paged_attention

BLOCKS, BLOCK_SIZE = 40, 4


@pytest.fixture(scope="module", params=VARIANTS)
def native(request: pytest.FixtureRequest) -> Any:
    return compiled(lambda: load_native(request.param))


class Case:
    """Random caches, three decoding sequences of different length, and two chunks that follow them."""

    def __init__(self, heads: int, kv_heads: int, key_width: int, value_width: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(heads * 1000 + key_width)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        self.key = random(BLOCKS, BLOCK_SIZE, kv_heads, key_width)
        self.value = random(BLOCKS, BLOCK_SIZE, kv_heads, value_width)
        self.query = random(3 + 5 + 2, heads, key_width)
        self.sinks = random(heads)
        order = torch.randperm(BLOCKS - 1, generator=generator) + 1
        tables = [order[start:stop].tolist() for start, stop in pairwise([0, 1, 3, 10, 13, 14])]
        self.batch = batch_of([1, 1, 1, 5, 2], [1, 6, 27, 11, 2], tables, BLOCK_SIZE, torch.device("cpu"))
        self.places = [(tables[0], 0, 1), (tables[1], 5, 6), (tables[2], 26, 27)]  # (table, position, length) a row
        self.places += [(tables[3], 6 + i, 7 + i) for i in range(5)] + [(tables[4], i, i + 1) for i in range(2)]

    def written_out(self, scale: float, window: int | None, softcap: float | None, sinks: bool) -> torch.Tensor:
        """Row by row and head by head, in float64."""
        out = torch.zeros(*self.query.shape[:2], self.value.shape[3], dtype=torch.float64)
        per_kv = self.query.shape[1] // self.key.shape[2]
        for row, (table, position, length) in enumerate(self.places):
            first = max(0, position + 1 - window) if window else 0
            slots = [int(table[i // BLOCK_SIZE]) * BLOCK_SIZE + i % BLOCK_SIZE for i in range(first, length)]
            for head in range(self.query.shape[1]):
                k = self.key.flatten(0, 1)[slots, head // per_kv].double()
                v = self.value.flatten(0, 1)[slots, head // per_kv].double()
                scores = k @ self.query[row, head].double() * scale
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                extra = self.sinks[head : head + 1].double() if sinks else scores[:0]
                out[row, head] = torch.cat([scores, extra]).softmax(0)[: len(slots)] @ v
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_width", "value_width"),
    [(6, 2, 16, 16), (4, 4, 24, 12), (5, 1, 7, 7), (4, 2, 48, 48), (9, 3, 64, 64), (8, 1, 80, 80), (3, 1, 256, 256)],
)
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"), [(None, None, False), (5, None, False), (None, 3.0, True), (9, None, True)]
)
def test_both_equal_attention_written_out(
    native: Any,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    key_width: int,
    value_width: int,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "CAUSAL_PIECE", 3)  # the chunks are done in more than one piece
    case = Case(heads, kv_heads, key_width, value_width, dtype)
    scale = 1 / math.sqrt(key_width)
    expected = case.written_out(scale, window, softcap, sinks)
    scores = Scores(scale, window, softcap, case.sinks if sinks else None)
    for attention in (paged_attention, native):
        result = attention(case.query, case.key, case.value, case.batch, scores)
        bound = 2e-6 if dtype == torch.float32 else 0.03
        assert (result.double() - expected).abs().max() < bound * expected.abs().max(), attention


def check_long_contexts(
    native: Any,
    shape: tuple[int, int, int],
    lengths: list[int],
    block_size: int,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Every row against float64, and its bits do not depend on the others. ``shape``: heads, kv heads, width."""
    heads, kv_heads, width = shape
    generator = torch.Generator().manual_seed(block_size)
    counts = [-(-length // block_size) for length in lengths]
    key, value = torch.randn(2, sum(counts) + 1, block_size, kv_heads, width, generator=generator)
    query = torch.randn(len(lengths), heads, width, generator=generator)
    order = (torch.randperm(sum(counts), generator=generator) + 1).tolist()
    tables = [order[sum(counts[:i]) :][:count] for i, count in enumerate(counts)]
    cpu, scores = torch.device("cpu"), Scores(width**-0.5, window, None, sinks)
    out = native(query, key, value, batch_of([1] * len(lengths), lengths, tables, block_size, cpu), scores)
    for i, (length, table) in enumerate(zip(lengths, tables, strict=True)):
        first = max(0, length - window) if window else 0
        k, v = (
            x[table].flatten(0, 1)[first:length].double().repeat_interleave(heads // kv_heads, 1) for x in (key, value)
        )
        weights = torch.einsum("hw,lhw->hl", query[i].double(), k) * width**-0.5
        if sinks is not None:
            weights = torch.cat([weights, sinks[:, None].double()], 1)
        weights = weights.softmax(-1)[:, : length - first]
        assert (out[i] - torch.einsum("hl,lhw->hw", weights, v)).abs().max() < 2e-6
        alone = native(query[i : i + 1], key, value, batch_of([1], [length], [table], block_size, cpu), scores)
        assert torch.equal(alone[0], out[i])


@pytest.mark.parametrize("block_size", [1, 5, 16, 48, 128])
@pytest.mark.parametrize("window", [None, 70, 129])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"),
    [(7, 1, 64), (10, 2, 128), (3, 3, 64), (2, 2, 256), (8, 4, 96), (9, 3, 80), (4, 1, 48)],
)
def test_long_contexts_are_worked_on_tile_by_tile(
    native: Any, heads: int, kv_heads: int, width: int, window: int | None, block_size: int
) -> None:
    """Lengths around multiples of a tile."""
    check_long_contexts(native, (heads, kv_heads, width), [47, 48, 49, 65, 96, 197, 300], block_size, window)


@pytest.mark.parametrize("window", [None, 960, 961, 2000])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(7, 1, 64), (10, 2, 128), (3, 3, 48), (2, 1, 40)])
def test_longer_contexts_are_worked_on_span_by_span(
    native: Any, heads: int, kv_heads: int, width: int, window: int | None, sinks: bool
) -> None:
    """Lengths around multiples of a span, and a sink counts once."""
    of_sinks = torch.linspace(2, 8, heads) if sinks else None
    lengths = [960, 961, 30, 1920, 1921, 2900]
    check_long_contexts(native, (heads, kv_heads, width), lengths, 16, window, of_sinks)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 6), (14, 7), (20, 4)])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_bits_do_not_depend_on_threads(native: Any, heads: int, kv_heads: int, rows: int) -> None:
    """Threads take heads of a row by themselves where there are few rows."""
    generator = torch.Generator().manual_seed(rows)
    lengths = [3000 - 100 * row for row in range(rows)]
    counts = [-(-length // 16) for length in lengths]
    key, value = torch.randn(2, sum(counts), 16, kv_heads, 64, generator=generator).bfloat16()
    query = torch.randn(rows, heads, 64, generator=generator).bfloat16()
    tables = [list(range(sum(counts[:row]), sum(counts[: row + 1]))) for row in range(rows)]
    batch, threads = batch_of([1] * rows, lengths, tables, 16, torch.device("cpu")), torch.get_num_threads()
    found = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(native(query, key, value, batch, Scores(0.125)))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("width", [16, 64])
def test_a_wrong_table_is_noticed(native: Any, width: int) -> None:
    """Negative control: the comparison above depends on the blocks' order."""
    case = Case(6, 2, width, width, torch.float32)
    expected = case.written_out(0.25, None, None, False)
    case.batch.block_table[2] = case.batch.block_table[2].flip(0)
    for attention in (paged_attention, native):
        result = attention(case.query, case.key, case.value, case.batch, Scores(0.25))
        assert (result.double() - expected)[2].abs().max() > 0.01


def test_scores_far_apart_do_not_overflow(native: Any) -> None:
    case = Case(6, 2, 16, 16, torch.float32)
    case.query *= 100
    result = native(case.query, case.key, case.value, case.batch, Scores(1.0))
    expected = case.written_out(1.0, None, None, False)
    assert torch.isfinite(result).all()
    assert (result.double() - expected).abs().max() < 1e-3

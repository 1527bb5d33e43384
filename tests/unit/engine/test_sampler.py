"""Sampling: the right distribution, the same candidates as transformers, and noise that depends on its key alone."""

from typing import Any

import pytest
import torch
from oracle import sample
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rrm_engine.engine import sampler
from rrm_engine.engine.sampler import SamplingParams, choose, keyed_gumbel, noise_key
from rrm_engine.engine.sequence import Sequence
from rrm_engine.kv.pool import BlockPool
from rrm_engine.kv.table import BlockTable

VOCABULARY = 50


def sequence(name: str, params: SamplingParams, length: int = 5, seed: int = 0) -> Sequence:
    table = BlockTable(BlockPool(1, 1))
    return Sequence(name, [0] * length, table, params, noise_key(seed, name), budget=1)


def logits(rows: int, spread: float = 2.0, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


def test_frequencies_are_those_of_the_softmax() -> None:
    """Chi-square over 20,000 draws at different positions; the bound is the 99.99 % quantile for 49 degrees."""
    draws, row = 20_000, logits(1, spread=1.0)
    probs = (row / 0.8).double().softmax(-1)[0]
    sequences = [sequence("a", SamplingParams(0.8), length=i) for i in range(draws)]
    counts = torch.bincount(torch.tensor(sample(row.expand(draws, -1).clone(), sequences)), minlength=VOCABULARY)
    statistic = float(((counts - draws * probs) ** 2 / (draws * probs)).sum())
    assert statistic < 93


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(0.7, top_k=5),
        SamplingParams(1.3, top_p=0.8),
        SamplingParams(1.0, min_p=0.1),
        SamplingParams(0.6, top_k=20, top_p=0.95),
        SamplingParams(0.9, top_k=12, top_p=0.7, min_p=0.05),
    ],
)
def test_candidates_are_those_of_transformers(params: SamplingParams) -> None:
    """Over many draws exactly the tokens that transformers' warpers leave come up, about as often as they should."""
    draws, row = 6_000, logits(1)
    warped = TemperatureLogitsWarper(params.temperature)(None, row.clone())
    if params.top_k:
        warped = TopKLogitsWarper(params.top_k)(None, warped)
    if params.top_p < 1:
        warped = TopPLogitsWarper(params.top_p)(None, warped)
    if params.min_p:
        warped = MinPLogitsWarper(params.min_p)(None, warped)
    probs = warped.softmax(-1)[0]
    sequences = [sequence("a", params, length=i) for i in range(draws)]
    counts = torch.bincount(torch.tensor(sample(row.expand(draws, -1).clone(), sequences)), minlength=VOCABULARY)
    assert counts[probs == 0].sum() == 0
    assert (counts / draws - probs).abs().max() < 0.03


@pytest.mark.parametrize("params", [SamplingParams(0.9, top_p=0.95), SamplingParams(0.9, top_p=0.999, min_p=1e-6)])
def test_top_p_from_the_likeliest_tokens_is_top_p_of_all(
    params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of every kind in one step: peaked ones, flat ones, whose likeliest tokens are not enough, one with few."""
    rows, sorted_whole = torch.randn(40, 9000, generator=torch.Generator().manual_seed(3)), []
    rows[:20] *= torch.linspace(1, 30, 20)[:, None]
    rows[-1, 3:] = float("-inf")
    keys, positions = [5] * 40, list(range(40))

    def noting(x: torch.Tensor, *given: Any, **named: Any) -> Any:
        sorted_whole.append(len(x))
        return torch.sort(x, *given, **named)

    monkeypatch.setattr(torch.Tensor, "sort", noting)
    fast = choose(rows, params, keys, positions)
    assert 5 < len(sorted_whole) < 35 and set(sorted_whole) == {1}
    monkeypatch.setattr(sampler, "LIKELIEST", 9000)
    assert torch.equal(fast, choose(rows, params, keys, positions))
    assert sorted_whole[-1] == 40
    for row in range(40):  # and none depends on its neighbours
        monkeypatch.setattr(sampler, "LIKELIEST", 1024)
        assert choose(rows[row : row + 1], params, [5], [row]).tolist() == fast[row : row + 1].tolist()


def test_noise_depends_on_key_position_and_token() -> None:
    ids = torch.arange(1000)[None]

    def noise(name: str, position: int, seed: int = 0) -> torch.Tensor:
        return keyed_gumbel(torch.tensor([noise_key(seed, name)]), torch.tensor([position]), ids)

    base = noise("a", 1)
    assert torch.equal(base, noise("a", 1))
    assert len(base.unique()) == 1000
    for other in (noise("b", 1), noise("a", 2), noise("a", 1, seed=1)):
        assert abs(float(torch.corrcoef(torch.cat([base, other]))[0, 1])) < 0.12
    shuffled = keyed_gumbel(torch.tensor([noise_key(0, "a")]), torch.tensor([1]), ids.flip(1))
    assert torch.equal(shuffled.flip(1), base)


def test_greedy_takes_the_first_of_the_best() -> None:
    rows = logits(3)
    rows[1, 7] = rows[1, 9] = 99.0
    assert sample(rows.clone(), [sequence(f"g{i}", SamplingParams()) for i in range(3)]) == rows.argmax(-1).tolist()


def test_a_grammar_masks_everything_else() -> None:
    class OnlySevenAndForty:
        cut = False

        def mask(self) -> Any:
            import numpy as np

            bits = np.zeros(2, dtype=np.int32)
            bits[0] = 1 << 7
            bits[1] = 1 << (40 - 32)
            return bits

        def accept(self, token: int) -> None: ...

        def forced(self) -> list[int]:
            return []

        def copy(self) -> Any:
            return self

    drawn = set()
    for position in range(60):
        one = sequence("m", SamplingParams(2.0), length=position)
        one.matcher = OnlySevenAndForty()
        drawn.add(sample(torch.zeros(1, VOCABULARY), [one])[0])
    assert drawn == {7, 40}

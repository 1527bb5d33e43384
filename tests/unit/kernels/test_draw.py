"""The search for tokens that can win: it leaves the winner that all the noise would give, and few others."""

from typing import Any

import pytest
import torch
from oracle import VARIANTS, compiled
from rrm_kernels.build import NativeUnavailable
from rrm_kernels.draw import ROOM, Leaders, load_leaders

from rrm_engine.engine import sampler
from rrm_engine.engine.sampler import SamplingParams, keyed_gumbel

KEYS, POSITIONS = torch.tensor([-5, -(2**63), 2**63 - 1, 7]), torch.tensor([0, 3, 10**6, 3])


@pytest.fixture(params=VARIANTS)
def leaders(request: pytest.FixtureRequest) -> Leaders:
    return compiled(lambda: load_leaders(request.param))


def scores(count: int, spread: float, seed: int) -> torch.Tensor:
    x = torch.randn(4, count, generator=torch.Generator().manual_seed(seed)) * spread
    x[1, ::3] = float("-inf")
    return x


@pytest.mark.parametrize(
    ("count", "spread"), [(1, 1.0), (63, 1.0), (1000, 0.0), (1000, 0.1), (5000, 3.0), (5000, 40.0)]
)
@pytest.mark.parametrize("permuted", [False, True])
def test_the_winner_is_among_them(leaders: Leaders, count: int, spread: float, permuted: bool) -> None:
    others = 0
    for seed in range(20):
        x = scores(count, spread, seed)
        if count == 1:
            x[1] = 0.0
        ids = torch.arange(count).flip(0).expand(4, -1).contiguous() if permuted else None
        every = torch.arange(count).expand(4, -1) if ids is None else ids
        sums = x.double() + keyed_gumbel(KEYS, POSITIONS, every)
        places = leaders(x, ids, KEYS, POSITIONS)
        assert places is not None and places.shape == (4, ROOM)
        assert (places == sums.argmax(-1, keepdim=True)).any(-1).all()
        others += int((places != sums.argmax(-1, keepdim=True)).sum())
    assert others == 0  # no two sums were as close as the search is exact


def test_rows_that_leave_no_choice_are_given_back(leaders: Leaders) -> None:
    x = scores(2000, 1.0, 0)
    assert leaders(x, None, KEYS, POSITIONS) is not None
    x[2] = float("-inf")
    assert leaders(x, None, KEYS, POSITIONS) is None
    x[2] = float("nan")
    assert leaders(x, None, KEYS, POSITIONS) is None


@pytest.mark.parametrize(
    "params", [SamplingParams(0.7), SamplingParams(1.2, min_p=0.01), SamplingParams(0.9, top_p=0.9)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_tokens_with_and_without_it(
    params: SamplingParams, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(load_leaders)
    logits = scores(3000, 4.0, 1).to(dtype)
    searched: list[torch.Tensor | None] = []

    def noting(*given: Any) -> torch.Tensor | None:
        searched.append(load_leaders()(*given))
        return searched[-1]

    def missing() -> Any:
        raise NativeUnavailable("no compiler")

    monkeypatch.setattr(sampler, "load_leaders", lambda: noting)
    drawn = sampler.choose(logits.clone(), params, KEYS.tolist(), POSITIONS.tolist())
    assert len(searched) == 1 and searched[0] is not None
    monkeypatch.setattr(sampler, "load_leaders", missing)
    assert torch.equal(drawn, sampler.choose(logits, params, KEYS.tolist(), POSITIONS.tolist()))

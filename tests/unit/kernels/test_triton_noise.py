"""Keyed sampling in Triton against the engine's sampler."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import sample

from rrm_engine.engine import sampler

pytest.importorskip("triton", reason="triton is not installed: pip install triton (Linux)")
from rrm_kernels.noise import keyed_gumbel, sample_keyed
from rrm_kernels.tile import INTERPRETED

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
KEYS = torch.tensor([sampler.noise_key(0, "a"), sampler.noise_key(1, "root.b"), 0, -1], device=DEVICE)
POSITIONS = torch.tensor([0, 17, 40_000, 3], device=DEVICE)


def test_the_noise_is_the_samplers() -> None:
    ids = torch.stack([torch.arange(1500), torch.arange(1500) * 97, torch.arange(1500).flip(0), torch.arange(1500)])
    ids = ids.to(DEVICE)
    noise, expected = keyed_gumbel(KEYS, POSITIONS, ids), sampler.keyed_gumbel(KEYS, POSITIONS, ids)
    # The 53 random bits are the same; the two logarithms may differ in the last place. One bit of them is 4e-4 apart.
    assert torch.allclose(noise, expected, rtol=1e-14, atol=1e-15)
    for keys, positions, tokens in ((KEYS + 1, POSITIONS, ids), (KEYS, POSITIONS + 1, ids), (KEYS, POSITIONS, ids + 1)):
        wrong = keyed_gumbel(keys, positions, tokens)  # negative control
        assert ((wrong - expected).abs() > 1e-6).double().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_are_the_samplers(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(4, 2100, generator=torch.Generator().manual_seed(1))).to(DEVICE, dtype)
    logits[:, 500:900] = float("-inf")
    temperatures = [0.7, 1.0, 2.5, 0.0]
    sequences: list[Any] = [
        SimpleNamespace(sampling=sampler.SamplingParams(t), noise_key=int(k), tokens=[0] * int(p), matcher=None)
        for t, k, p in zip(temperatures, KEYS, POSITIONS, strict=True)
    ]
    chosen = []
    for shift in range(5):  # other noise each time
        logits = logits.roll(1, 0)
        expected = sample(logits.clone(), sequences)
        result = sample_keyed(logits, torch.tensor(temperatures, device=DEVICE), KEYS, POSITIONS)
        assert result.tolist() == expected, shift
        chosen.append(expected)
    assert len({row[2] for row in chosen}) > 1  # negative control: it is not the same token whatever the noise
    other = sample_keyed(logits, torch.tensor(temperatures, device=DEVICE), KEYS + 1, POSITIONS).tolist()
    assert other[:3] != chosen[-1][:3]
    assert other[3] == chosen[-1][3] == int(logits[3].argmax())

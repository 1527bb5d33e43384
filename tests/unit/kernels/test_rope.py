"""Re-rotating cached keys equals rotating the raw keys at their new positions as transformers does."""

from importlib import import_module
from typing import Any

import pytest
import torch
from oracle import plain_model
from rrm_kernels.rope import rerotate

SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "qwen3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},  # scales cos and sin
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 128,
        }
    },
}
HEADS = 3


class Rotary:
    """The rotary embedding of a tiny model, and its family's own way of applying it."""

    def __init__(self, name: str) -> None:
        family = "llama" if name in ("yarn", "llama3") else name
        model = plain_model(family, hidden_size=128, **SHAPES[name])
        self.module = next(m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
        self.apply = import_module(type(model).__module__).apply_rotary_pos_emb
        self.width = 128 // 4 if family != "qwen3" else 16

    @property
    def inv_freq(self) -> torch.Tensor:
        return self.module.inv_freq

    def __call__(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self.module(keys.float(), positions[None])
        rotated = self.apply(keys.transpose(0, 1)[None], keys.transpose(0, 1)[None], cos, sin)[1]
        return rotated[0].transpose(0, 1)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_moved_keys_equal_keys_rotated_at_the_new_positions(name: str) -> None:
    rotary = Rotary(name)
    generator = torch.Generator().manual_seed(3)
    raw = torch.randn(40, HEADS, rotary.width, generator=generator)
    old = torch.randint(0, 900, (40,), generator=generator)
    new = torch.randint(0, 900, (40,), generator=generator)  # earlier as often as later
    moved = rerotate(rotary(raw, old), new - old, rotary.inv_freq)
    expected = rotary(raw, new)
    assert 2 * len(rotary.inv_freq) == {"gpt_neox": 8, "phi3": 16}.get(name, rotary.width)
    # transformers rounds both angles to fp32: 900 positions are off by up to 3e-5 radians.
    assert (moved - expected).abs().max() < 2e-4
    for wrong in (new - old + 1, old - new, torch.zeros_like(old)):  # negative control
        assert (rerotate(rotary(raw, old), wrong, rotary.inv_freq) - expected).abs().max() > 0.1


def test_no_move_changes_nothing_and_moves_add_up() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(9, HEADS, 16, generator=generator)
    inv_freq = 1e4 ** -(torch.arange(8) / 8)
    delta = torch.randint(-30_000, 30_000, (9,), generator=generator)
    assert torch.equal(rerotate(keys, torch.zeros_like(delta), inv_freq), keys)
    there = rerotate(keys, delta, inv_freq)
    assert (there - keys).abs().max() > 0.1
    assert (rerotate(there, -delta, inv_freq) - keys).abs().max() < 1e-6


def test_bf16_keys_lose_one_rounding_only() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(9, HEADS, 24, generator=generator).bfloat16()
    inv_freq = 1e4 ** -(torch.arange(8) / 8)
    delta = torch.arange(9) * 1000
    moved = rerotate(keys, delta, inv_freq)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved, rerotate(keys.float(), delta, inv_freq).bfloat16())
    assert torch.equal(moved[..., 16:], keys[..., 16:])


def test_a_rotary_part_wider_than_the_keys_is_refused() -> None:
    with pytest.raises(ValueError, match="rotates 16 of the keys' 8"):
        rerotate(torch.zeros(1, 1, 8), torch.zeros(1, dtype=torch.int64), torch.ones(8))

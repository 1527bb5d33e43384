"""Moving rotated keys to other positions: the torch reference of RoPE re-rotation."""

import torch


def rerotate(keys: torch.Tensor, delta: torch.Tensor, inv_freq: torch.Tensor) -> torch.Tensor:
    """Keys as they would be ``delta`` positions later (earlier, if negative).

    ``keys`` ``[..., tokens, heads, width]``, of which the first ``2 * len(inv_freq)`` dimensions are rotated in
    half-split (NeoX) layout and the others are not; ``delta`` int ``[tokens]``; ``inv_freq`` float ``[rotary / 2]``,
    the model's own. Returns a new tensor of the same shape and dtype. Rotations add up, so the positions themselves are
    not needed, and a model's scaling of cos and sin, which the keys have already, is not applied again. Exact only
    where ``inv_freq`` does not depend on the length (not with longrope or dynamic scaling). Raises ValueError if the
    rotary part is wider than the keys.
    """
    half = inv_freq.shape[0]
    if 2 * half > keys.shape[-1]:
        raise ValueError(f"inv_freq rotates {2 * half} of the keys' {keys.shape[-1]} dimensions")
    # The angle in fp64: at 30,000 positions one unit in the last place of an fp32 angle is 0.002 radians.
    angle = (delta.double()[:, None] * inv_freq.double())[:, None]
    cos, sin = angle.cos().float(), angle.sin().float()
    first, second, rest = keys.float().split([half, half, keys.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(keys.dtype)

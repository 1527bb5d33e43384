"""How far rounding moves a value: measured, not looked up by dtype.

A layer's values are computed twice, from the same inputs and from inputs that were moved by a random half unit in the
last place (as in Monte Carlo arithmetic, Parker 1997). What lies between the two is what rounding does there: much
where a softmax is nearly tied or a channel is a thousand times larger than its neighbours, little elsewhere. Another
order of summation, or one rounding more or less, stays within about twice that.
"""

import torch


def jitter(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``values``, each moved by up to half the distance to its next neighbour and rounded again."""
    noise = torch.rand(values.shape, generator=generator, dtype=torch.float64) - 0.5
    return (values.double() * (1 + torch.finfo(values.dtype).eps * noise.to(values.device))).to(values.dtype)


def rounding_scale(exact: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
    """What rounding does to each of the values ``exact``, ``[tokens, features]``, if it made ``moved`` of them.

    ``moved`` are some copies of them. A few differences say little about a single value, so a token's and a feature's
    typical one are multiplied. At least a quarter of the value's own last place, for what no rounding happened to move.
    """
    exact = widened(exact)
    difference = _root_mean_square(widened(moved) - exact, 0)[0]
    of_tokens = _at_least(_root_mean_square(difference, 1))
    of_features = _at_least(_root_mean_square(difference / (of_tokens + TINY), 0))
    eps = torch.finfo(moved.dtype).eps
    own = torch.maximum(exact.abs() * eps / 4, _root_mean_square(exact, 1) * eps / 1000)
    return torch.maximum(of_tokens * of_features, own + TINY)


def deviation(found: torch.Tensor, exact: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """By token, how many times as far as rounding would ``found`` lies from ``exact``; NaN counts as infinitely far."""
    away = (widened(found) - widened(exact)) / scale
    return _root_mean_square(away, 1)[:, 0].nan_to_num(float("inf"))


def widened(values: torch.Tensor) -> torch.Tensor:
    """In a type in which differences of such values are exact enough."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


TINY = 1e-30


def _root_mean_square(values: torch.Tensor, dim: int) -> torch.Tensor:
    return values.square().mean(dim, keepdim=True).sqrt()


def _at_least(typical: torch.Tensor) -> torch.Tensor:
    """Raise what is exceptionally little: it is so by luck."""
    return typical.clamp(min=float(typical.median()) / 20)

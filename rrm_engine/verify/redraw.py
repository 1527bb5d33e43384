"""Drawing a recorded token again: the same grammar, filters and noise on other logits, and how near it was.

The filters are transformers' own logits warpers, not the engine's; only the definition of the noise is shared.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rrm_engine.engine.sampler import SamplingParams, keyed_gumbel
from rrm_engine.engine.sequence import Matcher

NEVER = -math.inf
BISECTIONS = 12
FARTHEST = 1e6  # logits


def apply_grammar(logits: torch.Tensor, tokens: Iterable[int], matcher: Matcher) -> bool:
    """Mask in place what the grammar does not allow in front of each of ``tokens``; row i is the i-th one's.

    False if a token is not allowed itself: nothing can be masked behind it.
    """
    for row, token in zip(logits, tokens, strict=True):
        bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")[: len(row)].astype(bool)
        allowed = torch.from_numpy(bits).to(row.device)
        row[: len(allowed)].masked_fill_(~allowed, NEVER)
        row[len(allowed) :] = NEVER
        try:
            matcher.accept(token)
        except ValueError:
            return False
    return True


@dataclass(frozen=True, slots=True)
class Draw:
    """One draw from ``logits`` fp32 ``[vocabulary]`` with the noise of ``key`` at ``position``."""

    logits: torch.Tensor
    position: int
    params: SamplingParams
    key: int

    def explains(self, token: int, error: float) -> bool:
        """Whether ``token`` could come out if every logit may be off by ``error``.

        What the filters might drop then cannot stand in the way of another token, and what they might keep can
        come out.
        """
        if self.params.temperature == 0:
            return float(self.logits.max() - self.logits[token]) <= 2 * error
        slack = 2 * error / self.params.temperature
        scores = self.logits.double() / self.params.temperature
        possible, certain = _filtered(scores, self.params, slack)
        drawn = scores + self._noise()
        ahead = drawn.masked_fill(~certain, NEVER).max() - drawn[token]
        return bool(possible[token]) and float(ahead) <= slack

    def gap(self, token: int) -> float:
        """How far ``token`` is behind what comes out, in logits: twice the least error that explains it.

        Infinite where none does, for the grammar rules the token out.
        """
        if self.params.temperature == 0:
            return float(self.logits.max() - self.logits[token])
        if not self.logits[token] > NEVER:
            return math.inf
        low, high = 0.0, 1e-6
        while not self.explains(token, high):
            low, high = high, 4 * high
            if high > FARTHEST:
                return math.inf
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if self.explains(token, middle) else (middle, high)
        return 2 * high

    def _noise(self) -> torch.Tensor:
        device = self.logits.device
        key, position = torch.tensor([self.key], device=device), torch.tensor([self.position], device=device)
        return keyed_gumbel(key, position, torch.arange(len(self.logits), device=device)[None])[0]


def draw_all(draws: Sequence[Draw]) -> list[int]:
    """What comes out of draws that have their key and parameters in common."""
    logits, params = torch.stack([draw.logits for draw in draws]), draws[0].params
    if params.temperature == 0:
        return logits.argmax(-1).tolist()
    scores = logits
    for warper in _warpers(params):
        scores = warper(None, scores)
    scores, ids = scores.topk(max(1, int(scores.isfinite().sum(-1).max())))
    positions = torch.tensor([draw.position for draw in draws], device=ids.device)
    noise = keyed_gumbel(torch.full_like(positions, draws[0].key), positions, ids)
    return ids.gather(-1, (scores.double() + noise).argmax(-1, keepdim=True))[:, 0].tolist()


def _warpers(params: SamplingParams) -> list[Any]:
    """In the order in which ``generate`` applies them."""
    found: list[Any] = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k > 0:
        found.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        found.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        found.append(MinPLogitsWarper(params.min_p))
    return found


def _filtered(scores: torch.Tensor, params: SamplingParams, slack: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens the filters may keep, and which they are sure to keep, if two scores may be off by ``slack``."""
    order, ids = scores.sort(descending=True)
    possible, certain = order > NEVER, order > NEVER
    if 0 < params.top_k < len(order):
        possible &= order >= order[params.top_k - 1] - slack
        certain &= order > order[params.top_k] + slack
    if params.top_p < 1:
        weights = (order - order[0]).exp()
        least = _up_to(weights * certain, order, order + slack, inclusive=False) / (weights * possible).sum()
        most = _up_to(weights * possible, order, order - slack, inclusive=True) - weights * possible
        possible &= least * math.exp(-slack) < params.top_p
        certain &= most * math.exp(min(slack, 700.0)) < params.top_p * (weights * certain).sum()
    if params.min_p > 0:
        floor = order[0] + math.log(params.min_p)
        possible &= order >= floor - slack
        certain &= order > floor + slack
    back = ids.argsort()
    return possible[back], certain[back]


def _up_to(weights: torch.Tensor, order: torch.Tensor, limits: torch.Tensor, *, inclusive: bool) -> torch.Tensor:
    """For each limit the weight of all that lie above it (or, if ``inclusive``, at it) in the descending ``order``."""
    sums = torch.cat([weights.new_zeros(1), weights.cumsum(0)])
    return sums[torch.searchsorted(-order, -limits, right=inclusive)]

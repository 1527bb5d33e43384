"""Drawing a recorded token again: the same settings, grammar and noise on other logits, and how near it was.

Every setting is carried out by transformers' own logits processors, called as ``generate`` calls them: one sequence at
a time, with all its tokens. Only the definition of the noise is shared with the engine.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rrm_engine.engine.rules import Rules, make_rules
from rrm_engine.engine.sampler import SamplingParams, keyed_gumbel
from rrm_engine.engine.sequence import Matcher

NEVER = -math.inf
BISECTIONS = 12
FARTHEST = 1e6  # logits


def apply_grammar(logits: torch.Tensor, tokens: Iterable[int], matcher: Matcher) -> bool:
    """Mask in place what the grammar does not allow in front of each of ``tokens``; row i is the i-th one's.

    False if a token is not allowed itself: nothing can be masked after it.
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
class Settings:
    """How a phase's tokens are drawn: ``rules`` are the processors that transformers makes of ``params``, and
    ``tokens`` int64 ``[1, n]`` the node's whole transcript.
    """

    params: SamplingParams
    rules: Rules
    tokens: torch.Tensor

    @property
    def gain(self) -> float:
        """By how much penalties may enlarge an error of a logit."""
        settings = self.params.settings()
        penalties = [settings.get(name, 1.0) for name in ("repetition_penalty", "encoder_repetition_penalty")]
        return math.prod(max(penalty, 1 / penalty) for penalty in penalties)

    def before_grammar(self, logits: torch.Tensor, positions: Iterable[int]) -> torch.Tensor:
        """Scores of logits fp32 ``[rows, vocabulary]`` for the tokens at ``positions``."""
        return self._through(self.rules.before, logits, positions) if self.rules.before else logits

    def warped(self, scores: torch.Tensor, positions: Iterable[int]) -> torch.Tensor:
        """Scores after all that is applied after a grammar: temperature, filters, watermarks."""
        return self._through(self.rules.after, scores, positions) if self.rules.after else scores

    def _through(self, chain: Sequence[Any], scores: torch.Tensor, positions: Iterable[int]) -> torch.Tensor:
        rows = []
        for row, position in zip(scores[:, None], positions, strict=True):
            for processor in chain:
                row = processor(self.tokens[:, :position], row)
            rows.append(row)
        return torch.cat(rows)


def settings_of(
    params: SamplingParams,
    vocabulary: int,
    tokens: torch.Tensor | None = None,
    first: int = 1,
    longest: int = 2,
    eos_ids: Collection[int] = (),
) -> Settings:
    """Of the phase whose first token is at ``first`` of ``tokens`` int64 ``[1, n]``; see ``make_rules``."""
    tokens = torch.zeros(1, 1, dtype=torch.int64) if tokens is None else tokens
    prompt = tokens[:, :first]
    rules = make_rules(params.settings(), eos_ids=eos_ids, prompt=prompt, longest=longest, vocabulary=vocabulary)
    return Settings(params, rules, tokens)


def reconciled(scores: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """``scores`` without what is -inf in ``masked``, where a grammar has been; where nothing is left of a row, that of
    ``masked``.
    """
    left = scores.masked_fill(masked == NEVER, NEVER)
    nothing = left.amax(-1, keepdim=True) <= torch.finfo(left.dtype).min
    return torch.where(nothing, masked, left)


@dataclass(frozen=True, slots=True)
class Draw:
    """One draw from ``logits`` fp32 ``[vocabulary]``, grammar applied, with the noise of ``key`` at ``position``."""

    logits: torch.Tensor
    position: int
    settings: Settings
    key: int

    @property
    def params(self) -> SamplingParams:
        return self.settings.params

    @property
    def scores(self) -> torch.Tensor:
        """What is compared, noise aside, fp32 ``[vocabulary]``; what cannot come out is -inf."""
        return self.settings.warped(self.logits[None], [self.position])[0]

    def explains(self, token: int, error: float) -> bool:
        """Whether ``token`` could come out if every logit may be off by ``error``.

        What the filters might drop then cannot stand in the way of another token, and what they might keep can
        come out.
        """
        if self.params.temperature == 0:
            return self.gap(token) <= 2 * error
        slack = 2 * error / self.params.temperature
        if self.settings.rules.only_filters:
            scores = self.logits.double() / self.params.temperature
            possible, certain = _filtered(scores, self.params, slack)
        else:  # what is at the edge of one of the rarer filters counts as it is
            scores = self.scores.double()
            possible = certain = scores > NEVER
        drawn = scores + self._noise()
        ahead = drawn.masked_fill(~certain, NEVER).max() - drawn[token]
        return bool(possible[token]) and float(ahead) <= slack

    def gap(self, token: int) -> float:
        """How far ``token`` is below what comes out, in logits: twice the least error that explains it.

        Infinite where none does, for the grammar rules the token out.
        """
        if self.params.temperature == 0:
            scores = self.scores
            return float(scores.max() - scores[token])
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
    """What comes out of draws that have their key and settings in common."""
    settings, at = draws[0].settings, [draw.position for draw in draws]
    scores = settings.warped(torch.stack([draw.logits for draw in draws]), at)
    if settings.params.temperature == 0:
        return scores.argmax(-1).tolist()
    scores, ids = scores.topk(max(1, int(scores.isfinite().sum(-1).max())))
    positions = torch.tensor(at, device=ids.device)
    noise = keyed_gumbel(torch.full_like(positions, draws[0].key), positions, ids)
    return ids.gather(-1, (scores.double() + noise).argmax(-1, keepdim=True))[:, 0].tolist()


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

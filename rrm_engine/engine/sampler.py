"""Sampling settings, and sampling tokens from logits.

Sampling is keyed: a token's noise is a function of the run's seed, its sequence's key, its position and its id, so it
does not depend on what else is in the batch.
"""

import hashlib
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import Any

import torch
from rrm_kernels.build import NativeUnavailable
from rrm_kernels.draw import load_leaders

from rrm_engine.device.transfer import integers

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)
MANY_TOKENS = 1024  # with fewer, adding noise to all is faster than finding the few that can win
LIKELIEST = 1024  # tokens that top-p sorts first on CPU, in a tenth of the time that a whole vocabulary takes


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. Applied in transformers' order.

    ``further`` are other settings of transformers' GenerationConfig, in (name, value) pairs with tuples for lists.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    further: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "SamplingParams":
        """From one mapping of settings, as JSON holds them."""
        own = {name: settings[name] for name in ("temperature", "top_k", "top_p", "min_p") if name in settings}
        further = sorted((name, _frozen(value)) for name, value in settings.items() if name not in own)
        return cls(**own, further=tuple(further))

    def settings(self) -> dict[str, Any]:
        """The mapping that ``of`` makes these from."""
        own = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p, "min_p": self.min_p}
        return own | {name: _thawed(value) for name, value in self.further}

    def without(self, *names: str) -> "SamplingParams":
        """These, without the ``further`` settings named."""
        return replace(self, further=tuple((name, value) for name, value in self.further if name not in names))


def _frozen(value: Any) -> Any:
    """A JSON value in a hashable form."""
    if isinstance(value, Mapping):
        return _Table((name, _frozen(item)) for name, item in value.items())
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _thawed(value: Any) -> Any:
    if isinstance(value, _Table):
        return {name: _thawed(item) for name, item in value}
    return list(map(_thawed, value)) if isinstance(value, tuple) else value


class _Table(tuple[tuple[str, Any], ...]):
    """A mapping's items."""


def noise_key(seed: int, name: str) -> int:
    """The signed 64-bit key of all noise of the sequence ``name`` in a run with ``seed``."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def keyed_gumbel(keys: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Gumbel noise, a pure function of (key, position, token id); int64 ``[rows]``, ``[rows]``, ``[rows, n]``.

    Counter-based: two rounds of the splitmix64 finaliser (Steele, Lea, Flood 2014). Returns float64 ``[rows, n]``.
    """
    state = _mix(keys + positions * _GOLDEN)[:, None]
    bits = _mix(state + (token_ids + 1) * _GOLDEN)
    uniform = (((bits >> 11) & ((1 << 53) - 1)).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _argmax(x: torch.Tensor) -> torch.Tensor:
    return x.max(-1).indices  # several times faster than argmax on CPU in bf16, same result


def choose(logits: torch.Tensor, params: SamplingParams, keys: Seq[int], positions: Seq[int]) -> torch.Tensor:
    """One token for each row of ``logits`` ``[rows, vocabulary]``, int64 ``[rows]``: the likeliest one at temperature
    0, else the one with the largest filtered score plus noise. ``keys`` and ``positions`` place each row's noise.
    """
    if params.temperature == 0:
        return _argmax(logits)
    scores = logits.float() / params.temperature
    vocabulary = scores.shape[-1]
    if params.top_p < 1 and not 0 < params.top_k < vocabulary:
        first = LIKELIEST if scores.device.type == "cpu" and vocabulary > 4 * LIKELIEST else vocabulary
        return _choose_in_order(scores, params, keys, positions, first)
    ids = None
    if 0 < params.top_k < vocabulary:
        scores, ids = scores.topk(params.top_k)
    if params.top_p < 1 or params.min_p > 0:
        scores = _without_unlikely(scores, scores.softmax(-1), params)
    return _likeliest(scores, ids, keys, positions)


def _choose_in_order(
    scores: torch.Tensor, params: SamplingParams, keys: Seq[int], positions: Seq[int], first: int
) -> torch.Tensor:
    """Top-p over a whole vocabulary. The ``first`` likeliest tokens are sorted; a row whose top-p set is larger is then
    sorted whole, which does not depend on other rows.
    """
    total = scores.logsumexp(-1, keepdim=True)
    best, ids = scores.topk(first) if first < scores.shape[-1] else scores.sort(descending=True)
    probs = (best - total).exp()
    chosen = _likeliest(_without_unlikely(best, probs, params), ids, keys, positions)
    if first < scores.shape[-1]:
        for row in (probs.cumsum(-1)[:, -1] < params.top_p).nonzero()[:, 0].tolist():
            one = slice(row, row + 1)
            chosen[one] = _choose_in_order(scores[one], params, keys[one], positions[one], scores.shape[-1])
    return chosen


def _without_unlikely(scores: torch.Tensor, probs: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """``scores`` with -inf where min-p or top-p leaves a token out. For top-p they must be in descending order."""
    drop = probs < params.min_p * probs.amax(-1, keepdim=True)
    if params.top_p < 1:
        drop |= probs.cumsum(-1) - probs >= params.top_p
    return scores.masked_fill(drop, float("-inf"))


def choose_warped(scores: torch.Tensor, params: SamplingParams, keys: Seq[int], positions: Seq[int]) -> torch.Tensor:
    """One token for each row of scores to which temperature and filters have been applied."""
    return _argmax(scores) if params.temperature == 0 else _likeliest(scores, None, keys, positions)


def _likeliest(scores: torch.Tensor, ids: torch.Tensor | None, keys: Seq[int], positions: Seq[int]) -> torch.Tensor:
    """The token with the largest score plus noise in each row: int64 ``[rows]``. ``scores`` and the tokens' ``ids``
    (None: 0, 1, 2 ...) are ``[rows, n]``.

    On CPU, noise for a whole vocabulary takes longer than all else here, so only tokens that can win get it.
    """
    places = integers(keys, scores.device), integers(positions, scores.device)
    if scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.shape[-1] >= MANY_TOKENS:
        scores = scores.contiguous()
        leaders = _leaders(scores, ids if ids is None else ids.contiguous(), *places)
        if leaders is not None:
            scores, ids = scores.gather(-1, leaders), leaders if ids is None else ids.gather(-1, leaders)
    if ids is None:
        ids = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    best = (scores.double() + keyed_gumbel(*places, ids)).argmax(-1, keepdim=True)
    return ids.gather(-1, best)[:, 0]


def _leaders(scores: torch.Tensor, ids: torch.Tensor | None, *places: torch.Tensor) -> torch.Tensor | None:
    """See ``load_leaders``; also None where there is no compiler."""
    try:
        find = load_leaders()
    except NativeUnavailable:
        return None
    return find(scores, ids, *places)

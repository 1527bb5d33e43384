"""From logits to tokens. Sampling is keyed: the noise of a token depends on nothing but its own place in the run."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from rrm_engine.kv.transfer import integers, to_device

if TYPE_CHECKING:
    from rrm_engine.engine.sequence import Matcher, Sequence

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. Applied in transformers' order."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


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


@torch.inference_mode()
def draw(logits: torch.Tensor, sequences: Seq["Sequence"], positions: Seq[int]) -> torch.Tensor:
    """One token for each row of ``logits`` ``[rows, vocabulary]``: int64 ``[rows]`` there; waits for no device.

    Row i is that of the token at ``positions[i]`` of ``sequences[i]``, whose grammar has been told all before it.
    """
    _apply_grammars(logits, [sequence.matcher for sequence in sequences])
    by_params: dict[SamplingParams, list[int]] = defaultdict(list)
    for row, sequence in enumerate(sequences):
        by_params[sequence.sampling].append(row)
    keys = [s.noise_key for s in sequences]
    if len(by_params) == 1:
        return _draw_group(logits, sequences[0].sampling, keys, positions)
    out = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
    for params, rows in by_params.items():
        index = integers(rows, logits.device)
        places = [keys[row] for row in rows], [positions[row] for row in rows]
        out.index_copy_(0, index, _draw_group(logits.index_select(0, index), params, *places))
    return out


def _argmax(x: torch.Tensor) -> torch.Tensor:
    return x.max(-1).indices  # several times faster than argmax on CPU in bf16, same result


def _draw_group(logits: torch.Tensor, params: SamplingParams, keys: Seq[int], positions: Seq[int]) -> torch.Tensor:
    if params.temperature == 0:
        return _argmax(logits)
    scores = logits.float() / params.temperature
    if 0 < params.top_k < scores.shape[-1]:
        scores, ids = scores.topk(params.top_k)
    elif params.top_p < 1:
        scores, ids = scores.sort(descending=True)
    else:
        ids = torch.arange(scores.shape[-1], device=scores.device).expand_as(scores)
    if params.top_p < 1 or params.min_p > 0:
        probs = scores.softmax(-1)
        drop = probs < params.min_p * probs.amax(-1, keepdim=True)
        if params.top_p < 1:
            drop |= probs.cumsum(-1) - probs >= params.top_p
        scores = scores.masked_fill(drop, float("-inf"))
    noise = keyed_gumbel(integers(keys, ids.device), integers(positions, ids.device), ids)
    best = (scores.double() + noise).argmax(-1, keepdim=True)
    return ids.gather(-1, best)[:, 0]


def _apply_grammars(logits: torch.Tensor, matchers: Seq["Matcher | None"]) -> None:
    """Forbid in each row what its grammar does; all masks go to the device in one transfer."""
    rows = [row for row, matcher in enumerate(matchers) if matcher is not None]
    if not rows:
        return
    vocabulary = logits.shape[-1]
    masks = np.stack([matcher.mask() for matcher in matchers if matcher is not None])
    bits = np.unpackbits(masks.view(np.uint8), axis=1, count=vocabulary, bitorder="little")
    forbidden = to_device(torch.from_numpy(bits == 0), logits.device)
    if len(rows) == len(matchers):
        logits.masked_fill_(forbidden, float("-inf"))
    else:
        index = integers(rows, logits.device)
        logits.index_copy_(0, index, logits.index_select(0, index).masked_fill(forbidden, float("-inf")))

"""Keyed sampling in Triton: a token's noise is a pure function of (key, position, token id), made where it is used.

Counter-based: two rounds of the splitmix64 finaliser (Steele, Lea, Flood 2014), as in ``rrm_engine.engine.sampler``.
"""

import torch
import triton
import triton.language as tl

CHUNK = 1024

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9 - (1 << 64))
MIX_2 = tl.constexpr(0x94D049BB133111EB - (1 << 64))


def keyed_gumbel(keys: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Gumbel noise, float64 ``[rows, n]``; int64 ``[rows]``, ``[rows]``, ``[rows, n]``, contiguous."""
    rows, n = token_ids.shape
    out = torch.empty(rows, n, dtype=torch.float64, device=token_ids.device)
    _noise_kernel[(rows, triton.cdiv(n, CHUNK))](
        out=out, keys=keys, positions=positions, token_ids=token_ids, n=n, CHUNK=CHUNK
    )
    return out


def sample_keyed(
    logits: torch.Tensor, temperatures: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """One token id a row, int64 ``[rows]``: the largest ``logits / temperature + noise``, or logit where that is 0.

    ``logits`` ``[rows, vocabulary]`` contiguous (-inf: never), ``temperatures`` fp32, ``keys`` and ``positions`` int64
    ``[rows]``. Neither noise nor scaled logits are ever written to memory.
    """
    rows, n = logits.shape
    chunks = triton.cdiv(n, CHUNK)
    best = torch.empty(rows, chunks, dtype=torch.float64, device=logits.device)
    ids = torch.empty(rows, chunks, dtype=torch.int64, device=logits.device)
    _sample_kernel[(rows, chunks)](
        best=best,
        ids=ids,
        logits=logits,
        temperatures=temperatures,
        keys=keys,
        positions=positions,
        n=n,
        CHUNK=CHUNK,
    )
    return ids.gather(1, best.argmax(1, keepdim=True))[:, 0]


@triton.jit
def _mix(x):
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


@triton.jit
def _gumbel(key, position, token_id):
    state = _mix(key + position * GOLDEN)
    bits = _mix(state + (token_id + 1) * GOLDEN)
    uniform = (((bits >> 11) & ((1 << 53) - 1)).to(tl.float64) + 0.5) * 1.1102230246251565e-16  # 2^-53
    return -tl.log(-tl.log(uniform))


@triton.jit
def _noise_kernel(out, keys, positions, token_ids, n, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    token_id = tl.load(token_ids + row * n + at, mask=at < n, other=0)
    noise = _gumbel(tl.load(keys + row), tl.load(positions + row), token_id)
    tl.store(out + row * n + at, noise, mask=at < n)


@triton.jit
def _sample_kernel(best, ids, logits, temperatures, keys, positions, n, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    scores = tl.load(logits + row * n + at, mask=at < n, other=float("-inf")).to(tl.float32)
    noisy = scores.to(tl.float64)
    temperature = tl.load(temperatures + row)
    if temperature > 0:
        noise = _gumbel(tl.load(keys + row), tl.load(positions + row), at.to(tl.int64))
        noisy = tl.div_rn(scores, temperature).to(tl.float64) + noise
    place = row * tl.num_programs(1) + chunk
    tl.store(best + place, tl.max(noisy, 0))
    tl.store(ids + place, chunk * CHUNK + tl.argmax(noisy, 0).to(tl.int64))

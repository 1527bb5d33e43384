"""Shared-prefix attention: how many siblings on how long a prefix it takes to pay, and the cost model's constants."""

import numpy as np
import torch
from rrm_kernels.batch import PagedBatch, Scores
from rrm_kernels.buffers import batch_of
from rrm_kernels.sharing import SharingCost, find_shared_runs
from rrm_kernels.triton_attention import TritonUnavailable, load_triton

from gpu.lab import BLOCK_SIZE, Lab, Row, Skip

SIBLINGS, PREFIXES = (1, 2, 4, 8, 16, 32, 64), (512, 1024, 2048, 4096, 8192, 16384)
TAIL = 64  # tokens of each sibling's own
HEADS, KV_HEADS, WIDTH = 40, 8, 128  # Qwen3-14B's
ALWAYS = SharingCost(member=0, crossover=0)


def run(lab: Lab, rows: list[Row]) -> None:
    try:
        load_triton(lab.device)
    except TritonUnavailable as error:
        raise Skip(f"Triton's kernels cannot run: {error}") from error
    for prefix in (64,) if lab.tiny else PREFIXES:
        for siblings in (1, 2) if lab.tiny else SIBLINGS:
            rows.append(_point(lab, siblings, prefix))
    rows.append({"fit": fit(rows)})


def _point(lab: Lab, siblings: int, prefix: int) -> Row:
    """One layer's attention of siblings that decode one token each, with and without the shared run."""
    from rrm_kernels.ragged import ragged_attention

    heads, kv_heads, width = (4, 2, 16) if lab.tiny else (HEADS, KV_HEADS, WIDTH)
    dtype = torch.float32 if lab.tiny else torch.bfloat16
    shared, own = prefix // BLOCK_SIZE, TAIL // BLOCK_SIZE
    prefix_blocks = list(range(1, shared + 1))
    tables = [prefix_blocks + list(range(1 + shared + i * own, 1 + shared + (i + 1) * own)) for i in range(siblings)]
    shape = (1 + shared + siblings * own, BLOCK_SIZE, kv_heads, width)
    key, value = (torch.randn(shape, device=lab.device, dtype=dtype) for _ in range(2))
    query = torch.randn(siblings, heads, width, device=lab.device, dtype=dtype)
    contexts = [prefix + TAIL] * siblings
    plan = find_shared_runs(tables, [c - 1 for c in contexts], BLOCK_SIZE, ALWAYS)
    seconds, outs = [], []
    for runs in (None, plan):
        batch = batch_of([1] * siblings, contexts, tables, BLOCK_SIZE, lab.device, runs)

        def attend(batch: PagedBatch = batch) -> torch.Tensor:
            return ragged_attention(query, key, value, batch, Scores(width**-0.5))

        outs.append(attend())
        seconds.append(lab.kernel_seconds(attend))
    apart, together = (1e6 * s for s in seconds)
    return {
        "siblings": siblings,
        "prefix": prefix,
        "apart_us": apart,
        "together_us": together,
        "speedup": apart / together,
        "saved_tokens": (siblings - 1) * prefix,
        "difference": float((outs[0] - outs[1]).abs().max()),
    }


def fit(rows: list[Row]) -> Row:
    """saved us = a * (saved tokens - member * siblings - crossover), by least squares over the points that share.

    ``crossover`` counts a whole step's tokens, as ``SharingCost`` does. None where the points do not determine it.
    """
    points = [row for row in rows if row["siblings"] > 1]
    if len(points) < 4:
        return {"member": None, "crossover": None, "reason": "too few points"}
    matrix = np.array([[row["saved_tokens"], -row["siblings"], -1.0] for row in points])
    saved = np.array([row["apart_us"] - row["together_us"] for row in points])
    (per_token, per_member, fixed), *_ = np.linalg.lstsq(matrix, saved, rcond=None)
    if per_token <= 0:
        return {"member": None, "crossover": None, "reason": "sharing saved nothing"}
    rest = saved - matrix @ [per_token, per_member, fixed]
    return {
        "us_per_token": per_token,
        "member": per_member / per_token,
        "crossover": fixed / per_token,
        "residual_us": float(np.abs(rest).max()),
        "now": {"member": SharingCost().member, "crossover": SharingCost().crossover},
    }

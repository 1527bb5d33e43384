"""Sampling a step's tokens: logits processors, grammars, then each row by its own sampling settings."""

from collections import defaultdict
from collections.abc import Sequence as Seq

import numpy as np
import torch

from rrm_engine.device.transfer import integers, to_device
from rrm_engine.engine.processors import Processed
from rrm_engine.engine.sampler import SamplingParams, choose, choose_warped
from rrm_engine.engine.sequence import Matcher, Sequence


@torch.inference_mode()
def draw(
    logits: torch.Tensor,
    sequences: Seq[Sequence],
    positions: Seq[int],
    processed: Processed | None = None,
    matchers: Seq[Matcher | None] | None = None,
) -> torch.Tensor:
    """One token for each row of ``logits`` ``[rows, vocabulary]``: int64 ``[rows]`` on the same device, without
    waiting.

    Row i gives the token at ``positions[i]`` of ``sequences[i]``. ``matchers[i]`` is its grammar, told of all tokens
    before it; default: each sequence's own. ``processed`` are the rows with logits processors. Grammars write into
    ``logits``.
    """
    scores = processed.before_grammars(logits) if processed is not None else None
    _apply_grammars(logits, [s.matcher for s in sequences] if matchers is None else matchers)
    if processed is not None and scores is not None:
        if uncertain := processed.uncertain():
            rows = [processed.rows[index] for index in uncertain]
            left = _reconciled(_rows(logits, rows).float(), _rows(scores, uncertain))
            scores = _put(scores, uncertain, left)
        logits = _put(logits.float(), processed.rows, scores)
    by_params: dict[SamplingParams, list[int]] = defaultdict(list)
    for row, sequence in enumerate(sequences):
        by_params[sequence.sampling].append(row)
    keys = [s.noise_key for s in sequences]
    if len(by_params) == 1:
        return _draw_rows(logits, sequences[0].sampling, range(len(sequences)), keys, positions, processed)
    out = torch.empty(len(sequences), dtype=torch.int64, device=logits.device)
    for params, rows in by_params.items():
        index = integers(rows, logits.device)
        out.index_copy_(0, index, _draw_rows(logits.index_select(0, index), params, rows, keys, positions, processed))
    return out


def _draw_rows(
    logits: torch.Tensor,
    params: SamplingParams,
    rows: Seq[int],
    keys: Seq[int],
    positions: Seq[int],
    processed: Processed | None,
) -> torch.Tensor:
    """One token for each row of ``logits``: the ``rows`` of the step whose settings are ``params``."""
    places = [keys[row] for row in rows], [positions[row] for row in rows]
    warped = processed.warped(logits, rows) if processed is not None else None
    return choose(logits, params, *places) if warped is None else choose_warped(warped, params, *places)


def _reconciled(masked: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """``scores`` without the tokens that grammars have masked in ``masked``, row by row. A row with no token left is
    taken from ``masked`` instead: a grammar's demands override a checkpoint's logits processors.
    """
    scores = scores.masked_fill(masked == float("-inf"), float("-inf"))
    nothing = scores.amax(-1, keepdim=True) <= torch.finfo(torch.float32).min
    return torch.where(nothing, masked, scores)


def _rows(x: torch.Tensor, rows: Seq[int]) -> torch.Tensor:
    return x if len(rows) == len(x) else x.index_select(0, integers(rows, x.device))


def _put(x: torch.Tensor, rows: Seq[int], values: torch.Tensor) -> torch.Tensor:
    """``x`` with ``values`` in ``rows``."""
    return values if len(rows) == len(x) else x.index_copy(0, integers(rows, x.device), values)


def _apply_grammars(logits: torch.Tensor, matchers: Seq[Matcher | None]) -> None:
    """Mask in each row what its grammar forbids; all masks go to the device in one transfer."""
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

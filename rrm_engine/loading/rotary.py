"""How the keys of a model's layers can be moved to other positions, found by trying it."""

import torch
from rrm_kernels.rope import rerotate

from rrm_engine.engine.packing import pack
from rrm_engine.engine.scratch import Scratch, run_packed
from rrm_engine.kv.cache import KVCache
from rrm_engine.loading.prepare import LoadedModel, UnsupportedModel

TOKENS = 24
FARTHEST = 4096  # positions: far enough for frequencies that differ in slow dimensions only
# Of the keys' and values' norm. Measured on the families that work: up to 1e-4 in fp32, a few percent in bf16; keys
# that are moved in a wrong way are off by a third and more.
TOLERANCE = {torch.float32: 5e-3, torch.float64: 5e-3}
LOW_PRECISION_TOLERANCE = 0.15


@torch.inference_mode()
def find_rotary(loaded: LoadedModel) -> dict[int, torch.Tensor]:
    """By layer index the frequencies fp32 ``[rotary / 2]`` that move its keys; none for keys that are not rotated.

    The same tokens are run at the first positions and farther on. A layer's frequencies are those of the model's
    buffers with which its first keys become the others. Raises UnsupportedModel with one sentence if a layer's keys
    cannot be moved so: learned positions, interleaved layouts, keys that hold other parts.
    """
    distance = min(FARTHEST, loaded.max_position - TOKENS)
    near, far = (_keys_and_values(loaded, first) for first in (0, distance))
    buffers = [b.float() for name, b in loaded.model.named_buffers() if name.endswith("inv_freq")]
    tolerance = TOLERANCE.get(loaded.dtype, LOW_PRECISION_TOLERANCE)
    found = {}
    for index, (keys, values) in near.items():
        far_keys, far_values = far[index]
        candidates = [b.to(keys.device) for b in [torch.zeros(0), *buffers] if 2 * len(b) <= keys.shape[-1]]
        delta = torch.full((TOKENS,), distance, device=keys.device)
        errors = [_difference(rerotate(keys, delta, candidate), far_keys) for candidate in candidates]
        best = min(range(len(errors)), key=errors.__getitem__)
        if not max(errors[best], _difference(values, far_values)) <= tolerance:
            raise UnsupportedModel(
                f"{loaded.name}: KV of layer {index} cannot be moved to other positions, which --join splice and "
                f"transcript need; use --join text"
            )
        found[index] = candidates[best]
    return found


def _keys_and_values(loaded: LoadedModel, first: int) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """By layer the keys and values ``[tokens, kv heads, width]`` of some tokens from position ``first`` on."""
    known = min(loaded.vocabulary, 1000)
    tokens = torch.randint(known, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    multiple = loaded.attend.block_multiple
    block_size = -(-TOKENS // multiple) * multiple
    cache = KVCache(1, block_size, loaded.shapes)
    scratch = Scratch(cache)
    sequence = scratch.sequence(tokens)
    step = pack([scratch.next(sequence, TOKENS)], block_size, loaded.device)
    step.batch.longest += first
    step.positions += first
    run_packed(step, cache, loaded.forward, loaded.attend)
    block = sequence.table.blocks[0]
    pools = {index: cache.pools(index, shape) for index, shape in loaded.shapes.items()}
    return {index: (keys[block, :TOKENS], values[block, :TOKENS]) for index, (keys, values) in pools.items()}


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())

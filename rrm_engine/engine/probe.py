"""The check at load: does every layer call our attention, and does a packed, chunked run equal a plain one?"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from rrm_kernels.flash import FlashUnsupported
from rrm_kernels.reference import PagedAttention

from rrm_engine.engine.runner import ModelRunner
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.scheduler import SchedulerOutput, Work
from rrm_engine.engine.sequence import Sequence
from rrm_engine.kv.cache import KVCache, LayerShape
from rrm_engine.kv.pool import BlockPool
from rrm_engine.kv.table import BlockTable
from rrm_engine.models.attention import ATTENTION_NAME, Forward, block_multiple

# Difference of the logits, root mean square, relative to their standard deviation, by dtype. Families that work are
# within 1e-4 in fp32 and 0.08 in bf16; a scale off by 5 % gives 0.2, a wrong mask or position 0.6 and more.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
# The same of the largest difference over many positions and the whole vocabulary, where rounding alone goes further.
LARGEST = {torch.float32: 2e-3, torch.float64: 2e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
BLOCK_SIZE = 8
LENGTHS = (37, 21)  # tokens of the two probe sequences
CUTS = ((13, 36), (20,))  # where they are cut into chunks; the last piece of each is a decode of one token


@dataclass(slots=True)
class ProbeResult:
    """``reason`` is None if the model may be used; ``shapes`` are the layers' KV shapes by layer index."""

    reason: str | None
    error: float = 0.0
    shapes: dict[int, LayerShape] = field(default_factory=dict)
    forward: Forward | None = None


def refuse_known_mismatches(config: Any) -> str | None:
    """Why a model with this text config would be silently wrong, or None. What a short probe cannot see."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)]
    for kind in (r.get("rope_type", r.get("type")) for r in [rope, *nested]):
        if kind in ("longrope", "dynamic"):
            return (
                f"its {kind} rotary embedding depends on the longest sequence in the batch, "
                f"so a sequence's result would depend on its neighbours"
            )
    types = set(getattr(config, "layer_types", None) or ())
    if "chunked_attention" in types or getattr(config, "attention_chunk_size", None):
        return "its chunked attention is expressed only in a mask that transformers does not hand to attention"
    recurrent = sorted(t for t in types if t not in ("full_attention", "sliding_attention"))
    if recurrent:
        return f"its {', '.join(recurrent)} layers keep a state that is not a KV cache"
    return None


@torch.inference_mode()
def probe(
    model: Any, device: torch.device, optimise: Callable[[Any], Iterable[Forward]], attend: PagedAttention
) -> ProbeResult:
    """Run two sequences plainly, then the optimised model on them packed, in chunks and decodes; compare logits.

    ``optimise`` changes the model in place and yields ways to run it, the best first; the first that is right is
    taken. Leaves the model switched to our attention. The plain run uses transformers' eager attention.
    """
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(min(config.vocab_size, 1000), (n,), generator=generator).tolist() for n in LENGTHS]
    model.set_attn_implementation("eager")
    plain = [model(input_ids=torch.tensor([p], device=device), use_cache=False).logits[0, -1].float() for p in prompts]
    model.set_attn_implementation(ATTENTION_NAME)
    result = ProbeResult("there is no way to run it")
    for forward in optimise(model):
        result = _compare(forward, plain, prompts, config.num_hidden_layers, device, attend)
        if result.reason is None:
            break
    return result


def _compare(
    forward: Forward,
    plain: list[torch.Tensor],
    prompts: list[list[int]],
    num_layers: int,
    device: torch.device,
    attend: PagedAttention,
) -> ProbeResult:
    block_size = -(-BLOCK_SIZE // block_multiple(attend)) * block_multiple(attend)
    cache = KVCache(sum(-(-n // block_size) for n in LENGTHS), block_size)
    try:
        packed = _run_packed(ModelRunner(forward, cache, device, attend), prompts)
    except FlashUnsupported as e:
        return ProbeResult(f"--attention cannot be what it is: {e}; --attention triton and sdpa take any model")
    except TypeError as e:
        return ProbeResult(f"its forward pass does not hand our arguments to its attention ({e})")
    if missing := sorted(set(range(num_layers)) - cache.shapes.keys()):
        return ProbeResult(f"layers {missing} never called the attention function, so their state cannot be kept")
    error = max(float((a - b).square().mean().sqrt() / a.std()) for a, b in zip(plain, packed, strict=True))
    tolerance = TOLERANCE.get(next(iter(cache.shapes.values())).dtype, 0.15)
    if not error <= tolerance:
        return ProbeResult(
            f"a packed run differs from a plain one by {error:.2g} of the logits' spread (allowed: {tolerance})"
        )
    return ProbeResult(None, error, dict(cache.shapes), forward)


def _run_packed(runner: ModelRunner, prompts: list[list[int]]) -> list[torch.Tensor]:
    pool = BlockPool(runner.cache.num_blocks, runner.cache.block_size, prefix_cache=False)
    sequences = [
        Sequence(f"probe{i}", tokens, BlockTable(pool), SamplingParams(), 0, 1) for i, tokens in enumerate(prompts)
    ]
    last: dict[str, torch.Tensor] = {}
    for piece in range(max(len(cuts) for cuts in CUTS) + 1):
        work = []
        for sequence, cuts in zip(sequences, CUTS, strict=True):
            stops = (*cuts, len(sequence.tokens))
            if piece < len(stops):
                start = sequence.table.length
                sequence.table.append(stops[piece] - start)
                work.append(Work(sequence, start, stops[piece] - start, samples=True))
        logits, order = runner.run(SchedulerOutput(tuple(work), ()))
        last |= {w.sequence.key: row.to(torch.float32, copy=True) for w, row in zip(order, logits, strict=True)}
    return [last[s.key] for s in sequences]

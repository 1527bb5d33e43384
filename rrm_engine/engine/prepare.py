"""From a published model to one the engine may run: load, fuse, and compare with its plain self."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rrm_kernels.reference import PagedAttention, paged_attention
from torch import nn
from transformers import PreTrainedTokenizerFast

from rrm_engine.engine.probe import probe, refuse_known_mismatches
from rrm_engine.kv.cache import LayerShape
from rrm_engine.models.attention import Forward, choose_attention, register_attention, transformers_forward
from rrm_engine.models.fuse import fuse
from rrm_engine.models.lean import lean_forward
from rrm_engine.models.load import load_pretrained, resolve_device


class UnsupportedModel(ValueError):
    """The model would run, but not exactly; the message says why."""


@dataclass(slots=True)
class LoadedModel:
    """A causal LM whose attention is ours, checked against its plain self."""

    name: str
    model: nn.Module
    forward: Forward
    tokenizer: PreTrainedTokenizerFast
    parameters: int
    dtype: torch.dtype
    device: torch.device
    shapes: dict[int, LayerShape]
    attention: str  # the attention backend, in words
    attend: PagedAttention
    max_position: int
    eos_ids: frozenset[int]
    generation: dict[str, Any]  # the checkpoint's own sampling settings
    probe_error: float  # largest logit difference of the load-time check, relative to the logits' spread

    @property
    def model_type(self) -> str:
        return self.model.config.model_type  # type: ignore[union-attr, return-value]


def load_model(name: str, dtype: str = "auto", device: str = "auto", attention: str = "auto") -> LoadedModel:
    """Load ``name`` (``embedded``, a hub id, a directory or a GGUF file) and prepare it.

    Raises ValueError, or its subclass UnsupportedModel, with one sentence that says what to do.
    """
    target = resolve_device(device)
    model, tokenizer = load_pretrained(name, dtype, target)
    return prepare_model(model, tokenizer, name, target, attention)


def prepare_model(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    device: torch.device | None = None,
    attention: str = "auto",
) -> LoadedModel:
    """Fuse and probe a transformers causal LM that was built with our attention (or can be switched to it).

    Raises UnsupportedModel if a packed, chunked run would not equal a plain one.
    """
    register_attention()
    device = device or torch.device("cpu")
    model = model.to(device).eval()
    model.requires_grad_(False)
    config = model.config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    dtype = model.dtype
    if reason := refuse_known_mismatches(config):
        raise UnsupportedModel(f"{name}: {reason}")
    attention_name, attend = choose_attention(attention, device)

    def optimise(model: Any) -> Iterator[Forward]:
        fuse(model)
        if attend is not paged_attention and (lean := lean_forward(model, device)) is not None:
            yield lean
        yield transformers_forward(model)

    result = probe(model, device, optimise, attend)
    if result.reason or result.forward is None:
        raise UnsupportedModel(f"{name}: {result.reason}")
    return LoadedModel(
        name=name,
        model=model,
        forward=result.forward,
        tokenizer=tokenizer,
        parameters=parameters,
        dtype=dtype,
        device=device,
        shapes=result.shapes,
        attention=attention_name,
        attend=attend,
        max_position=int(getattr(config, "max_position_embeddings", None) or 1 << 20),
        eos_ids=_eos_ids(model, tokenizer),
        generation=_generation(model),
        probe_error=result.error,
    )


def _eos_ids(model: Any, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    ids: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer):
        value = getattr(source, "eos_token_id", None)
        ids.update(value if isinstance(value, (list, tuple)) else [value] if value is not None else [])
    return frozenset(int(i) for i in ids)


def _generation(model: Any) -> dict[str, Any]:
    """Sampling settings of the checkpoint's generation_config; greedy if it does not sample."""
    config = getattr(model, "generation_config", None)
    if config is None or not getattr(config, "do_sample", False):
        return {"temperature": 0.0}
    values = {k: getattr(config, k, None) for k in ("temperature", "top_p", "top_k", "min_p")}
    return {k: v for k, v in values.items() if v is not None}

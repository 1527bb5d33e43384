"""From a published model to one the engine may run: load, fuse, and compare with its plain self."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rrm_kernels.batch import PagedAttention
from rrm_kernels.reference import paged_attention
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rrm_engine.errors import RrmError
from rrm_engine.kv.cache import LayerShape
from rrm_engine.loading.check import UNSUPPORTED, check_model, refuse_known_mismatches
from rrm_engine.loading.generation import Generation, eos_ids, read_generation
from rrm_engine.loading.load import UNUSED, load_pretrained, resolve_device
from rrm_engine.loading.placement import MemoryPlan
from rrm_engine.loading.places import register_plain_attention
from rrm_engine.models.attention import (
    Forward,
    OnOwnDevice,
    choose_attention,
    register_attention,
    transformers_forward,
)
from rrm_engine.models.fuse import fuse
from rrm_engine.models.lean import lean_forward
from rrm_engine.models.spread import spread


class UnsupportedModel(RrmError):
    """The model would run, but not exactly; the message says why."""


@dataclass(slots=True)
class LoadedModel:
    """A causal LM whose attention is ours, checked against its plain self."""

    name: str
    model: PreTrainedModel
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
    generation: Generation  # what the checkpoint says about sampling
    load_check_error: float  # root mean square of the logits' difference, relative to their spread
    slower: str | None = None  # why it runs through transformers' own modules although a leaner forward was built
    unused: tuple[str, ...] = ()  # modules of its checkpoint that it does not have, such as value heads
    stages: int = 1  # of a pipeline; as many steps may be in flight

    @property
    def model_type(self) -> str:
        return self.model.config.model_type

    @property
    def vocabulary(self) -> int:
        """How many tokens it knows."""
        config: Any = self.model.config
        return int(config.get_text_config().vocab_size)


def load_planned(
    name: str, dtype: str, plan: MemoryPlan, attention: str = "auto", trust_remote_code: bool = False
) -> list[LoadedModel]:
    """Load ``name`` as planned: one model for each replica, the same one for those of one device; else just one.

    Raises as ``load_model`` does.
    """
    if plan.kind == "replicate":
        copies = {
            device: load_model(name, dtype, str(device), attention, trust_remote_code)
            for device in dict.fromkeys(plan.devices)
        }
        return [copies[device] for device in plan.devices]
    model, tokenizer = load_pretrained(name, dtype, plan.devices[0], plan.modules, trust_remote_code)
    loaded = prepare_model(model, tokenizer, name, plan.devices[0], attention, plan.layers)
    return [replace(loaded, stages=len(plan.stages))]


def load_model(
    name: str, dtype: str = "auto", device: str = "auto", attention: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load ``name`` (``embedded``, a hub id, a directory or a GGUF file) and prepare it.

    Raises RrmError, or its subclass UnsupportedModel, with one sentence that says what to do.
    """
    target = resolve_device(device)
    model, tokenizer = load_pretrained(name, dtype, target, trust_remote_code=trust_remote_code)
    return prepare_model(model, tokenizer, name, target, attention)


def prepare_model(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    device: torch.device | None = None,
    attention: str = "auto",
    layers: Sequence[torch.device] = (),
) -> LoadedModel:
    """Fuse and probe a transformers causal LM that was built with our attention (or can be switched to it).

    ``layers`` are the devices of its layers, if they are not all on ``device``, where the first one is.

    Raises UnsupportedModel if a packed, chunked run would not equal a plain one.
    """
    register_attention()
    register_plain_attention()
    device = device or torch.device("cpu")
    spreads = len(set(layers)) > 1
    if spreads:
        spread(model, layers)
    model = model.eval() if spreads else model.to(device).eval()
    model.requires_grad_(False)
    config = model.config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    dtype = model.dtype
    if reason := refuse_known_mismatches(config):
        raise UnsupportedModel(f"{name}: {reason}; {UNSUPPORTED}")
    attention_name, attend = choose_attention(attention, device, dtype)
    devices = layers or [device] * config.num_hidden_layers

    compiled = attend is not paged_attention
    on_device = OnOwnDevice(attend) if compiled and (spreads or device.type == "cuda") else attend

    def optimise(model: Any, kept: Collection[nn.Module]) -> Iterator[tuple[Forward, PagedAttention]]:
        fuse(model, kept)
        if compiled and (lean := lean_forward(model, devices, attend)) is not None:
            yield lean, on_device
        forward = transformers_forward(model, devices[-1] if spreads else None)
        yield forward, on_device
        if attention == "auto" and compiled:
            yield forward, paged_attention

    result = check_model(model, tokenizer, devices, optimise)
    if result.reason or result.forward is None or result.attend is None:
        raise UnsupportedModel(f"{name}: {result.reason}; {result.advice}")
    if result.attend is not on_device:
        attention_name = f"torch reference ({attention_name}: {result.slower})"
        result.slower = None
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
        attend=result.attend,
        max_position=int(getattr(config, "max_position_embeddings", None) or 1 << 20),
        eos_ids=eos_ids(getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer),
        generation=read_generation(model),
        load_check_error=result.error,
        slower=result.slower,
        unused=getattr(model, UNUSED, ()),
    )

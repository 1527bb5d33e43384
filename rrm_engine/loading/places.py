"""Places in a forward pass where the check at load sees values, and says with which ones the pass goes on.

They are each layer's ``inputs`` (the hidden states; those of a layer after the last one would be its outputs), and of
its attention the ``queries``, ``keys`` and ``values``, rotated and normed, and the result, ``attention``.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from rrm_engine.models.attention import Exchange

AGAIN = 3
PLAIN_ATTENTION = "rrm_plain"  # transformers' eager attention, with these places in it


class PlainExchange(Exchange, Protocol):
    """That of a plain run: the first copy is the model's own, the others are ``moved`` as rounding might."""

    def moved(self, values: torch.Tensor) -> torch.Tensor: ...


@contextmanager
def layer_inputs(layers: nn.ModuleList, exchange: Exchange) -> Iterator[None]:
    """Exchange the inputs of a transformers model's ``layers``, and the outputs of the last one, in this context."""

    def swap(index: int, hidden: torch.Tensor) -> torch.Tensor:  # [..., copies, tokens, width]
        found = hidden.movedim((-3, -2), (0, 1))
        return exchange("inputs", index, found).movedim((0, 1), (-3, -2))

    def before(index: int, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (swap(index, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": swap(index, kwargs["hidden_states"])}

    def after_layers(output: Any) -> Any:
        if isinstance(output, tuple):
            return swap(len(layers), output[0]), *output[1:]
        return swap(len(layers), output)

    handles = [
        layer.register_forward_pre_hook(lambda _, args, kwargs, i=i: before(i, args, kwargs), with_kwargs=True)
        for i, layer in enumerate(layers)
    ]
    handles.append(layers[-1].register_forward_hook(lambda _, __, output: after_layers(output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    rrm_exchange: PlainExchange,
    **options: Any,
) -> tuple[torch.Tensor, Any]:
    """The eager attention of the module's own file, between exchanges of its new tokens' values.

    Query ``[copies, query heads, tokens, width]``, key and value ``[copies, kv heads, past + tokens, width]``. It is
    computed ``AGAIN`` from values moved anew: nearly tied keys are rare and matter much, so one copy would miss them.
    """
    layer: int = module.layer_idx  # type: ignore[assignment]
    eager = sys.modules[type(module).__module__].eager_attention_forward  # what transformers itself looks up there
    new = query.shape[2]
    past = key.shape[2] - new
    parts = {"queries": query, "keys": key[:, :, past:], "values": value[:, :, past:]}
    parts = {what: rrm_exchange(what, layer, x.transpose(1, 2)).transpose(1, 2) for what, x in parts.items()}

    before = 1.0
    if query.dtype == torch.float16 and (scaling := options.get("scaling")):
        # Eager attention scales what queries and keys make, which float16 may not hold. A power of two moves exactly.
        before = 2.0 ** math.floor(math.log2(scaling))
        options["scaling"] = scaling / before

    def attend(query: torch.Tensor, new_key: torch.Tensor, new_value: torch.Tensor) -> Any:
        keys, values = torch.cat([key[:, :, :past], new_key], 2), torch.cat([value[:, :, :past], new_value], 2)
        return eager(module, before * query, keys, values, *args, **options)

    out, weights = attend(*parts.values())
    others = (attend(*(rrm_exchange.moved(x[:1].expand_as(x)) for x in parts.values())) for _ in range(AGAIN))
    return rrm_exchange("attention", layer, torch.cat([out, *(other for other, _ in others)])), weights


def register_plain_attention() -> None:
    """Make ``attn_implementation="rrm_plain"`` known to transformers; repeating it is harmless."""
    AttentionInterface.register(PLAIN_ATTENTION, plain_attention)
    AttentionMaskInterface.register(PLAIN_ATTENTION, eager_mask)

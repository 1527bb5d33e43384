"""Transformers' own run of a sequence: what it has at each place of its layers, and what rounding does there."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from rrm_engine.loading.places import layer_inputs
from rrm_engine.loading.rounding import jitter, rounding_scale

LOGITS = "logits"
Place = tuple[str, int]  # what, and of which layer
Past = Mapping[int, tuple[torch.Tensor, torch.Tensor]]  # by layer keys and values [tokens, kv heads, width]


@dataclass(slots=True)
class Plain:
    """A sequence whose last ``tokens`` were run, after ``past`` ones; ``stops`` of them had logits computed.

    By place the values ``[tokens, ...]`` and the ``scale`` of rounding ``[tokens, features]``.
    """

    tokens: list[int]
    stops: Sequence[int]
    past: Past
    values: dict[Place, torch.Tensor] = field(default_factory=dict)
    scale: dict[Place, torch.Tensor] = field(default_factory=dict)

    @property
    def past_tokens(self) -> int:
        return next((len(keys) for keys, _ in self.past.values()), 0)

    def logits(self) -> torch.Tensor:
        """``[stops, vocabulary]``"""
        return next(values for (what, _), values in self.values.items() if what == LOGITS)

    @property
    def dtype(self) -> torch.dtype:
        """Of its activations."""
        return next(iter(self.values.values())).dtype

    @property
    def finite(self) -> bool:
        """No NaN and no infinity, here and in the copy that was moved."""
        return all(bool(of.isfinite().all()) for of in (*self.values.values(), *self.scale.values()))

    def note(self, place: Place, found: torch.Tensor) -> None:
        """What the copies have there, ``[copies, tokens, ...]``."""
        self.values[place] = found[0].clone()
        self.scale[place] = rounding_scale(found[0].flatten(1), found[1:].flatten(2))


class _Exchange:
    """Notes what is found, and goes on with the first copy and another one that is moved."""

    def __init__(self, plain: Plain) -> None:
        self.plain = plain
        self.generator = torch.Generator().manual_seed(len(plain.tokens))

    def __call__(self, what: str, layer: int, found: torch.Tensor) -> torch.Tensor:
        self.plain.note((what, layer), found)
        return torch.stack([found[0], self.moved(found[0])])

    def moved(self, values: torch.Tensor) -> torch.Tensor:
        return jitter(values, self.generator)


def run_plain(
    model: Any,
    layers: Any,
    devices: Sequence[torch.device],
    tokens: list[int],
    stops: Sequence[int],
    past: Past | None = None,
) -> Plain:
    """Run a model with plain attention on two copies of ``tokens``.

    At each place the second copy is given the first one's values, moved as rounding might. ``layers`` are the
    model's, None if it has no list of them; ``devices`` are theirs.
    """
    plain = Plain(tokens, stops, past or {})
    exchange = _Exchange(plain)
    cache: dict[str, Any] = {"use_cache": False}
    if past:
        cache = {"use_cache": True, "past_key_values": DynamicCache()}
        for layer, pair in past.items():
            keys, values = (x.transpose(0, 1)[None].expand(2, -1, -1, -1) for x in pair)
            cache["past_key_values"].update(keys, values, layer)
    with layer_inputs(layers, exchange) if layers is not None else nullcontext():
        logits = model(
            input_ids=torch.tensor([tokens, tokens], device=devices[0]),
            logits_to_keep=torch.tensor([stop - 1 for stop in stops], device=devices[-1]),
            rrm_exchange=exchange,
            **cache,
        ).logits
    plain.note((LOGITS, len(layers or ())), logits)
    return plain

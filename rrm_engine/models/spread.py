"""Spreading a model's layers over several devices: the device of each module, and hooks that move layers' inputs."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from rrm_engine.device.transfer import hand_over
from rrm_engine.errors import RrmError
from rrm_engine.models.attention import PagedForward

Places = dict[str, torch.device]


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The name and the list of a causal LM's layers. Raises RrmError if it has none.

    The layers of an image encoder, of which there may be equally many, are not taken for them.
    """
    count = model.config.get_text_config().num_hidden_layers
    decoder = set(model.get_decoder().modules())
    for name, module in model.named_modules():
        if module in decoder and isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise RrmError(f"{type(model).__name__} has no list of {count} layers that --placement pipeline could split")


def places(model: Any, devices: Sequence[torch.device]) -> Places:
    """By name the device of each layer, as ``devices`` says, and of each other module that has tensors.

    Modules that turn token ids and positions into vectors go with the first layer, others (norm, head) with the last.
    """
    prefix, layers = decoder_layers(model)
    found = {f"{prefix}.{i}": device for i, device in enumerate(devices)}
    for name, module in model.named_modules():
        inside = f"{name}.".startswith(f"{prefix}.")
        if not inside and _own_tensors(module):
            found[name] = devices[0] if _comes_first(name, module) else devices[-1]
    if len(layers) != len(devices):
        raise ValueError(f"{len(devices)} devices for {len(layers)} layers")
    return found


def tied_modules(model: Any) -> dict[str, nn.Module]:
    """By name the modules after the layers whose weight is that of an embedding before them."""
    tied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    others = ((name, m) for name, m in model.named_modules() if not isinstance(m, nn.Embedding))
    return {name: m for name, m in others if id(getattr(m, "weight", None)) in tied}


def spread(model: Any, devices: Sequence[torch.device]) -> None:
    """Move every module to its device and make each layer fetch its inputs. A weight tied across devices is copied."""
    module: Any
    if devices[0] != devices[-1]:
        for module in tied_modules(model).values():
            module.weight = nn.Parameter(module.weight.detach().to(devices[-1], copy=True), requires_grad=False)
    modules = dict(model.named_modules())
    prefix, _ = decoder_layers(model)
    for name, device in places(model, devices).items():
        module = modules[name]
        if name.startswith(f"{prefix}."):
            module.to(device)
            module.register_forward_pre_hook(partial(_fetch, device), with_kwargs=True)
        else:
            module._apply(lambda tensor, device=device: tensor.to(device), recurse=False)


def _fetch(device: torch.device, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """A layer's arguments on its device; what all layers are given is copied to each device once a step."""
    paged: PagedForward | None = kwargs.get("rrm_forward")

    def fetch(tensor: torch.Tensor) -> torch.Tensor:
        return hand_over(tensor, device) if paged is None else paged.bring(tensor, device)

    fetched: tuple[Any, Any] = tree_map_only(torch.Tensor, fetch, (args, kwargs))
    return fetched


def _own_tensors(module: nn.Module) -> Iterable[torch.Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _comes_first(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or any(part in name for part in ("rotary", "project_in"))

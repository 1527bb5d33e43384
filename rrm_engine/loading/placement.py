"""Where a model goes: which devices, which of its layers on which, and what memory that leaves for KV."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import torch

from rrm_engine.device.memory import free_memory, in_units, kv_room
from rrm_engine.errors import RrmError
from rrm_engine.loading.load import resolve_device
from rrm_engine.models.spread import Places, decoder_layers, places, tied_modules

Kind = Literal["single", "pipeline", "replicate"]
USEFUL_TOKENS = 32_768  # of KV: with less on one device, ``auto`` takes several
FIRST, LAST = torch.device("cpu"), torch.device("meta")  # two devices that tell the ends of a model apart


@dataclass(frozen=True, slots=True)
class Stage:
    """The layers ``first`` to ``stop`` on one device, in bytes: of weights, and of KV for each token."""

    device: torch.device
    first: int
    stop: int
    weights: int
    kv_per_token: int

    def sentence(self) -> str:
        size = f"{in_units(self.weights)} of weights, {in_units(self.kv_per_token)} of KV a token"
        return f"layers {self.first} to {self.stop - 1}, {size}"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Made before any weight is loaded. ``devices`` are those of the stages or of the replicas.

    ``stages`` are those of one copy of the model, ``modules`` where its parts are loaded to. ``room`` is how many
    tokens of KV fit beside the weights: all over the stages of a pipeline, in each of the replicas.
    """

    kind: Kind
    devices: tuple[torch.device, ...]
    stages: tuple[Stage, ...]
    modules: Places
    room: int

    @property
    def layers(self) -> tuple[torch.device, ...]:
        """The device of each layer."""
        return tuple(stage.device for stage in self.stages for _ in range(stage.first, stage.stop))

    def sentence(self) -> str:
        """What goes where, for people."""
        each = f"{', '.join(map(str, self.devices))}, on each" if self.kind == "replicate" else ""
        parts = [f"{each or stage.device}: {stage.sentence()}" for stage in self.stages]
        return f"memory plan, {self.kind}: {'; '.join(parts)}; room for {self.room:,} tokens of KV"

    def describe(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        stages = [{**asdict(stage), "device": str(stage.device)} for stage in self.stages]
        return {"placement": self.kind, "devices": list(map(str, self.devices)), "stages": stages, "room": self.room}


def parse_devices(names: str) -> tuple[torch.device, ...]:
    """``cuda:0,cuda:1``; a device may be named several times. Raises RrmError for one that cannot be used."""
    found = [name.strip() for name in names.split(",")]
    if not all(found):
        raise RrmError(f"--devices {names}: a name is missing beside a comma; it takes names as in cuda:0,cuda:1")
    return tuple(resolve_device(name, "--devices") for name in found)


def plan_memory(skeleton: Any, devices: Sequence[torch.device], kind: str, useful: int | None = None) -> MemoryPlan:
    """The plan for a model that is on the meta device only.

    ``auto`` takes one device if that is all there is, or if the model fits on the first with ``useful`` tokens of KV
    beside it; else a pipeline. It never replicates. Raises RrmError, with the numbers, where the model does not fit.
    """
    if kind == "auto":
        single = _plan(skeleton, devices[:1], "single")
        enough = len(set(devices)) == 1 or single.room >= (useful or USEFUL_TOKENS)
        kind = "single" if enough else "pipeline"
    plan = _plan(skeleton, devices[:1] if kind == "single" else devices, kind)  # type: ignore[arg-type]
    if plan.room < 1:
        raise RrmError(f"the model does not fit, {plan.sentence()}: name more devices in --devices")
    return plan


def _plan(skeleton: Any, devices: Sequence[torch.device], kind: Kind) -> MemoryPlan:
    stages = _stages(skeleton, devices if kind == "pipeline" else devices[:1])
    if kind == "replicate":
        copies = Counter(devices)
        one = stages[0]  # weights are shared by the replicas of a device, their KV is not
        room = min(kv_room(d, one.weights) // (copies[d] * one.kv_per_token) for d in copies)
    else:
        room = min(
            kv_room(d, sum(s.weights for s in stages if s.device == d))
            // sum(s.kv_per_token for s in stages if s.device == d)
            for d in {s.device for s in stages}
        )
    layers = [s.device for s in stages for _ in range(s.first, s.stop)]
    # A tied weight is loaded once, where it comes first.
    modules = {**places(skeleton, layers), **dict.fromkeys(tied_modules(skeleton), layers[0])}
    return MemoryPlan(kind, tuple(devices), tuple(stages), modules, max(0, int(room)))


def _stages(skeleton: Any, devices: Sequence[torch.device]) -> list[Stage]:
    """The model cut into one stretch of layers for each device."""
    prefix, layers = decoder_layers(skeleton)
    sizes = [_bytes(layer) for layer in layers]
    if len(devices) > len(sizes):
        raise RrmError(f"--devices names {len(devices)} stages and the model has {len(sizes)} layers: name fewer")
    modules = dict(skeleton.named_modules())
    sides = places(skeleton, [FIRST, *[LAST] * (len(sizes) - 1)])
    ends = Counter[torch.device]()
    for name, side in sides.items():
        if not name.startswith(f"{prefix}."):
            ends[side] += _bytes(modules[name])
    if devices[0] == devices[-1]:
        ends[LAST] -= sum(_bytes(module) for module in tied_modules(skeleton).values())
    kv = kv_bytes_per_token(skeleton.config, skeleton.dtype)
    room = [free_memory(device) / devices.count(device) for device in devices]
    stages, first = [], 0
    for stop, device in zip(split(sizes, kv, ends[FIRST], ends[LAST], room), devices, strict=True):
        weights = sum(sizes[first:stop]) + (first == 0) * ends[FIRST] + (stop == len(sizes)) * ends[LAST]
        stages.append(Stage(device, first, stop, weights, kv * (stop - first)))
        first = stop
    return stages


def split(sizes: Sequence[int], kv: int, before: int, after: int, room: Sequence[float]) -> tuple[int, ...]:
    """Where the stretch of layers of each device ends, so that as many tokens' KV as possible fits into each of them.

    In bytes: ``sizes`` of the layers' weights, ``kv`` of a token's KV in one layer, ``before`` and ``after`` of the
    weights that come on top of the first and the last stretch, ``room`` of the devices' memory.
    """

    @cache
    def best(start: int, stage: int) -> tuple[float, tuple[int, ...]]:
        free = room[stage] - (start == 0) * before
        if stage == len(room) - 1:
            return (free - sum(sizes[start:]) - after) / (kv * (len(sizes) - start)), (len(sizes),)
        options = []
        for stop in range(start + 1, len(sizes) - (len(room) - stage) + 2):
            rest, stops = best(stop, stage + 1)
            tokens = (free - sum(sizes[start:stop])) / (kv * (stop - start))
            options.append((min(tokens, rest), (stop, *stops)))
        return max(options)

    return best(0, 0)[1]


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Of one layer, read off a config; what a layer really stores is known once the model has run."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        widths = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
        return int(heads * widths * dtype.itemsize)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(2 * (getattr(config, "num_key_value_heads", None) or heads) * width * dtype.itemsize)


def _bytes(module: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())

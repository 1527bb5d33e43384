"""Whatever an engine may be set to, as the rows of a table in which no token may change; each row is lived once.

Models are made once for all rows that share them, and so are lives: what drafts foretell is what the same row wrote
without any.
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from foretold import Foretold
from graph_scripts import CHEAP_COPIES, Script, attaching, crowded, live_graph, mistakes, uncrowded, waiting_graph
from oracle import engine_for, plain_model, prepared
from rrm_kernels.reference_layer import ReferenceLayer, ReferenceRagged
from settled import IN_A_GRAPH, Settled

from rrm_engine.config import WaitPolicy
from rrm_engine.engine.cuda_graphs import Share
from rrm_engine.engine.engine import Engine
from rrm_engine.engine.replicas import Replicas
from rrm_engine.loading.prepare import LoadedModel, prepare_model
from rrm_engine.models import lean
from rrm_engine.models.lean import LeanForward, Stage

try:
    from rrm_kernels.tile import INTERPRETED

    ON_CUDA = torch.cuda.is_available() and not INTERPRETED
except ImportError:  # no Triton
    ON_CUDA = False
STATIC = ("eager", "captured")  # forms


@dataclass(frozen=True)
class Row:
    """A model in some form, the settings of an engine, and the life that is led on it."""

    life: Callable[[Any], Script] = live_graph
    family: str = "qwen3"
    form: str = "auto"  # attention of that name, or one of STATIC: the steps of CUDA, wherever this runs
    devices: int = 1  # that the layers are split over; without CUDA they are names of the CPU
    stages: int = 1
    lookahead: bool = False
    drafts: bool = False
    settled: bool = False  # sequences have generation settings
    policy: WaitPolicy = "pin"
    blocks: int = 200  # of 4 tokens
    longest: int = 400  # tokens that a sequence may have
    prefix_cache: bool = True
    replicas: int = 1
    max_sequences: int = 64
    step_tokens: int = 16

    def __str__(self) -> str:
        own = [(f.name, getattr(self, f.name)) for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in own) or "as it is"

    @property
    def overlaps(self) -> bool:
        """Whether steps do: when something is forked depends on it, and so what is written after that."""
        return self.lookahead or self.stages > 1 or self.replicas > 1


WAITING = Row(waiting_graph, longest=110)
SHORT = replace(WAITING, blocks=30)  # memory runs out
CROWDED = Row(crowded, blocks=22, longest=88)


def rows(row: Row, **choices: Any) -> Iterator[Row]:
    """``row`` with every combination of ``choices``."""
    for values in itertools.product(*choices.values()):
        yield replace(row, **dict(zip(choices, values, strict=True)))


@dataclass
class Lived:
    """What a life wrote, which sequences are not as they should be, and what came about on the way."""

    script: Script
    wrong: Any
    held: int  # blocks, after the end
    steps: list[int]  # of each replica
    shares: list[Share]

    def count(self, counter: str) -> int:
        return sum(getattr(counters, counter) for counters in self.script.counters.values())


class Matrix:
    """The models and lives of all rows."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.plain = cache(self._plain)
        self.model = cache(self._model)
        self.lived = cache(self.live)

    def live(self, row: Row, model: LoadedModel | None = None) -> Lived:
        """``row`` now, whatever is patched, on another ``model`` if one is given."""
        model = model or self.model(row.family, row.form, row.devices)
        engines = [self._engine(row, model) for _ in range(row.replicas)]
        engine: Any = engines[0] if row.replicas == 1 else Replicas(engines)
        settled = Settled(engine, IN_A_GRAPH) if row.settled else None
        if row.drafts:
            told = replace(row, drafts=False)
            told = replace(told, life=uncrowded, blocks=200, longest=400) if row.life is crowded else told
            known = self.lived(told).script.done
            for one in engines:
                one.draft(Foretold(known, frozenset()))
        script = row.life(engine)
        plain = self.plain(row.family, row.devices)
        wrong: Any = settled.unlike_generate(plain, script) if settled else mistakes(plain, script)
        held = sum(one.pool.num_used + one.space.num_used for one in engines)
        return Lived(script, wrong, held, [one.steps for one in engines], engines[0].runner.static.shares)

    @staticmethod
    def _engine(row: Row, model: LoadedModel) -> Engine:
        return engine_for(
            model,
            row.blocks,
            costs=CHEAP_COPIES,
            wait_policy=row.policy,
            host_blocks=row.blocks,
            max_sequence_tokens=row.longest,
            prefix_cache=row.prefix_cache,
            max_sequences=row.max_sequences,
            step_tokens=row.step_tokens,
            stages=row.stages,
            lookahead=row.lookahead,
            eager=row.form == "eager",
            splices=row.life is attaching,
        )

    @staticmethod
    def _plain(family: str, devices: int) -> Any:
        """Over two devices with two layers on each, so that each may have one of every kind."""
        return plain_model(family, num_hidden_layers=2 if devices == 1 else 4)

    def _model(self, family: str, form: str, devices: int) -> LoadedModel:
        plain = self.plain(family, devices)
        if form in STATIC:
            return static_model(plain, devices)
        return prepared(plain, form) if devices == 1 else spread_model(plain, form, devices)


def spread_model(plain: Any, attention: str, devices: int, on: str = "cpu") -> LoadedModel:
    """A copy of ``plain`` made ready, its layers spread evenly over devices; the first CPU is just that."""
    count = plain.config.num_hidden_layers
    indices = [i * devices // count for i in range(count)]
    layers = [torch.device(on, index) if on == "cuda" or index else torch.device(on) for index in indices]
    tokenizer: Any = SimpleNamespace(eos_token_id=1)
    return prepare_model(copy.deepcopy(plain), tokenizer, plain.config.model_type, layers[0], attention, layers)


def static_model(plain: Any, devices: int = 1) -> LoadedModel:
    """``plain`` ready for the steps of CUDA: there with its kernels, without it with their torch references, for speed.

    Several devices are then shares of one, or the CPU under several names.
    """
    device = torch.device("cuda" if ON_CUDA else "cpu")
    if ON_CUDA:
        tokenizer: Any = SimpleNamespace(eos_token_id=1)
        model = prepare_model(copy.deepcopy(plain), tokenizer, plain.config.model_type, device, "triton")
        if devices == 1:
            return model
        from rrm_kernels.triton_layer import TritonLayer

        kernels: Any = TritonLayer()
    else:
        model, kernels = prepared(plain, "sdpa"), ReferenceLayer()
        model.attend = ReferenceRagged()
    fused = model.model
    layers: list[Any] = [lean._layer(i, layer, fused, device) for i, layer in enumerate(fused.model.layers)]
    each = len(layers) // devices
    places = [torch.device("cpu", i) if i and not ON_CUDA else device for i in range(devices)]
    stages = [Stage(place, kernels, layers[i * each : (i + 1) * each]) for i, place in enumerate(places)]
    model.forward = LeanForward(fused, stages)
    return model

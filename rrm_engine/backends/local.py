"""The in-process backend: one model, one engine, many jobs; this is what the Python API and the bench use."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from rrm_engine.backends.engine import EngineBackend
from rrm_engine.backends.join import JoinSettings
from rrm_engine.backends.session import Writing
from rrm_engine.backends.settings import describe_sampling, phase_plans, resolve
from rrm_engine.backends.solving import Solving
from rrm_engine.config import EngineConfig, RunConfig
from rrm_engine.device.memory import refuse_out_of_memory
from rrm_engine.engine.draft import MOST
from rrm_engine.engine.ranges import Ranges
from rrm_engine.engine.replicas import Driven, Replicas
from rrm_engine.engine.settings import EngineSettings
from rrm_engine.errors import RrmError
from rrm_engine.loading.engines import build_engine
from rrm_engine.loading.load import load_skeleton, too_large
from rrm_engine.loading.placement import MemoryPlan, parse_devices, plan_memory
from rrm_engine.loading.prepare import LoadedModel, load_model, load_planned
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.protocol.style import default_style, load_style
from rrm_engine.trace.profile import STEPS, Profile

ONE_THREAD_PARAMETERS = 20_000_000


def _ignore(_: Any) -> None:
    pass


class Solver(Solving):
    """A loaded model that solves tasks, directly or recursively, in one continuous batch.

    ``resolved`` is the config with every default filled in.
    """

    backend: EngineBackend

    def __init__(
        self,
        model: LoadedModel,
        config: RunConfig,
        tasks: Sequence[str] = (),
        replicas: Sequence[LoadedModel] = (),
    ) -> None:
        """``tasks`` are the texts to expect: the longest of them decides how long a sequence may get. ``replicas``
        are the copies to run on, ``model`` the first of them, if there are several.

        Raises RrmError, with the numbers and the flag to change, if the settings cannot work.
        """
        name = config.prompt_style
        style = load_style(default_style(model.model_type, model.name) if name == "auto" else name)
        chat = ChatFormat(model.tokenizer, model.eos_ids)
        self.model = model
        self.replicas = list(replicas) or [model]
        self.plan: MemoryPlan | None = None  # where several devices were named
        self.resolved = used = resolve(config, model, style, chat, tasks, self.replicas)
        engines = [build_engine(each, _engine_settings(used, each, chat.eos_ids)) for each in self.replicas]
        self.engine: Driven = engines[0] if len(engines) == 1 else Replicas(engines, together=used.join != "text")
        writing = Writing(
            self.engine,
            model.tokenizer,
            chat,
            phase_plans(used, style, chat, model),
            JoinSettings(used.join, used.boundary_tokens, used.splice_report),
        )
        self.backend = EngineBackend(writing, used)
        super().__init__(self.backend, style, used)

    @classmethod
    def load(
        cls, config: RunConfig | None = None, tasks: Sequence[str] = (), announce: Callable[[str], None] = _ignore
    ) -> "Solver":
        """Load the config's model and make it ready. Before, ``announce`` is told what will lie on which device.

        Raises RrmError (UnsupportedModel among them) with one sentence that says what to do.
        """
        config = config or RunConfig()
        if not isinstance(config, RunConfig):
            raise RrmError(f"Solver.load takes a RunConfig, not {config!r}")
        if isinstance(tasks, str) or not all(isinstance(task, str) for task in tasks):
            raise RrmError("Solver.load takes the tasks to expect as a list of texts")
        with refuse_out_of_memory(too_large(config.model, config.devices or config.device)):
            models, plan = _load(config, announce)
        if models[0].device.type == "cpu" and models[0].parameters < ONE_THREAD_PARAMETERS:
            torch.set_num_threads(1)  # products this small lose more to meeting than they gain from sharing
        solver = cls(models[0], config, tasks, models)
        solver.plan = plan
        return solver

    @contextmanager
    def profile(self, directory: Path | str, steps: int = STEPS, **about: Any) -> Iterator[Profile]:
        """Record what runs in the block with torch.profiler: ``steps`` steps of it, after a short warm-up.

        Writes ``profile.json.gz`` and ``profile.txt`` into ``directory`` at the end of the block. ``about`` goes into
        the trace file. Raises ProfileError if the block has no step after the warm-up.
        """
        self._refuse_unless_free()
        devices = (shape.device for model in self.replicas for shape in model.shapes.values())
        profile = Profile(self.model.device, steps, devices=devices, about=about)
        self._announce_to(profile)
        try:
            yield profile
        finally:
            self._announce_to(Ranges())
            profile.write(Path(directory))

    def describe(self) -> dict[str, Any]:
        """The model and the memory plan, for the header and ``run.json``."""
        model, config = self.model, self.resolved
        blocks = self.engine.progress()["blocks_total"]
        size = sum(shape.bytes_per_token for shape in model.shapes.values())
        return {
            "model": model.name,
            "model_type": model.model_type,
            "parameters": model.parameters,
            "dtype": config.dtype,
            "device": config.device if config.devices is None else f"{config.devices} ({config.placement})",
            "attention": model.attention,
            "load_check_error": model.load_check_error,
            **({"slower": model.slower} if model.slower else {}),
            **({"unused": list(model.unused)} if model.unused else {}),
            "kv_blocks": blocks,
            "block_size": config.block_size,
            "kv_bytes_per_token": size,
            "kv_bytes": size * blocks * config.block_size,
            "max_sequence_tokens": config.max_sequence_tokens,
            "prompt_style": config.prompt_style,
            "chat_template": not self.backend.writing.chat.plain,
            **describe_sampling(config, self.backend.writing.plans, model),
            "eos_token_ids": sorted(self.backend.writing.chat.eos_ids),
            **({"memory_plan": self.plan.describe()} if self.plan else {}),
        }

    def close(self) -> None:
        """From now on nothing can be solved; checks that no block was lost. Raises RrmError while something runs."""
        super().close()
        for engine in self.engine.engines:
            engine.check()

    def _announce_to(self, ranges: Ranges) -> None:
        for engine in self.engine.engines:
            engine.announce_to(ranges)


def _load(config: RunConfig, announce: Callable[[str], None]) -> tuple[list[LoadedModel], MemoryPlan | None]:
    """The model, or one for each replica; and where it lies, if that was to be planned."""
    code = config.trust_remote_code
    if config.devices is None:
        return [load_model(config.model, config.dtype, config.device, config.attention, code)], None
    devices = parse_devices(config.devices)
    useful = config.max_sequence_tokens or (config.kv_blocks and config.kv_blocks * config.block_size)
    plan = plan_memory(load_skeleton(config.model, config.dtype, code), devices, config.placement, useful)
    announce(plan.sentence())
    return load_planned(config.model, config.dtype, plan, config.attention, code), plan


def _engine_settings(config: EngineConfig, model: LoadedModel, eos_ids: frozenset[int]) -> EngineSettings:
    """Of an engine under a resolved config."""
    return EngineSettings(
        blocks=config.kv_blocks,
        block_size=config.block_size,
        prefix_cache=config.prefix_cache,
        max_sequences=config.max_concurrency,
        step_tokens=config.step_tokens,
        max_sequence_tokens=config.max_sequence_tokens,
        eos_ids=eos_ids,
        seed=config.seed,
        wait_policy=config.wait_policy,
        host_blocks=config.host_kv_blocks,
        stages=model.stages,
        lookahead=config.lookahead == "on",
        eager=config.eager,
        splices=config.join != "text",
        drafts=int({"off": 0, "auto": MOST}.get(config.draft, config.draft)),
        weigh_drafts=config.draft == "auto",
    )

"""From what the user left open to what a run uses: budgets, sampling, lengths, memory."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from rrm_engine.backends.job import MatcherFactory, PhasePlan
from rrm_engine.config import RunConfig
from rrm_engine.engine.prepare import LoadedModel
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.sequence import Matcher
from rrm_engine.graph.types import Limits, Phase
from rrm_engine.kv.cache import bytes_per_block
from rrm_engine.kv.memory import free_memory
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.protocol.grammar import EventGrammars, event_grammar
from rrm_engine.protocol.style import Style

# The flag of each phase's token budget; the graph phase is the planner's.
BUDGETS = {
    Phase.DIRECT: "direct_max_tokens",
    Phase.GRAPH: "planner_max_tokens",
    Phase.SOLVER: "solver_max_tokens",
    Phase.CONTINUATION: "continuation_max_tokens",
}
CONCLUSION_RESERVE = 256  # tokens set aside for each child's conclusion in its parent's context
CPU_MEMORY_SHARE = 0.3  # of the memory that is free after loading
CUDA_MEMORY_SHARE = 0.88


def resolve(config: RunConfig, model: LoadedModel, style: Style, chat: ChatFormat, tasks: Sequence[str]) -> RunConfig:
    """``config`` with every None and ``auto`` of a phase, length or memory setting replaced by what is used.

    Raises ValueError, with the numbers and the flag to change, when the longest sequence cannot fit.
    """
    values: dict[str, Any] = {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)}
    values["prompt_style"] = config.prompt_style if config.prompt_style != "auto" else style.name
    for phase, flag in BUDGETS.items():
        thinking = getattr(config, f"{phase}_thinking")
        if thinking is None:
            thinking = style.thinking[phase] and chat.has_thinking
        if thinking and not chat.has_thinking:
            raise ValueError(f"--{phase}-thinking on: the chat template of {model.name} has no thinking switch")
        values[f"{phase}_thinking"] = thinking
        values[flag] = getattr(config, flag) or min(style.budget(phase), model.max_position)
    if config.constrain == "auto":
        values["constrain"] = "off" if style.trained_on_events else "on"
    values["step_tokens"] = config.step_tokens or (4096 if model.device.type == "cuda" else 512)
    config = replace(config, **values)
    longest = longest_prompt(style, chat, tasks)
    config = replace(config, max_sequence_tokens=_sequence_tokens(config, model, longest))
    config = replace(config, kv_blocks=config.kv_blocks or _blocks(config, model))
    config = replace(config, host_kv_blocks=_host_blocks(config, model))
    _refuse_more_than_memory(config, model)
    return config


def longest_prompt(style: Style, chat: ChatFormat, tasks: Sequence[str]) -> int:
    """Tokens of the longest root prompt; the longest tasks by characters are tried."""
    longest = 0
    for task in sorted(tasks, key=len, reverse=True)[:8] or [""]:
        for kind, mode in (("direct", "direct"), ("graph", "recursive")):
            user = style.user(kind, task=task, max_width=8, depth_left=1)
            longest = max(longest, len(chat.opening(style.system(mode), user)))
    return longest


def _sequence_tokens(config: RunConfig, model: LoadedModel, prompt: int) -> int:
    """The longest sequence a run may need: a direct solve, or a node that plans, solves and continues."""
    if config.max_sequence_tokens is not None:
        if config.max_sequence_tokens > model.max_position:
            raise ValueError(
                f"--max-sequence-tokens {config.max_sequence_tokens}: {model.name} knows {model.max_position} positions"
            )
        return config.max_sequence_tokens
    budget = {phase: getattr(config, flag) for phase, flag in BUDGETS.items()}
    answer = max(budget[Phase.SOLVER], budget[Phase.CONTINUATION])  # a child's whole one
    conclusion = answer if config.join == "transcript" else CONCLUSION_RESERVE
    resume = budget[Phase.CONTINUATION] + config.max_sibling_width * conclusion
    recursive = budget[Phase.GRAPH] + max(budget[Phase.SOLVER], Limits().max_awaits * resume)
    needed = prompt + max(budget[Phase.DIRECT], recursive if "rrm" in config.modes else 0)
    if prompt + 1 >= model.max_position:
        raise ValueError(
            f"the longest prompt has {prompt} tokens and {model.name} knows {model.max_position} positions: "
            f"shorten the tasks or use a model with a longer context"
        )
    return min(needed, model.max_position)


def _blocks(config: RunConfig, model: LoadedModel) -> int:
    """Blocks that memory allows, but not more than ``--max-concurrency`` longest sequences can use."""
    assert config.max_sequence_tokens is not None
    one = -(-config.max_sequence_tokens // config.block_size)
    size = bytes_per_block(model.shapes, config.block_size)
    room = free_memory(model.device) * (CUDA_MEMORY_SHARE if model.device.type == "cuda" else CPU_MEMORY_SHARE)
    blocks = min(int(room // size), one * (config.max_concurrency + 1))
    if blocks < one:
        raise ValueError(
            f"one sequence of {config.max_sequence_tokens} tokens needs {one * size / 2**30:.2f} GiB of KV and "
            f"{room / 2**30:.2f} GiB are free for it on {model.device}: lower the phases' token budgets or "
            f"--max-sequence-tokens, or use a smaller --dtype"
        )
    return blocks


def _host_blocks(config: RunConfig, model: LoadedModel) -> int | None:
    """Blocks that may be offloaded: as many as the pool has, if the host's memory allows. None: nothing is."""
    assert config.kv_blocks is not None
    if config.wait_policy not in ("offload", "auto"):
        return config.host_kv_blocks
    room = free_memory(torch.device("cpu")) * CPU_MEMORY_SHARE // bytes_per_block(model.shapes, config.block_size)
    return config.host_kv_blocks or max(1, min(config.kv_blocks, int(room)))


def _refuse_more_than_memory(config: RunConfig, model: LoadedModel) -> None:
    """The pool may be as large as memory, no larger: on CPU it would be granted now and the process killed later."""
    size = bytes_per_block(model.shapes, config.block_size)
    host = config.host_kv_blocks if config.wait_policy in ("offload", "auto") else None
    asked = (("--kv-blocks", config.kv_blocks, model.device), ("--host-kv-blocks", host, torch.device("cpu")))
    for flag, blocks, device in asked:
        room = free_memory(device)
        if blocks and blocks * size > room:
            raise ValueError(
                f"{flag} {blocks} takes {blocks * size / 2**30:,.2f} GiB of KV and {room / 2**30:,.2f} GiB are free on "
                f"{device}: lower {flag}, to {room // size} at most"
            )


def sampling_params(config: RunConfig, style: Style, model: LoadedModel, thinking: bool) -> SamplingParams:
    """The command line's settings over the style's over the checkpoint's own."""
    values: dict[str, Any] = {**model.generation, **style.sampling(thinking)}
    for name in ("temperature", "top_p", "top_k", "min_p"):
        if (value := getattr(config, name)) is not None:
            values[name] = value
    values["top_k"] = int(values.get("top_k", 0))
    return SamplingParams(**values)


def phase_plans(config: RunConfig, style: Style, model: LoadedModel, limits: Limits) -> Mapping[Phase, PhasePlan]:
    """How each phase decodes under a resolved config."""
    grammars = EventGrammars(model.tokenizer, eos_ids=model.eos_ids) if config.constrain == "on" else None
    plans = {}
    for phase, flag in BUDGETS.items():
        thinking = bool(getattr(config, f"{phase}_thinking"))
        matcher = None
        if grammars is not None and not thinking and phase in (Phase.GRAPH, Phase.CONTINUATION):
            matcher = _matcher(grammars, phase, limits)
        sampling = sampling_params(config, style, model, thinking)
        plans[phase] = PhasePlan(getattr(config, flag), thinking, sampling, matcher)
    return plans


def _matcher(grammars: EventGrammars, phase: Phase, limits: Limits) -> MatcherFactory:
    """Matchers for nodes that have had ``children`` and may or may not split again."""

    def make(children: int, may_split: bool) -> Matcher:
        grammar = event_grammar(limits.max_width, may_split=may_split, first=children + 1, phase=phase.value)
        return grammars.matcher(grammar)

    return make

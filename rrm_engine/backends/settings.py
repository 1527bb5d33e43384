"""From what the user left open to what a run uses: budgets, sampling, lengths, memory."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from rrm_engine.backends.phases import RESTING, resolve_phases, thinks, values_of
from rrm_engine.backends.plans import MatcherFactory, PhasePlan
from rrm_engine.config import EngineConfig, Resolved, RunConfig
from rrm_engine.device.memory import free_memory, in_units, kv_room
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.sequence import Matcher
from rrm_engine.errors import RrmError
from rrm_engine.graph.types import Limits, Phase
from rrm_engine.kv.cache import bytes_per_block_on_devices
from rrm_engine.loading.generation import refuse_unusable
from rrm_engine.loading.prepare import LoadedModel
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.protocol.events import PlanShape
from rrm_engine.protocol.grammar import PHASES as GRAMMARS
from rrm_engine.protocol.grammar import EventGrammars, phase_grammar
from rrm_engine.protocol.style import SAMPLING, Style
from rrm_engine.protocol.thinking import Marks, Thought
from rrm_engine.solver.outcome import BUDGETS

CONCLUSION_RESERVE = 256  # tokens set aside for each child's conclusion in its parent's context
HOST = torch.device("cpu")
OFFLOADING = ("offload", "auto")  # wait policies that may move KV to host memory


def resolve(
    config: RunConfig,
    model: LoadedModel,
    style: Style,
    chat: ChatFormat,
    tasks: Sequence[str],
    replicas: Sequence[LoadedModel] = (),
) -> EngineConfig:
    """What ``config`` leaves open of phases, lengths and memory, decided.

    ``replicas`` are the copies of ``model``, itself among them, if there are several.

    Raises RrmError, with the numbers and the flag to change, when the longest sequence cannot fit.
    """
    if config.block_size % (multiple := model.attend.block_multiple):
        raise RrmError(
            f"--block-size {config.block_size}: --attention {config.attention} takes multiples of {multiple}; "
            f"give --block-size {multiple}"
        )
    used = resolve_phases(
        config, style, lambda asked, phase: thinks(asked, phase, style, chat, model.name), model.max_position
    )
    longest = _sequence_tokens(used, model, longest_prompt(used, style, chat, tasks))
    sizes = bytes_per_block_on_devices([m.shapes for m in replicas or [model]], config.block_size)
    blocks = config.kv_blocks or _blocks(used, longest, sizes)
    values: dict[str, Any] = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "placement": "replicate" if len(replicas) > 1 else "pipeline" if model.stages > 1 else "single",
        "attention": model.attend.name,
        "lookahead": _lookahead(config, model),
        # What rows cost has been measured on CPU only.
        "draft": "off" if config.draft == "auto" and model.device.type == "cuda" else config.draft,
        "step_tokens": config.step_tokens or (4096 if model.device.type == "cuda" else 512),
        "max_sequence_tokens": longest,
        "kv_blocks": blocks,
        "host_kv_blocks": _host_blocks(config, blocks, sum(sizes.values())),
    }
    resolved = EngineConfig(**{**values_of(used), **values})
    _refuse_more_than_memory(resolved, sizes)
    return resolved


def _lookahead(config: RunConfig, model: LoadedModel) -> str:
    """Whether steps are launched ahead. Raises RrmError where that was asked for and cannot be."""
    shadowed = config.join != "text" and config.splice_report > 0
    if config.lookahead == "on" and shadowed:
        raise RrmError("--lookahead on: the splice report reads every token before the next step; --splice-report 0")
    if config.lookahead == "auto":
        return "on" if model.device.type == "cuda" and not shadowed else "off"
    return config.lookahead


def longest_prompt(config: Resolved, style: Style, chat: ChatFormat, tasks: Sequence[str]) -> int:
    """Tokens of the longest root prompt; the longest tasks in bytes are tried.

    A task that no prompt can be made of does not count: its rows will say so.
    """
    values = {"problem": "", "given": (), "max_width": config.max_sibling_width, "depth_left": config.max_depth}
    kinds = ["direct", "graph" if config.max_depth else "solver"] if "rrm" in config.modes else ["direct"]
    longest = 0
    for task in sorted(tasks, key=lambda task: len(task.encode(errors="replace")), reverse=True)[:16] or [""]:
        for kind in kinds:
            with suppress(Exception):
                system, user, opens = style.start(kind, task=task, **values)
                longest = max(longest, len(chat.opening(system, user)) + len(chat.opens(opens)))
    return longest


def _sequence_tokens(config: Resolved, model: LoadedModel, prompt: int) -> int:
    """The longest sequence a run may need: a direct solve, or a node that plans, solves and continues."""
    if config.max_sequence_tokens is not None:
        if config.max_sequence_tokens > model.max_position:
            raise RrmError(
                f"--max-sequence-tokens {config.max_sequence_tokens}: {model.name} knows {model.max_position} positions"
            )
        if prompt >= config.max_sequence_tokens:
            raise RrmError(
                f"--max-sequence-tokens {config.max_sequence_tokens}: the longest prompt has {prompt} tokens, and an "
                f"answer needs room after it; the phases' token budgets ask for {_budgets(config)} more"
            )
        return config.max_sequence_tokens
    needed = prompt + _budgets(config)
    if prompt + 1 >= model.max_position:
        raise RrmError(
            f"the longest prompt has {prompt} tokens and {model.name} knows {model.max_position} positions: "
            f"shorten the tasks or use a model with a longer context"
        )
    return min(needed, model.max_position)


def _budgets(config: Resolved) -> int:
    """Tokens that may come after a prompt, with those of the conclusions that come back."""
    budget = {phase: getattr(config, flag) for phase, flag in BUDGETS.items()}
    answer = max(budget[Phase.SOLVER], budget[Phase.CONTINUATION])  # a child's whole one
    conclusion = answer if config.join == "transcript" else CONCLUSION_RESERVE
    resume = budget[Phase.CONTINUATION] + config.max_sibling_width * conclusion
    recursive = budget[Phase.GRAPH] + max(budget[Phase.SOLVER], Limits().max_awaits * resume)
    return max(budget[Phase.DIRECT], recursive if "rrm" in config.modes else 0)


def _blocks(config: Resolved, longest: int, sizes: Mapping[torch.device, int]) -> int:
    """Blocks that memory allows, but not more than ``--max-concurrency`` sequences of ``longest`` tokens can use.

    ``sizes`` are by device the bytes that a block takes there.
    """
    one = -(-longest // config.block_size)
    fullest = min(sizes, key=lambda device: kv_room(device) // sizes[device])
    room = kv_room(fullest) // sizes[fullest]
    if room < one:
        need, free = one * sizes[fullest], kv_room(fullest)
        raise RrmError(
            f"one sequence of {longest:,} tokens needs {in_units(need)} of KV and {in_units(free)} "
            f"are free for it on {fullest}: lower the phases' token budgets or "
            f"--max-sequence-tokens, or use a smaller --dtype"
        )
    return min(room, one * (config.max_concurrency + 1))


def _host_blocks(config: RunConfig, blocks: int, size: int) -> int:
    """Blocks that may be offloaded: as many as the pool has, if the host's memory allows."""
    if config.wait_policy not in OFFLOADING:
        return config.host_kv_blocks or 0
    return config.host_kv_blocks or max(1, min(blocks, kv_room(HOST) // size))


def _refuse_more_than_memory(config: EngineConfig, sizes: Mapping[torch.device, int]) -> None:
    """The pool may be as large as memory, no larger: on CPU it would be granted now and the process killed later."""
    host = config.host_kv_blocks if config.wait_policy in OFFLOADING else 0
    asked = [("--kv-blocks", config.kv_blocks, device, size) for device, size in sizes.items()]
    for flag, blocks, device, size in [*asked, ("--host-kv-blocks", host, HOST, sum(sizes.values()))]:
        room = free_memory(device)
        if blocks * size > room:
            raise RrmError(
                f"{blocks:,} KV blocks take {in_units(blocks * size)} and {in_units(room)} are free on {device}: "
                f"{flag} may be {room // size} at most"
            )


def sampling_params(config: RunConfig, style: Style, model: LoadedModel, thinking: bool) -> SamplingParams:
    """The command line's settings over the style's over the checkpoint's own."""
    own = model.generation.sampling if config.generation_config == "honour" else {}
    values: dict[str, Any] = {**own, **style.sampling(thinking)}
    for name in SAMPLING:
        if (value := getattr(config, name)) is not None:
            values[name] = value
    for name in SAMPLING:
        if type(values.get(name)) is int:
            values[name] = float(values[name])
    if isinstance(values.get("top_k"), float):
        values["top_k"] = max(int(values["top_k"]), 0)  # some write -1 for "off"
    if values.get("top_p") == 0:
        values["top_p"] = 1e-9  # the likeliest token, as transformers has it
    if values.get("repetition_penalty") == 1:
        del values["repetition_penalty"]
    refuse_unusable(values, model.eos_ids, model.vocabulary, f"--model {model.name}, generation_config")
    return SamplingParams.of(values)


def phase_plans(config: Resolved, style: Style, chat: ChatFormat, model: LoadedModel) -> Mapping[Phase, PhasePlan]:
    """How each phase decodes under a resolved config."""
    grammars = EventGrammars(model.tokenizer, eos_ids=model.eos_ids) if config.constrain == "on" else None
    plans = {}
    for phase, flag in BUDGETS.items():
        thinking, budget = bool(getattr(config, f"{phase}_thinking")), getattr(config, flag)
        matcher = thought = None
        free = phase is Phase.SOLVER and (thinking or style.solver_events)
        if grammars is not None and phase in GRAMMARS and not free:
            if thinking:  # what the style gives the events, at most half of all, is kept for them
                room = budget - min(style.budget(phase), budget // 2)
                thought = Thought(chat.marks, chat.opens_thinking(True), room)
            matcher = _matcher(grammars, phase, config.max_sibling_width, chat.marks, thought, style.plan_shape)
        sampling = sampling_params(config, style, model, thinking)
        if matcher is not None and phase is not Phase.SOLVER:
            sampling = sampling.without(*RESTING)
        plans[phase] = PhasePlan(budget, thinking, sampling, matcher, thought, style.plan_shape)
    return plans


def describe_sampling(config: RunConfig, plans: Mapping[Phase, PhasePlan], model: LoadedModel) -> dict[str, Any]:
    """By phase all settings that its tokens are drawn with; what rests under grammars; what is not honoured at all."""
    rests = any(plan.matcher is not None for plan in plans.values())
    used = {name for plan in plans.values() for name in plan.sampling.settings()}
    ignored = model.generation.ignored if config.generation_config == "honour" else ()
    return {
        "sampling": {str(phase): plan.sampling.settings() for phase, plan in plans.items()},
        "rests_under_grammars": [name for name in RESTING if name in used and rests],
        "generation_ignored": list(ignored),
    }


def _matcher(
    grammars: EventGrammars,
    phase: Phase,
    width: int,
    marks: Marks,
    thought: Thought | None,
    shape: PlanShape,
) -> MatcherFactory:
    """Matchers for nodes that have had ``children`` and may or may not split again."""

    def make(children: int, may_split: bool) -> Matcher:
        return grammars.matcher(phase_grammar(width, phase, marks, shape, children, may_split), thought)

    return make

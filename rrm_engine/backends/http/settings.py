"""From what the user left open to what the servers are asked for."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

from rrm_engine.backends.http.plans import Plan
from rrm_engine.backends.phases import RESTING, resolve_phases, thinks, values_of
from rrm_engine.config import Resolved, RunConfig, ServersConfig
from rrm_engine.errors import RrmError
from rrm_engine.graph.types import Phase
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.protocol.grammar import PHASES as HELD
from rrm_engine.protocol.grammar import phase_grammar
from rrm_engine.protocol.style import SAMPLING, Style
from rrm_engine.protocol.thinking import Marks
from rrm_engine.solver.outcome import BUDGETS

STANDARD: Final = ("temperature", "top_p")  # settings that every server has; the others are additions
SWITCHES: Final = ("enable_thinking", "thinking")


def resolve(config: RunConfig, style: Style, chat: ChatFormat | None, longest: int | None) -> ServersConfig:
    """What ``config`` leaves open, decided. ``chat`` is the model's format, None where only the servers know
    it; ``longest`` the longest context that they take.
    """

    def thinking(asked: bool | None, phase: Phase) -> bool:
        if chat is not None:
            return thinks(asked, phase, style, chat, config.model)
        return style.thinks(phase) if asked is None else asked

    if config.max_sequence_tokens and longest and config.max_sequence_tokens > longest:
        raise RrmError(f"--max-sequence-tokens {config.max_sequence_tokens}: the servers take {longest}")
    values = values_of(resolve_phases(config, style, thinking))
    values["continue_by"] = "turn" if chat is None else "tokens"
    values["max_sequence_tokens"] = config.max_sequence_tokens or longest
    return ServersConfig(**values)


def sampling_of(config: RunConfig, style: Style, thinking: bool) -> dict[str, Any]:
    """The command line's settings over the style's; what neither says is the servers' own."""
    values: dict[str, Any] = dict(style.sampling(thinking))
    values |= {name: value for name in SAMPLING if (value := getattr(config, name)) is not None}
    if "top_k" in values:
        values["top_k"] = int(values["top_k"]) or -1  # servers write that for "off"
    return values


def additions(config: Resolved, style: Style, *, switch: bool) -> dict[str, Any]:
    """All settings of requests that not every server has. ``switch``: the thinking switch of its template is one."""
    found: dict[str, Any] = {"seed": 1}
    for phase in BUDGETS:
        values = sampling_of(config, style, bool(getattr(config, f"{phase}_thinking")))
        found |= {name: value for name, value in values.items() if name not in STANDARD}
    if switch:
        found["chat_template_kwargs"] = dict.fromkeys(SWITCHES, False)
    return found


def refuse_ignored(config: RunConfig, refused: Mapping[str, str]) -> None:
    """What the user asked for must not be left out. ``refused`` has the reasons by the option's name."""
    for name, why in refused.items():
        if name in SAMPLING and getattr(config, name) is not None:
            raise RrmError(f"--{name.replace('_', '-')}: {why}; leave the flag out")
        if name == "chat_template_kwargs":
            for phase in BUDGETS:
                if getattr(config, f"{phase}_thinking") is not None:
                    raise RrmError(f"--{phase}-thinking: {why}; leave the flag out")


def phase_plans(
    config: Resolved, style: Style, marks: Marks, taken: frozenset[str], *, grammar: bool, more: Mapping[str, Any]
) -> dict[Phase, Plan]:
    """How each phase is asked for under a resolved config. ``taken`` are the additions that the servers take,
    ``grammar`` whether they hold a phase to one, ``more`` what every request has in addition.

    A phase that thinks goes without a grammar: it would have to begin where the thinking ends.
    """
    plans = {}
    for phase, flag in BUDGETS.items():
        thinking = bool(getattr(config, f"{phase}_thinking"))
        free = phase is Phase.SOLVER and style.solver_events
        held = grammar and phase.value in HELD and not thinking and not free
        values = sampling_of(config, style, thinking)
        if held and phase is not Phase.SOLVER:
            values = {name: value for name, value in values.items() if name not in RESTING}
        extra = {name: value for name, value in values.items() if name in taken}
        if "chat_template_kwargs" in taken:
            extra["chat_template_kwargs"] = dict.fromkeys(SWITCHES, thinking)
        plans[phase] = Plan(
            getattr(config, flag),
            thinking,
            {name: values[name] for name in STANDARD if name in values},
            {**extra, **more},
            partial(phase_grammar, config.max_sibling_width, phase, marks, style.plan_shape) if held else None,
            "seed" in taken,
            style.plan_shape,
        )
    return plans

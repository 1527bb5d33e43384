"""What a phase is given, on any backend: whether it thinks, and how many tokens it may take."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from rrm_engine.config import Resolved, RunConfig
from rrm_engine.errors import RrmError
from rrm_engine.graph.types import Phase
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.protocol.style import Style
from rrm_engine.solver.outcome import BUDGETS

# Settings that a phase held to a grammar does without: its events repeat keys, quotes and ids, and must.
RESTING = ("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size")


def values_of(config: RunConfig) -> dict[str, Any]:
    """All settings by name."""
    return {f.name: getattr(config, f.name) for f in fields(config)}


def resolve_phases(
    config: RunConfig, style: Style, thinking: Callable[[bool | None, Phase], bool], most: int | None = None
) -> Resolved:
    """What the style says of the graph and of the phases, where ``config`` leaves it open.

    What it does not say of solver phases is as in direct solves. ``thinking`` is whether a phase thinks, if that is
    what was asked; no budget that was not asked for is more than ``most`` tokens.
    """
    if "solver" not in style.budgets and config.solver_max_tokens is None:
        config = replace(config, solver_max_tokens=config.direct_max_tokens)
    if "solver" not in style.thinking and config.solver_thinking is None:
        config = replace(config, solver_thinking=config.direct_thinking)
    values: dict[str, Any] = {
        "prompt_style": config.prompt_style if config.prompt_style != "auto" else style.name,
        "max_depth": style.max_depth if config.max_depth is None else config.max_depth,
        "child_context": config.child_context or style.child_context,
    }
    if config.constrain == "auto":
        values["constrain"] = "off" if style.trained_on_events else "on"
    for phase, flag in BUDGETS.items():
        thinks = values[f"{phase}_thinking"] = thinking(getattr(config, f"{phase}_thinking"), phase)
        budget = budget_of(style, phase, thinks)
        values[flag] = getattr(config, flag) or (budget if most is None else min(budget, most))
    return Resolved(**{**values_of(config), **values})


def thinks(asked: bool | None, phase: Phase, style: Style, chat: ChatFormat, model: str) -> bool:
    """Whether a phase thinks: as was asked, else as the style wants it, as far as the chat template lets one choose."""
    always = chat.has_thinking and not chat.can_switch_thinking
    if asked and not chat.has_thinking:
        raise RrmError(f"--{phase}-thinking on: the chat template of {model} has no thinking switch")
    if asked is False and always:
        raise RrmError(
            f"--{phase}-thinking off: the chat template of {model} always opens a thinking block; leave the flag out, "
            f"or use a model whose template has a switch"
        )
    return always or (asked if asked is not None else style.thinks(phase) and chat.has_thinking)


def budget_of(style: Style, phase: Phase, thinking: bool) -> int:
    """Tokens of a phase. One that thinks where its style did not expect it gets the tokens to do so."""
    return style.budget(phase) + (style.budget("solver") if thinking and not style.thinks(phase) else 0)

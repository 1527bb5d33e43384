"""What a phase is given, whoever decodes it: whether it thinks, and how many tokens it may take."""

from dataclasses import replace
from typing import Any

from rrm_engine.config import RunConfig
from rrm_engine.errors import RrmError
from rrm_engine.graph.types import Phase
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.protocol.style import Style

# Settings that a phase held to a grammar does without: its events repeat keys, quotes and ids, and must.
RESTING = ("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size")


def with_style(config: RunConfig, style: Style) -> RunConfig:
    """``config`` with what the style says of the graph; what it leaves open of solver phases is as in direct solves."""
    values: dict[str, Any] = {
        "max_depth": style.max_depth if config.max_depth is None else config.max_depth,
        "child_context": config.child_context or style.child_context,
    }
    if "solver" not in style.budgets:
        values["solver_max_tokens"] = config.solver_max_tokens or config.direct_max_tokens
    if "solver" not in style.thinking and config.solver_thinking is None:
        values["solver_thinking"] = config.direct_thinking
    return replace(config, **values)


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


def budget_of(asked: int | None, phase: Phase, style: Style, thinking: bool) -> int:
    """Tokens of a phase. One that thinks where its style did not expect it gets the tokens to do so."""
    return asked or style.budget(phase) + (style.budget("solver") if thinking and not style.thinks(phase) else 0)

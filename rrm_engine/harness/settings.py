"""What harnesses ask of a model, as settings of a solve."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from rrm_engine.config import MODES, Resolved, RunConfig
from rrm_engine.errors import RrmError

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
BUDGETS = ("direct_max_tokens", "solver_max_tokens", "planner_max_tokens", "continuation_max_tokens")
NOT_OF_A_SOLVE = {"modes", "samples", "limit", "shard", "backend", "base_urls"}

Settings = tuple[tuple[str, Any], ...]


def config_of(mode: str, settings: Mapping[str, Any], flag: str) -> RunConfig:
    """The configuration of a model that a harness makes. Raises RrmError for a mode or a setting that there is not;
    ``flag`` is how they were given."""
    if mode not in MODES:
        raise RrmError(f"mode takes {' or '.join(MODES)}, not {mode!r}")
    if unknown := sorted(settings.keys() - {f.name for f in fields(RunConfig)} | settings.keys() & NOT_OF_A_SOLVE):
        raise RrmError(f"{flag}: {unknown[0]} is no setting of a solve; docs/cli.md names them")
    return RunConfig(**settings, modes=(mode,))


def lengths(own: Resolved, most: int) -> dict[str, int]:
    """Budgets under which no phase of a node writes more than ``most`` tokens."""
    found = {name: min(most, getattr(own, name) or most) for name in BUDGETS}
    return found | {"direct_max_tokens": most}


def cut(text: str, *stops: str) -> str:
    """``text`` up to the first of the strings."""
    places = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text

"""A model's own tokenizer, without its weights."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrm_engine.errors import RrmError
from rrm_engine.loading.checkpoint import EMBEDDED, SMALL_FILES, find
from rrm_engine.loading.hub import download

NEW = "give --tokenizer, a hub id or a directory, or --continue-by turn"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What the small files of a model say. ``eos_ids`` are the end-of-sequence tokens of its generation config."""

    tokenizer: Any
    eos_ids: frozenset[int]
    model_type: str


def read_model_files(name: str) -> ModelFiles:
    """The tokenizer of ``name``, ``embedded``, a directory or a hub id. Raises RrmError."""
    from transformers import AutoTokenizer

    folder = _folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # what it raises is about what the files say
        raise RrmError(f"the tokenizer of {name} cannot be used ({_first_line(error)}): {NEW}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise RrmError(f"the tokenizer of {name} has no fast version: {NEW}")
    eos = _json(folder / "generation_config.json").get("eos_token_id", [])
    ids = eos if isinstance(eos, list) else [eos]
    kind = str(_json(folder / "config.json").get("model_type", ""))
    return ModelFiles(tokenizer, frozenset(one for one in ids if type(one) is int), kind)


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    if name == EMBEDDED:
        return find(name).folder
    if path.is_dir():
        return path
    if path.exists() or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise RrmError(f"there is no directory {name} with a tokenizer: {NEW}")
    try:
        return download(name, SMALL_FILES)
    except RrmError as error:
        raise RrmError(f"the tokenizer of {name}: it {error}; {NEW}") from error


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # not there, or not needed
        return {}
    return found if isinstance(found, dict) else {}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]

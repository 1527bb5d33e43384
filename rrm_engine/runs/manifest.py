"""run.json: what was asked of a run, what that came out as, and what it ran on."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rrm_engine.legible import legible
from rrm_engine.runs.errors import RunError
from rrm_engine.runs.typed import WrongShape, read_as

FORMAT = 1  # of the run directory
NAME = "run.json"
SHOWN = 3  # directories


@dataclass(frozen=True, slots=True)
class TaskSource:
    """The tasks, of which the first ``used`` of ``count`` are run; ``sha256`` is of the file they come from."""

    name: str
    source: str
    sha256: str
    count: int
    used: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Written by the bench before the first row, and again by every resume, which adds a session to ``resumed``.

    ``settings`` are a RunConfig as asked, ``resolved`` the same as it came out; ``solver`` is the solver's own account
    of the model and its memory; ``versions``, ``hardware`` and ``git`` are of the environment.
    """

    format: int
    started: str
    command: str
    seed: int
    tasks: TaskSource
    settings: dict[str, Any]
    resolved: dict[str, Any]
    solver: dict[str, Any]
    versions: dict[str, Any]
    hardware: dict[str, Any]
    git: dict[str, Any] | None
    resumed: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read_manifest(directory: Path) -> Manifest:
    """The run.json in ``directory``. Raises RunError, with one sentence, where there is none that can be used."""
    path = directory / NAME
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise RunError(f"{directory} {_instead(directory)}") from None
    except NotADirectoryError:
        raise RunError(f"{directory} is not a directory; {_pass(directory.parent)}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise RunError(f"{path} was written by another version")
    try:
        manifest: Manifest = read_as(Manifest, value, "it")
    except WrongShape as error:
        raise RunError(f"{path} was written by another version: {error}") from None
    return manifest


def _instead(directory: Path) -> str:
    """What there is where no run.json is."""
    if not directory.is_dir():
        return "is not a directory"
    rows = directory / "rows.jsonl"
    if rows.is_file() and not rows.stat().st_size:
        return f"holds no {NAME} yet: its run is about to begin, or was ended before it did"
    return f"holds no {NAME}; {_pass(directory)}"


def _pass(directory: Path) -> str:
    """What to name instead of a directory that is not a run's, or a file in this one."""
    below = [directory, *(sorted(directory.iterdir()) if os.access(directory, os.R_OK | os.X_OK) else ())]
    found = [legible(path) for path in below if (path / NAME).is_file()]
    more = " and others" if len(found) > SHOWN else ""
    which = f": {', '.join(found[:SHOWN])}{more}" if found else ""
    return f"pass the directory of a recorded run{which}"

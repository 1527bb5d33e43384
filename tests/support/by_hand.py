"""What tests write into run directories by themselves. Imports little: processes that are killed early need it too."""

from types import NoneType
from typing import Any, cast

from rrm_engine.runs.manifest import FORMAT, Manifest, TaskSource
from rrm_engine.runs.rows import Fields, Row
from rrm_engine.runs.typed import _kinds


def manifest(source: str = "t.jsonl", **resolved: Any) -> Manifest:
    tasks = TaskSource("t", source, "0" * 64, 1, 1)
    about: dict[str, Any] = {"settings": {}, "solver": {}, "versions": {}, "hardware": {}, "git": None}
    return Manifest(format=FORMAT, started="", command="", seed=0, tasks=tasks, resolved=resolved, **about)


def row(id: str, mode: str, answer: str = "", sample: int = 0) -> Row:
    """A row with a zero or nothing in every other field that a row must have."""
    kinds = {name: _kinds(Fields)[name].types for name in sorted(Fields.__required_keys__)}
    empty = {name: None if NoneType in types else next(iter(types))() for name, types in kinds.items()}
    return cast(Row, {**empty, "id": id, "mode": mode, "sample": sample, "answer": answer})

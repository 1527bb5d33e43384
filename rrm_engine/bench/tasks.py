"""Task sets: packaged ones, files of the user's, and AIME from the Hugging Face hub."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from rrm_engine.bench.readers import SUFFIXES, Record, TaskError, read_file, read_jsonl

PROBLEM_FIELDS = ("problem", "question", "task", "prompt")
ANSWER_FIELDS = ("answer", "expected")
PACKAGED_SUFFIX = "_tasks.jsonl"
HUB_SETS = {"aime-2024": "HuggingFaceH4/aime_2024", "aime-2025": "math-ai/aime25"}


@dataclass(frozen=True, slots=True)
class Task:
    """One problem. Without an expected answer its rows are not graded."""

    id: str
    problem: str
    expected: str | None = None


@dataclass(frozen=True, slots=True)
class TaskSet:
    """``source`` finds the same set again: a packaged or hub name, or an absolute path."""

    name: str
    source: str
    tasks: tuple[Task, ...]

    @property
    def sha256(self) -> str:
        """Over ids, problems and answers, so that it does not depend on the file's format or layout."""
        canonical = json.dumps([asdict(task) for task in self.tasks], ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()


def load_tasks(spec: str) -> TaskSet:
    """The task set that ``spec`` names; raises TaskError with one sentence."""
    packaged = packaged_sets()
    if spec in packaged:
        text = packaged[spec].read_text(encoding="utf-8")
        return TaskSet(spec, spec, build_tasks(read_jsonl(text, packaged[spec].name), spec))
    if spec in HUB_SETS:
        return TaskSet(spec, spec, _hub_tasks(spec))
    path = Path(spec).expanduser()
    if not path.exists():
        raise TaskError(
            f"There is no task set or file named {spec!r}; pass one of {', '.join([*packaged, *HUB_SETS])}, "
            f"or a file that ends in {', '.join(SUFFIXES)}"
        )
    if path.is_dir():
        raise TaskError(f"{spec} is a directory; pass a file in it that ends in {', '.join(SUFFIXES)}")
    return TaskSet(path.stem, str(path.resolve()), build_tasks(read_file(path), spec))


def packaged_sets() -> dict[str, Traversable]:
    """The task sets that ship with the package, by name."""
    files = sorted(resources.files("rrm_engine.data").iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(PACKAGED_SUFFIX): file for file in files if file.name.endswith(PACKAGED_SUFFIX)}


def build_tasks(records: Iterable[Record], source: str) -> tuple[Task, ...]:
    """Tasks from records; raises TaskError at the first one that is no task, and at duplicate ids."""
    tasks: dict[str, Task] = {}
    places: dict[str, str] = {}
    for record in records:
        task = _task(record, source)
        if task.id in tasks:
            raise TaskError(
                f"{source}: the id {task.id!r} stands at {places[task.id]} and at {record.place}; "
                "give every task its own id, or leave the ids out"
            )
        tasks[task.id] = task
        places[task.id] = record.place
    if not tasks:
        raise TaskError(f"{source} holds no tasks; give it at least one with a field 'problem'")
    return tuple(tasks.values())


def _task(record: Record, source: str) -> Task:
    values = {str(name).strip().lower(): value for name, value in record.values.items()}
    where = f"{source}, {record.place}"
    problem_field = next((name for name in PROBLEM_FIELDS if name in values), None)
    if problem_field is None:
        raise TaskError(f"{where}: no problem text; name its field one of {', '.join(PROBLEM_FIELDS)}")
    problem = values[problem_field]
    if not isinstance(problem, str) or not problem.strip():
        raise TaskError(f"{where}: {problem_field!r} is not a text; put the problem's wording there")
    answer = next((values[name] for name in ANSWER_FIELDS if values.get(name) is not None), None)
    task_id = _scalar(values.get("id"), f"{where}: 'id'")
    return Task(
        id=task_id or record.place.replace(" ", "-"),
        problem=problem.strip(),
        expected=_scalar(answer, f"{where}: the answer"),
    )


def _scalar(value: Any, what: str) -> str | None:
    """A cell as text; whole floats, which tables make of whole numbers, lose their ``.0``."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TaskError(f"{what} is neither a text nor a number; write it as one")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def _hub_tasks(name: str) -> tuple[Task, ...]:
    """A set from the hub, or from its local cache."""
    repository = HUB_SETS[name]
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(repository, repo_type="dataset", allow_patterns=["*.jsonl", "*.parquet"])
    except Exception as error:  # the hub client raises its own, httpx's and the system's errors
        raise TaskError(
            f"{name} could not be fetched from the Hugging Face hub ({type(error).__name__}); pass a file "
            'instead, such as aime.jsonl with one {"id": ..., "problem": ..., "answer": ...} per line'
        ) from None
    files = sorted(Path(folder).rglob("*.jsonl")) or sorted(Path(folder).rglob("*.parquet"))
    return build_tasks((record for file in files for record in read_file(file)), name)

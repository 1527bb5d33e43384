"""Task sets: packaged ones, files of the user's, and AIME from the Hugging Face hub."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from decimal import Decimal
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from rrm_engine.bench.readers import SUFFIXES, Fields, Record, TaskError, read_file, read_jsonl
from rrm_engine.errors import RrmError
from rrm_engine.legible import legible, legible_key
from rrm_engine.loading.hub import download
from rrm_engine.protocol.final import extract_final

ID_FIELD = "id"
PROBLEM_FIELDS = ("problem", "question", "task", "prompt")
ANSWER_FIELDS = ("answer", "expected", "expected_answer", "final_answer", "ground_truth")
SOLUTION_FIELD = "solution"  # its \boxed{...} is the answer where there is no answer field
FIELDS = frozenset({ID_FIELD, *PROBLEM_FIELDS, *ANSWER_FIELDS, SOLUTION_FIELD})
MISSING = ("", "nan", "<na>", "nat")  # as table programs write it
GSM8K_MARK = "####"  # stands before the number at the end of GSM8K's answers
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

    def chosen(self, limit: int | None = None, shard: str | None = None) -> tuple[Task, ...]:
        """The first ``limit`` tasks, and of them the share that ``shard``, an ``I/N``, names. Raises RrmError if none.

        Neighbours go to different shares, for tasks are often in the order of how hard they are.
        """
        first, count = map(int, (shard or "1/1").split("/"))
        found = self.tasks[:limit][first - 1 :: count]
        if not found and shard:
            raise RrmError(f"--shard {shard}: no task is left for it of {len(self.tasks[:limit]):,}")
        return found

    def ungraded(self, limit: int | None = None, shard: str | None = None) -> str:
        """A sentence on those of the ``chosen`` tasks that have no answer to grade against; "" if all have one."""
        chosen = self.chosen(limit, shard)
        without = [task.id for task in chosen if task.expected is None]
        if not without:
            return ""
        some = ", ".join(legible(name, 40) for name in without[:3]) + (" ..." if len(without) > 3 else "")
        return f"{len(without):,} of {len(chosen):,} tasks have no answer, or NaN for one, and are not graded: {some}"

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
    path = _path(spec)
    if path is None:
        raise TaskError(
            f"There is no task set or file named '{legible(spec)}'; pass one of {', '.join([*packaged, *HUB_SETS])}, "
            f"or a file that ends in {', '.join(SUFFIXES)}"
        )
    if path.is_dir():
        raise TaskError(f"{spec} is a directory; pass a file in it that ends in {', '.join(SUFFIXES)}")
    return TaskSet(path.stem, str(path.resolve()), build_tasks(read_file(path, FIELDS), spec))


def _path(spec: str) -> Path | None:
    """The file that ``spec`` names, if there is one."""
    try:
        path = Path(spec).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long a name, no home directory, a NUL
        return None


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
                f"{source}: the id '{legible_key(task.id)}' stands at {places[task.id]} and at {record.place}; "
                "give every task its own id, or leave the ids out"
            )
        tasks[task.id] = task
        places[task.id] = record.place
    if not tasks:
        raise TaskError(f"{source} holds no tasks; give it at least one with a field 'problem'")
    return tuple(tasks.values())


def _task(record: Record, source: str) -> Task:
    where = f"{source}, {record.place}"
    values = _known_fields(record, where)
    problem_field = next((name for name in PROBLEM_FIELDS if values.get(name) is not None), None)
    if problem_field is None:
        raise TaskError(f"{where}: no problem text; name its field one of {', '.join(PROBLEM_FIELDS)}")
    problem = values[problem_field]
    if not isinstance(problem, str) or not problem.strip():
        raise TaskError(f"{where}: {problem_field!r} is not a text; put the problem's wording there")
    task_id = _scalar(values.get(ID_FIELD), f"{where}: {ID_FIELD!r}")
    return Task(
        id=task_id or record.place.replace(" ", "-"),
        problem=_whole_characters(problem.strip(), f"{where}: {problem_field!r}"),
        expected=_expected(values, where),
    )


def _known_fields(record: Record, where: str) -> dict[str, Any]:
    """Its fields that a task has, by their names in lower case."""
    values: dict[str, Any] = {}
    for name, value in record.fields:
        known = name.strip().lower()
        if known not in FIELDS:
            continue
        if known in values:
            raise TaskError(f"{where}: there are two fields {known!r}; remove or rename one of them")
        values[known] = value
    return values


def _expected(values: dict[str, Any], where: str) -> str | None:
    """The answer; of a worked solution, what it comes to."""
    for name in ANSWER_FIELDS:
        answer = _scalar(values.get(name), f"{where}: the answer")
        if answer is not None:
            if GSM8K_MARK in answer:
                return answer.rpartition(GSM8K_MARK)[2].strip() or None
            return (extract_final(answer) if "\\boxed" in answer else None) or answer
    solution = values.get(SOLUTION_FIELD)
    return extract_final(_whole_characters(solution, f"{where}: the solution")) if isinstance(solution, str) else None


def _scalar(value: Any, what: str) -> str | None:
    """A cell as text, None where there is nothing in it; whole numbers, whatever their type, have no ``.0``."""
    if isinstance(value, list) and not isinstance(value, Fields) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        value = Decimal(repr(value))
    if isinstance(value, Decimal):
        value = _digits(value)
    if value is None:
        return None
    if not isinstance(value, str | int):
        raise TaskError(f"{what} is neither a text nor a number; write it as one")
    text = _whole_characters(str(value), what).strip()
    return None if text.lower() in MISSING else text


def _digits(number: Decimal) -> str | None:
    """A number as people write it: ``204``, ``0.5``, ``1.5e-30``; None if it is none."""
    if not number.is_finite():
        return None
    if abs(number.adjusted()) > 20:
        return f"{number:e}"
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _whole_characters(text: str, what: str) -> str:
    """``text``, if it can be encoded: half of a surrogate pair cannot, and no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TaskError(
            f"{what} holds \\u{ord(text[error.start]):04x}, half of a surrogate pair; write the character whole"
        ) from None
    return text


def _hub_tasks(name: str) -> tuple[Task, ...]:
    """A set from the hub, or from its local cache."""
    try:
        folder = download(HUB_SETS[name], ["*.jsonl", "*.parquet"], "dataset")
    except RrmError as error:
        raise TaskError(
            f"{name}: {HUB_SETS[name]} {error}; pass a file instead, such as aime.jsonl with one "
            '{"id": ..., "problem": ..., "answer": ...} per line'
        ) from None
    files = sorted(folder.rglob("*.jsonl")) or sorted(folder.rglob("*.parquet"))
    return build_tasks((record for file in files for record in read_file(file, FIELDS)), name)

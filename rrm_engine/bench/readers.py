"""Records out of JSONL, JSON, CSV and Parquet files, each with the place it came from."""

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rrm_engine.errors import RrmError


class TaskError(RrmError):
    """A task set cannot be read; the message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a file. ``place`` reads like ``line 3`` or ``item 3``."""

    place: str
    values: dict[str, Any]


def read_jsonl(text: str, source: str) -> Iterator[Record]:
    """One JSON object per line; blank lines are skipped."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskError(
                f"{source}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
                "a .jsonl file holds one JSON object per line"
            ) from None
        yield _record(value, f"line {number}", source)


def read_json(text: str, source: str) -> Iterator[Record]:
    """A JSON list of objects."""
    try:
        items = json.loads(text)
    except json.JSONDecodeError as error:
        raise TaskError(
            f"{source}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}); "
            "a .json file holds one list of objects (one object per line is .jsonl)"
        ) from None
    if not isinstance(items, list):
        raise TaskError(f"{source}: the top level is not a list; wrap the tasks in [ ]")
    for number, value in enumerate(items, start=1):
        yield _record(value, f"item {number}", source)


def read_csv(text: str, source: str) -> Iterator[Record]:
    """A header line, then one task per record; quoted cells may span lines."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    start = 2
    try:
        for cells in reader:
            place, start = f"line {start}", reader.line_num + 1
            if None in cells or None in cells.values():
                raise TaskError(
                    f"{source}, {place}: the number of cells differs from the header's; "
                    "quote cells that hold commas or line breaks"
                )
            yield Record(place, dict(cells))
    except csv.Error as error:
        raise TaskError(f"{source}, line {reader.line_num}: not valid CSV ({error}); check its quotes") from None


def read_parquet(path: Path) -> Iterator[Record]:
    """The rows of a Parquet file."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise TaskError(
            f"{path}: reading Parquet needs pyarrow; install it with: pip install rrm-engine[parquet]"
        ) from None
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise TaskError(f"{path}: not a readable Parquet file ({_first_line(error)})") from None
    for number, values in enumerate(rows, start=1):
        yield Record(f"row {number}", values)


TEXT_READERS: dict[str, Callable[[str, str], Iterator[Record]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
}
SUFFIXES = (*TEXT_READERS, ".parquet")


def read_file(path: Path) -> list[Record]:
    """The records of ``path``, read by its suffix."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise TaskError(f"{path}: unknown kind of file; pass one that ends in {', '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            return list(read_parquet(path))
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise TaskError(f"{path}: cannot be read ({error.strerror})") from None
    return list(TEXT_READERS[suffix](text, str(path)))


def _record(value: object, place: str, source: str) -> Record:
    if not isinstance(value, dict):
        raise TaskError(f'{source}, {place}: not a JSON object; write it as {{"problem": "...", "answer": "..."}}')
    return Record(place, value)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

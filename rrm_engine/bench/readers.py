"""Records out of JSONL, JSON, CSV and Parquet files, each with the place it came from."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from rrm_engine.errors import RrmError

MOST_DIGITS = 4000  # that are converted to an int; Python refuses 4,300
DELIMITERS = ",\t;|"
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
GZIP = ".gz"


class TaskError(RrmError):
    """A task set cannot be read; the message is one sentence for the user."""


class Fields(list[tuple[str, Any]]):
    """A JSON object, or a row of a table, as pairs: a name may stand there twice."""


@dataclass(frozen=True, slots=True)
class Record:
    """One entry of a file. ``place`` reads like ``line 3`` or ``item 3``."""

    place: str
    fields: Fields


def read_jsonl(text: str, source: str) -> Iterator[Record]:
    """One JSON object per line; blank lines are skipped."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = _from_json(line, f"{source}, line {number}")
        except json.JSONDecodeError as error:
            raise TaskError(
                f"{source}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
                "a .jsonl file holds one JSON object per line"
            ) from None
        yield _record(value, f"line {number}", source)


def read_json(text: str, source: str) -> Iterator[Record]:
    """A JSON list of objects."""
    if not text.strip():
        return
    try:
        items = _from_json(text, source)
    except json.JSONDecodeError as error:
        raise TaskError(
            f"{source}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}); "
            "a .json file holds one list of objects (one object per line is .jsonl)"
        ) from None
    if not isinstance(items, list) or isinstance(items, Fields):
        raise TaskError(f"{source}: the top level is not a list; wrap the tasks in [ ]")
    for number, value in enumerate(items, start=1):
        yield _record(value, f"item {number}", source)


def read_csv(text: str, source: str) -> Iterator[Record]:
    """A header line, then one task per record; quoted cells may span lines.

    Cells are separated by whatever of comma, tab, semicolon and bar stands most often in the header.
    """
    header = text.lstrip("\r\n").split("\n", 1)[0]
    delimiter = max(DELIMITERS, key=header.count)
    with _any_length_of_cell():
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        names: list[str] | None = None
        begins = 1
        try:
            for cells in rows:
                place, begins = f"line {begins}", rows.line_num + 1
                if not cells:
                    continue
                if names is None:
                    names = cells
                elif len(cells) != len(names):
                    raise TaskError(
                        f"{source}, {place}: the number of cells ({len(cells)}) differs from the header's "
                        f"({len(names)}); quote cells that hold {_name_of(delimiter)} or line breaks"
                    )
                else:
                    yield Record(place, Fields(zip(names, map(_finite, cells), strict=True)))
        except csv.Error as error:
            raise TaskError(f"{source}, line {rows.line_num}: not valid CSV ({error}); check its quotes") from None


def read_parquet(path: Path, wanted: frozenset[str] = frozenset()) -> Iterator[Record]:
    """The rows of a Parquet file; of its columns those whose names, in any case, are among ``wanted`` (none: all)."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise TaskError(
            f"{path}: reading Parquet needs pyarrow; install it with: pip install rrm-engine[parquet]"
        ) from None
    try:
        with path.open("rb") as file:
            table = parquet.ParquetFile(file).read()
        chosen = [i for i, name in enumerate(table.column_names) if not wanted or name.strip().lower() in wanted]
        names = [table.column_names[i] for i in chosen]
        columns = [table.column(i).to_pylist() for i in chosen]
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise TaskError(f"{path}: not a readable Parquet file ({_first_line(error)})") from None
    for number in range(table.num_rows):
        yield Record(
            f"row {number + 1}", Fields((name, column[number]) for name, column in zip(names, columns, strict=True))
        )


TEXT_READERS: dict[str, Callable[[str, str], Iterator[Record]]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
}
SUFFIXES = (*TEXT_READERS, ".parquet")


def read_file(path: Path, wanted: frozenset[str] = frozenset()) -> list[Record]:
    """The records of ``path``, read by its suffix; a text file may be gzipped (``.jsonl.gz``).

    ``wanted``: the fields that are needed; others are not read where that saves time or trouble.
    """
    packed = path.suffix.lower() == GZIP
    suffix = Path(path.stem if packed else path.name).suffix.lower()
    if suffix not in SUFFIXES or (packed and suffix == ".parquet"):
        raise TaskError(
            f"{path}: unknown kind of file; pass one that ends in {', '.join(SUFFIXES)}, a text file also with {GZIP}"
        )
    try:
        if suffix == ".parquet":
            return list(read_parquet(path, wanted))
        data = path.read_bytes()
        text = _text(gzip.decompress(data) if packed else data, path)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TaskError(f"{path}: not a whole gzip file ({_first_line(error)})") from None
    except OSError as error:
        raise TaskError(f"{path}: cannot be read ({error.strerror or error})") from None
    return list(TEXT_READERS[suffix](text, str(path)))


def _text(data: bytes, path: Path) -> str:
    """UTF-8, or UTF-16 that says so by a byte order mark."""
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise TaskError(f"{path}, line {line}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _from_json(text: str, where: str) -> Any:
    """Numbers keep all their digits; objects are Fields."""
    try:
        return json.loads(text, parse_int=_whole, parse_float=_decimal, object_pairs_hook=Fields)
    except RecursionError:
        raise TaskError(f"{where}: nested too deeply to be read; leave out what is no problem or answer") from None


def _whole(digits: str) -> int | str:
    return int(digits) if len(digits) <= MOST_DIGITS else digits


def _decimal(text: str) -> Decimal | str:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent beyond all bounds
        return text


def _finite(cell: str) -> str | None:
    """A cell, None where a table program wrote an infinite number."""
    return None if cell.strip().lower() in ("inf", "-inf") else cell


def _name_of(delimiter: str) -> str:
    return {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}[delimiter]


class _any_length_of_cell:
    """The csv module's limit of 131,072 characters, which is the process's, lifted for the block."""

    def __enter__(self) -> None:
        self._before = csv.field_size_limit(2**31 - 1)

    def __exit__(self, *_: object) -> None:
        csv.field_size_limit(self._before)


def _record(value: object, place: str, source: str) -> Record:
    if not isinstance(value, Fields):
        raise TaskError(f'{source}, {place}: not a JSON object; write it as {{"problem": "...", "answer": "..."}}')
    return Record(place, value)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]

"""The run directory: run.json, rows.jsonl, trace.jsonl and summary.json.

A row is on the disk as soon as it is there: rows.jsonl is written by one ``write`` and one ``fsync`` a row. What a
killed process left half-written is cut when the directory is opened again. Events are buffered, and flushed twice a
second and before every row, so that they can be followed and no row lacks any of its events. An event belongs to a row
if job and session agree, for a job that was interrupted runs again.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from time import monotonic, sleep
from typing import Any, BinaryIO, TextIO

from rrm_engine.legible import legible_key
from rrm_engine.runs.errors import RunError
from rrm_engine.runs.manifest import NAME, Manifest, read_manifest
from rrm_engine.runs.rows import Row, read_row, row_key
from rrm_engine.runs.typed import WrongShape

FILES = ("rows.jsonl", "trace.jsonl", "run.json.tmp")  # that are there before the run.json is
SUMMARY = "summary.json"
OWN = (*FILES, NAME, SUMMARY)
ERRORS = "errors.log"  # tracebacks, if there are any
# Half of a surrogate pair, which no encoding has, is written as JSON's escape of it.
ESCAPED = "backslashreplace"
TRACE_BUFFER = 1 << 20
FLUSH_S = 0.5  # how long an event may stay in the buffer
TAIL_READ = 1 << 16
LOOK_S = 0.05  # far longer than a look at the lock takes


class RunDirError(RunError):
    """A run directory cannot be used; the message is one sentence for the user."""


class RunDir:
    """An open run directory, locked against a second process.

    ``manifest`` is there once it was written or read. ``rows`` are those on disk, ``session`` counts the openings
    (0: the run's first), ``cut`` the half-written lines that opening it removed. One thread may add rows while another
    writes events.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest
        self.rows: list[Row] = []
        self.session = 0
        self.cut = 0
        self._made = False
        self._rows_fd = -1
        self._trace: TextIO | None = None
        self._trace_lock = Lock()
        self._flushed_at = monotonic()

    @classmethod
    def create(cls, path: Path) -> "RunDir":
        """A new run in an empty or not yet existing directory, or in one that a run left before its run.json."""
        if path.exists() and not path.is_dir():
            raise RunDirError(f"{path} is a file; pass another directory to --out")
        with _saying(f"{path} cannot be written"):
            made = not path.exists()
            path.mkdir(parents=True, exist_ok=True)
        _refuse_used(path)
        directory = cls(path)
        directory._made = made
        directory._open()
        try:
            _refuse_used(path)  # again, now that no other process is in it
        except RunDirError:
            directory.close()
            raise
        return directory

    @classmethod
    def resume(cls, path: Path) -> "RunDir":
        """The run in ``path``, with what a killed process left half-written cut off."""
        if not (path / NAME).exists():
            advice = f"; start one in it by --out {path}" if path.is_dir() and _is_unused(path) else ""
            raise RunDirError(f"{path} holds no {NAME}, so there is no run to resume in it{advice}")
        directory = cls(path)
        directory.manifest = read_manifest(path)
        directory.session = 1 + len(directory.manifest.resumed)
        directory._open()
        with _saying(f"{path} cannot be read"):
            directory._load()
        return directory

    def write_manifest(self, manifest: Manifest) -> None:
        """Write run.json as a whole."""
        self.manifest = manifest
        self._replace(NAME, manifest.as_json())

    def add(self, row: Row) -> None:
        """Append a row, and do not return before it is on the disk."""
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode(errors=ESCAPED)
        self.flush()
        with _saying(f"{self.path / 'rows.jsonl'} cannot be written"):
            size = os.fstat(self._rows_fd).st_size
            try:
                written = 0
                while written < len(data):
                    written += os.write(self._rows_fd, data[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._rows_fd, size)
                raise
            os.fsync(self._rows_fd)
            self.rows.append(row)

    def event(self, event: dict[str, Any]) -> None:
        """Append an event to trace.jsonl. It is on the disk at the latest with the next row, the next event that comes
        half a second later, or ``flush``.
        """
        if self._trace is not None:
            line = json.dumps({**event, "session": self.session}, ensure_ascii=False)
            with _saying(f"{self.path / 'trace.jsonl'} cannot be written"), self._trace_lock:
                self._trace.write(line + "\n")
                if monotonic() - self._flushed_at > FLUSH_S:
                    self._flush()

    def flush(self) -> None:
        """Put the events on the disk that are not there yet."""
        if self._trace is not None:
            with _saying(f"{self.path / 'trace.jsonl'} cannot be written"), self._trace_lock:
                self._flush()

    def _flush(self) -> None:
        if self._trace is not None:
            self._trace.flush()
            self._flushed_at = monotonic()

    def log_error(self, about: str, text: str) -> None:
        """Append a traceback to errors.log; a disk that is full costs no more than that."""
        with contextlib.suppress(OSError), (self.path / ERRORS).open("a", encoding="utf-8", errors=ESCAPED) as file:
            file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {about}\n{text.rstrip()}\n\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json as a whole."""
        self._replace(SUMMARY, summary)

    def close(self) -> None:
        """Flush the events and let the directory go."""
        trace, self._trace = self._trace, None
        fd, self._rows_fd = self._rows_fd, -1
        try:
            if trace is not None:
                with _saying(f"{self.path / 'trace.jsonl'} cannot be written"):
                    trace.close()
        finally:
            if fd >= 0:
                os.close(fd)

    def discard(self) -> None:
        """Close, and remove what ``create`` made, if the run never began."""
        self.close()
        if not self.rows and not (self.path / NAME).exists():
            for name in FILES:
                (self.path / name).unlink(missing_ok=True)
            if self._made:
                with contextlib.suppress(OSError):
                    self.path.rmdir()

    def _open(self) -> None:
        with _saying(f"{self.path} cannot be written"):
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            self._rows_fd = os.open(self.path / "rows.jsonl", flags, 0o644)
            self._lock()
            self._trace = (self.path / "trace.jsonl").open(
                "a", encoding="utf-8", errors=ESCAPED, buffering=TRACE_BUFFER
            )

    def _lock(self) -> None:
        """Two processes on one directory would double rows. The lock goes with the process."""
        for last in (False, False, False, True):
            if _locks(self._rows_fd, shared=False) is not False:
                return
            if not last:
                sleep(LOOK_S)  # it may be a reader that looks whether there is a writer
        self.close()
        raise RunDirError(f"Another process is writing to {self.path}; wait for it or stop it")

    def _load(self) -> None:
        path = self.path / "rows.jsonl"
        self.cut = int(mend_tail(path))
        mend_tail(self.path / "trace.jsonl")
        lines = path.read_bytes().splitlines()
        self.rows = [_row(line, path, number) for number, line in enumerate(lines, start=1)]
        _check_unique(self.rows, path)

    def _replace(self, name: str, value: dict[str, Any]) -> None:
        path = self.path / name
        draft = path.with_suffix(".json.tmp")
        with _saying(f"{path} cannot be written"):
            try:
                with draft.open("w", encoding="utf-8", errors=ESCAPED) as file:
                    json.dump(value, file, ensure_ascii=False, indent=2)
                    file.write("\n")
                    file.flush()
                    os.fsync(file.fileno())
                draft.replace(path)
            except OSError:
                draft.unlink(missing_ok=True)
                raise


def is_written(path: Path) -> bool:
    """Whether a process has the run open, as far as the file system tells: if it has no locks, one is assumed."""
    try:
        with (path / "rows.jsonl").open("rb") as file:
            return _locks(file.fileno(), shared=True) is not True
    except OSError:
        return True


def _locks(fd: int, shared: bool) -> bool | None:
    """Take a lock, which goes with the file: False if another process has it, None where there are none."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _is_unused(path: Path) -> bool:
    """Whether nothing is lost by a new run in the directory: a run killed while its model loads leaves empty files."""
    with _saying(f"{path} cannot be read"):
        found = {entry.name: entry.stat().st_size for entry in path.iterdir()}
    return found.keys() <= set(FILES) and not found.get("rows.jsonl") and not found.get("trace.jsonl")


def _refuse_used(path: Path) -> None:
    if not _is_unused(path):
        raise RunDirError(
            f"{path} is not empty; pass another directory to --out, or go on with the run in it by --resume"
        )


def mend_tail(path: Path) -> bool:
    """Make ``path`` end in a whole line of JSON; True if something half-written had to be cut off."""
    with path.open("r+b") as file:
        tail = _last_line(file)
        if not tail or (tail.endswith(b"\n") and _parse(tail) is not None):
            return False
        whole = _parse(tail) is not None  # only its line break is missing
        if whole:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:  # cut short by a kill, or, after a power cut, a line whose data never arrived
            file.truncate(file.seek(0, os.SEEK_END) - len(tail))
        file.flush()
        os.fsync(file.fileno())
        return not whole


def _last_line(file: BinaryIO) -> bytes:
    """The last line, read from the end, for a trace can be large."""
    size, reach = file.seek(0, os.SEEK_END), TAIL_READ
    while True:
        start = file.seek(max(0, size - reach))
        tail = file.read()
        cut = tail.rfind(b"\n", 0, len(tail) - 1)
        if cut >= 0 or start == 0:
            return tail[cut + 1 :]
        reach *= 4


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _row(line: bytes, path: Path, number: int) -> Row:
    try:
        if (value := _parse(line)) is not None:
            return read_row(value)
        what = "not a row"
    except WrongShape as error:
        what = str(error)
    raise RunDirError(f"{path}, line {number}: {what}; mend or remove the line, then resume again")


def _check_unique(rows: list[Row], path: Path) -> None:
    seen: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        first = seen.setdefault(row_key(row), number)
        if first != number:
            raise RunDirError(
                f"{path}: lines {first} and {number} are both {legible_key(row_key(row))}; remove one of them"
            )


@contextlib.contextmanager
def _saying(what: str) -> Iterator[None]:
    """Turn an OSError into a sentence."""
    try:
        yield
    except OSError as error:
        raise RunDirError(f"{what}: {error.strerror or error}") from None


def check_output(path: Path | None, flag: str) -> None:
    """Raise RunDirError unless a file can be written to ``path``, which ``flag`` names, and is none of a run's own.

    To be asked before anything that takes long. None: nothing is to be written.
    """
    if path is None:
        return
    with _saying(f"{flag} {path} cannot be written"):
        if path.is_dir():
            raise RunDirError(f"{flag} {path} is a directory: name a file in it")
        if path.name in OWN and (path.parent / NAME).is_file():
            raise RunDirError(f"{flag} {path} is a file of the run in {path.parent}: name another one")
        if not path.parent.is_dir():
            raise RunDirError(f"{flag} {path} cannot be written: there is no directory {path.parent}; make it first")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise RunDirError(f"{flag} {path} cannot be written: you may not write there")


def check_output_folder(path: Path | None, flag: str) -> None:
    """As ``check_output``, for a directory that is made where it is not there."""
    if path is None:
        return
    with _saying(f"{flag} {path} cannot be written"):
        there = next(above for above in (path, *path.absolute().parents) if above.exists())
        if not there.is_dir():
            raise RunDirError(f"{flag} {path}: {there} is a file; pass another directory")
        if not os.access(there, os.W_OK | os.X_OK):
            raise RunDirError(f"{flag} {path} cannot be written: you may not write in {there}")

"""A run directory read back: the rows and the events of its jobs, and each job as a time line. The only reader of them.

``read_jobs`` gives every job as its lines stand in the files. ``read_run`` believes none whose events are not whole and
do not bear out its row (checks.py), ``timeline`` is the first half of that, for commands that draw tokens or run them
again.
"""

import gc
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrm_engine.legible import legible, legible_key
from rrm_engine.runs.checks import check_against_row, check_samples, check_whole
from rrm_engine.runs.errors import RunError
from rrm_engine.runs.events import Event, parse
from rrm_engine.runs.rows import Row, read_row, row_key
from rrm_engine.runs.timeline import Incomplete, JobTrace, follow_nodes
from rrm_engine.runs.typed import WrongShape

ROWS, TRACE = "rows.jsonl", "trace.jsonl"
SHOWN_KEYS = 6


@dataclass(frozen=True, slots=True)
class RecordedJob:
    """One job in one session: its events in the order of the file, and its row, None if it did not finish there."""

    key: str
    session: int
    events: list[Event]
    row: Row | None


@dataclass(slots=True)
class RunTrace:
    """The jobs of a run whose events are complete, and why others are not."""

    jobs: list[JobTrace] = field(default_factory=list)
    incomplete: dict[str, str] = field(default_factory=dict)


def read_run(directory: Path, keys: Collection[str] = (), *, tokens: bool = False) -> RunTrace:
    """Read the jobs named (``id/mode/sample``, or ``id``, or ``id/mode``; none: all). Raises RunError.

    Their transcripts lack the ids of their ``tokens``, which are most of a run's bytes, unless these are asked for.
    """
    run = RunTrace()
    for job in read_jobs(directory, keys, tokens=tokens):
        try:
            run.jobs.append(believed(job))
        except Incomplete as error:
            run.incomplete[job.key] = str(error)
    return run


def believed(job: RecordedJob) -> JobTrace:
    """The time line of a job whose events bear out its row. Raises Incomplete."""
    trace = timeline(job)
    check_against_row(trace)
    return trace


def timeline(job: RecordedJob) -> JobTrace:
    """The time line of a job of which no event is missing. Raises Incomplete."""
    if job.row is None:
        raise Incomplete("it has no row: the run broke off in it or is still going on")
    check_whole(job.events)
    trace = JobTrace(job.key, job.session, job.row, job.events)
    follow_nodes(trace)
    check_samples(trace)
    return trace


def read_jobs(
    directory: Path, keys: Collection[str] = (), *, tokens: bool = True, flag: str = "--jobs"
) -> list[RecordedJob]:
    """The jobs named as for ``read_run``, in the order they began; transcripts without ``tokens`` have no token ids.

    ``flag`` is where the user named them.
    A job that was interrupted and ran again in a later session is there once. Raises RunError.
    """
    with _nothing_collected():
        rows = {(row_key(row), row.get("session", 0)): row for row in read_rows(directory)}
        events: dict[tuple[str, int], list[Event]] = {}
        for session, event in read_events(directory, tokens=tokens):
            events.setdefault((event.job, session), []).append(event)
    finished, found = {key for key, _ in rows}, list(dict.fromkeys([*events, *rows]))
    chosen = chosen_jobs((key for key, _ in found), keys, flag)
    return [
        RecordedJob(key, session, events.get((key, session), []), rows.get((key, session)))
        for key, session in found
        if key in chosen and ((key, session) in rows or key not in finished)
    ]


def read_rows(directory: Path) -> Iterator[Row]:
    """The rows of a run. Raises RunError."""
    return _rows(directory / ROWS, Place())


def read_events(directory: Path, *, tokens: bool = True) -> Iterator[tuple[int, Event]]:
    """(session, event) for every event of a run. Raises RunError."""
    return _events(directory / TRACE, Place(), tokens)


@dataclass(slots=True)
class Place:
    """How far a file was read: lines, and bytes. ``follows``: a last line without its end is left for later."""

    line: int = 0
    byte: int = 0
    follows: bool = False


class Appended:
    """What is appended to a run's rows and events from one call to the next; the first call gives what is there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._rows, self._events = Place(follows=True), Place(follows=True)

    def rows(self) -> list[Row]:
        """Rows that are new. Raises RunError."""
        return list(_rows(self._directory / ROWS, self._rows))

    def events(self) -> list[Event]:
        """Events that are new, without token ids. Raises RunError."""
        return [event for _, event in _events(self._directory / TRACE, self._events, tokens=False)]


def _rows(path: Path, place: Place) -> Iterator[Row]:
    for value in _objects(path, place):
        try:
            yield read_row(value)
        except WrongShape as error:
            where = f"{path}, line {place.line}"
            raise RunError(f"{where}: {error}: another version wrote it, or it was changed") from None


def _events(path: Path, place: Place, tokens: bool) -> Iterator[tuple[int, Event]]:
    for value in _objects(path, place):
        session = value.pop("session", 0)
        if not tokens and "token_ids" in value:
            value["token_ids"] = []
        try:
            if type(session) is not int:
                raise WrongShape(f"the session is {legible(ascii(session))}, not a whole number")
            yield session, parse(value)
        except WrongShape as error:
            raise RunError(
                f"{path}, line {place.line}: {error}: another version recorded it, or it was changed; record the run "
                f"again"
            ) from None


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Without garbage collection: all that is read is kept, and the collector would go through it again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _objects(path: Path, place: Place) -> Iterator[dict[str, Any]]:
    """Objects of a JSONL file from ``place`` on, which moves with them; a last line that was cut short or is still
    being written is left out.

    Raises RunError if the file cannot be read, or a line is not an object.
    """
    try:
        with path.open("rb") as file:
            file.seek(place.byte)
            for line in file:
                if place.follows and not line.endswith(b"\n"):
                    return
                place.line, place.byte = place.line + 1, place.byte + len(line)
                try:
                    value = json.loads(line.decode())
                except (ValueError, RecursionError):
                    value = None
                if isinstance(value, dict):
                    yield value
                elif line.endswith(b"\n"):
                    raise RunError(f"{path}, line {place.line}: not what a run writes there")
    except FileNotFoundError:
        there = path.parent.is_dir()
        what = f"holds no {path.name}; pass the directory of a recorded run" if there else "is not a directory"
        raise RunError(f"{path.parent} {what}") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None


def chosen_jobs(known: Iterable[str], wanted: Collection[str], flag: str = "--jobs") -> set[str]:
    """The job keys named (as ``id/mode/sample``, ``id/mode`` or ``id``; none: all). Raises RunError."""
    known = dict.fromkeys(known)
    if not wanted:
        return set(known)
    named: dict[str, list[str]] = {}  # by every name of theirs, for there may be thousands of both
    for key in known:
        for end in (*(i for i, char in enumerate(key) if char == "/"), len(key)):
            named.setdefault(key[:end], []).append(key)
    for name in wanted:
        refuse_unknown(flag, name, "job", name.rstrip("/") in named, known)
    return {key for name in wanted for key in named[name.rstrip("/")]}


def is_named(key: str, wanted: Collection[str]) -> bool:
    """Whether a job is one of those named; none: all are."""
    return not wanted or any(key == name or key.startswith(name.rstrip("/") + "/") for name in wanted)


def refuse_unknown(flag: str, wanted: str, what: str, known: bool, there: Collection[str]) -> None:
    """Raise RunError, with some of the names there are, if a name given to ``flag`` is not known."""
    if not known:
        some = ", ".join(map(legible_key, list(there)[:SHOWN_KEYS])) + (" ..." if len(there) > SHOWN_KEYS else "")
        raise RunError(f"{flag} {legible(wanted)}: there is no such {what}; there are {some or 'none'}")

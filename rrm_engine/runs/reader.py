"""A run directory read back: the rows and the events of its jobs, and each job as a time line. The only reader of them.

``read_jobs`` gives every job as its lines stand in the files. ``read_run`` believes none whose events are not whole and
do not bear out its row (checks.py), ``timeline`` is the first half of that, for who draws or runs tokens again.
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


def read_run(directory: Path, keys: Collection[str] = ()) -> RunTrace:
    """Read the jobs named (``id/mode/sample``, or ``id``, or ``id/mode``; none: all). Raises RunError.

    Their transcripts lack the token ids, which are most of a run's bytes.
    """
    run = RunTrace()
    for job in read_jobs(directory, keys, tokens=False):
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


def read_jobs(directory: Path, keys: Collection[str] = (), *, tokens: bool = True) -> list[RecordedJob]:
    """The jobs named as for ``read_run``, in the order they began; transcripts without ``tokens`` have no token ids.

    A job that was interrupted and ran again in a later session is there once. Raises RunError.
    """
    with _nothing_collected():
        rows = {(row_key(row), row.get("session", 0)): row for row in read_rows(directory)}
        events: dict[tuple[str, int], list[Event]] = {}
        for session, event in read_events(directory, tokens=tokens):
            events.setdefault((event.job, session), []).append(event)
    finished, found = {key for key, _ in rows}, list(dict.fromkeys([*events, *rows]))
    chosen = chosen_jobs((key for key, _ in found), keys)
    return [
        RecordedJob(key, session, events.get((key, session), []), rows.get((key, session)))
        for key, session in found
        if key in chosen and ((key, session) in rows or key not in finished)
    ]


def read_rows(directory: Path) -> Iterator[Row]:
    """The rows of a run. Raises RunError."""
    path = directory / "rows.jsonl"
    for number, value in _objects(path):
        try:
            yield read_row(value)
        except WrongShape as error:
            raise RunError(f"{path}, line {number}: {error}: another version wrote it, or it was changed") from None


def read_events(directory: Path, *, tokens: bool = True) -> Iterator[tuple[int, Event]]:
    """(session, event) for every event of a run. Raises RunError."""
    path = directory / "trace.jsonl"
    for number, value in _objects(path):
        session = value.pop("session", 0)
        if not tokens and "token_ids" in value:
            value["token_ids"] = []
        try:
            yield session, parse(value)
        except WrongShape as error:
            raise RunError(
                f"{path}, line {number}: {error}: another version recorded it, or it was changed; record the run again"
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


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of a JSONL file; a last line that was cut short or is still being written is left out.

    Raises RunError if the file cannot be read, or a line is not an object.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    value = json.loads(line.decode())
                except ValueError:
                    value = None
                if isinstance(value, dict):
                    yield number, value
                elif line.endswith(b"\n"):
                    raise RunError(f"{path}, line {number}: not what a run writes there")
    except FileNotFoundError:
        raise RunError(f"{path.parent} holds no {path.name}; pass the directory of a recorded run") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror or error}") from None


def chosen_jobs(known: Iterable[str], wanted: Collection[str]) -> set[str]:
    """The job keys named (as ``id/mode/sample``, ``id/mode`` or ``id``; none: all). Raises RunError."""
    known = dict.fromkeys(known)
    chosen: set[str] = set()
    for name in wanted:
        found = {key for key in known if key == name or key.startswith(name.rstrip("/") + "/")}
        refuse_unknown("--jobs", name, "job", bool(found), known)
        chosen |= found
    return chosen if wanted else set(known)


def refuse_unknown(flag: str, wanted: str, what: str, known: bool, there: Collection[str]) -> None:
    """Raise RunError, with some of the names there are, if a name given to ``flag`` is not known."""
    if not known:
        some = ", ".join(map(legible_key, list(there)[:SHOWN_KEYS])) + (" ..." if len(there) > SHOWN_KEYS else "")
        raise RunError(f"{flag} {legible(wanted)}: there is no such {what}; there are {some or 'none'}")

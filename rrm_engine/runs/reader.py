"""A run directory read back: its jobs as time lines, and why some of them cannot be."""

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrm_engine.errors import RrmError
from rrm_engine.legible import legible, legible_key
from rrm_engine.runs.checks import build
from rrm_engine.runs.directory import row_key
from rrm_engine.runs.timeline import Event, Incomplete, JobTrace

BULKY = ("token_ids",)  # not needed here
OF_ROWS = {"id", "mode", "sample", "status", "latency_s"}
OF_EVENTS = {"t", "job", "node", "step", "event"}
SHOWN_KEYS = 6


class TraceError(RrmError):
    """The run cannot be read or exported; the message is one sentence for the user."""


@dataclass(slots=True)
class RunTrace:
    """The jobs of a run whose events are complete, and why others are not."""

    jobs: list[JobTrace] = field(default_factory=list)
    incomplete: dict[str, str] = field(default_factory=dict)


def read_run(directory: Path, keys: Collection[str] = ()) -> RunTrace:
    """Read the jobs named (``id/mode/sample``, or ``id``, or ``id/mode``; none: all). Raises TraceError."""
    rows = {(row_key(row), row.get("session", 0)): row for row in json_lines(directory / "rows.jsonl", OF_ROWS)}
    groups: dict[tuple[str, int], list[Event]] = {}
    for event in json_lines(directory / "trace.jsonl", OF_EVENTS):
        for name in BULKY:
            event.pop(name, None)
        groups.setdefault((event["job"], event.get("session", 0)), []).append(event)
    run, finished = RunTrace(), {key for key, _ in rows}
    for key, session in _chosen(list(dict.fromkeys([*groups, *rows])), keys):
        row = rows.get((key, session))
        if row is None and key in finished:
            continue  # it was interrupted, and ran again in a later session
        try:
            run.jobs.append(build(key, session, groups.get((key, session), []), row))
        except Incomplete as error:
            run.incomplete[key] = str(error)
    return run


def json_lines(path: Path, needed: set[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; a last line that was cut short or is still being written is left out.

    Raises TraceError if the file cannot be read, or a line is not an object with the keys that are needed.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    value = json.loads(line)
                except ValueError:
                    value = None
                if isinstance(value, dict) and needed <= value.keys():
                    yield value
                elif line.endswith(b"\n"):
                    raise TraceError(f"{path}, line {number}: not what a run writes there")
    except FileNotFoundError:
        raise TraceError(f"{path.parent} holds no {path.name}; pass the directory of a recorded run") from None
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror or error}") from None


def _chosen(found: list[tuple[str, int]], keys: Collection[str]) -> list[tuple[str, int]]:
    chosen = chosen_jobs([key for key, _ in found], keys)
    return [(key, session) for key, session in found if key in chosen]


def chosen_jobs(known: Iterable[str], wanted: Collection[str]) -> set[str]:
    """The job keys named (as ``id/mode/sample``, ``id/mode`` or ``id``; none: all). Raises TraceError."""
    known = dict.fromkeys(known)
    chosen: set[str] = set()
    for name in wanted:
        found = {key for key in known if key == name or key.startswith(name.rstrip("/") + "/")}
        refuse_unknown("--jobs", name, "job", bool(found), known)
        chosen |= found
    return chosen if wanted else set(known)


def refuse_unknown(flag: str, wanted: str, what: str, known: bool, there: Collection[str]) -> None:
    """Raise TraceError, with some of the names there are, if a name given to ``flag`` is not known."""
    if not known:
        some = ", ".join(map(legible_key, list(there)[:SHOWN_KEYS])) + (" ..." if len(there) > SHOWN_KEYS else "")
        raise TraceError(f"{flag} {legible(wanted)}: there is no such {what}; there are {some or 'none'}")

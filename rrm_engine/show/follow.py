"""A run as it goes on: a line for everything that happens in it."""

import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from rrm_engine.bench.progress import describe_row
from rrm_engine.legible import legible, legible_key, plural
from rrm_engine.runs.directory import is_written
from rrm_engine.runs.errors import RunError
from rrm_engine.runs.events import (
    Cancelled,
    Concluded,
    DidNotFit,
    Event,
    Finished,
    JobBegan,
    Paused,
    Resumed,
    Started,
    WroteAtomic,
    WroteAwait,
    WroteChild,
    WroteMalformed,
)
from rrm_engine.runs.manifest import NAME, Manifest, read_manifest
from rrm_engine.runs.reader import ROWS, Appended, is_named
from rrm_engine.runs.rows import row_key
from rrm_engine.runs.timeline import NAMES

PAUSE_S = 0.3
SILENT = ("await", "concluded", "cancelled", "eos")  # ends of a phase that another event tells of


class BrokenOff(RunError):
    """The run that was followed has ended early; the message is one sentence."""


def follow(directory: Path, wanted: str | None) -> Iterator[str]:
    """Lines about the job named, or about all, until every row of the run is there.

    A run that still loads its model is waited for.
    Raises BrokenOff if rows are missing and no process writes any, and RunError.
    """
    manifest, began = _manifest(directory), dict[str, float]()
    settings = manifest.settings
    missing = manifest.tasks.used * int(settings.get("samples", 1)) * len(settings.get("modes", ()))
    appended, keys = Appended(directory), [wanted] if wanted else []
    while True:
        goes_on = is_written(directory)  # before the last look: nothing comes after it
        rows = appended.rows()  # before the events: those of a row are on the disk before it
        for event in appended.events():
            if isinstance(event, JobBegan):
                began[event.job] = event.t
            line = happening(event)
            if line and is_named(event.job, keys):
                at = event.t - began.get(event.job, event.t)
                who = "" if isinstance(event, JobBegan | Finished) else f"{legible(event.node)} "
                yield f"{at:8.2f} s  {legible_key(event.job)}  {who}{line}"
        for row in rows:
            missing -= 1
            if is_named(row_key(row), keys):
                yield f"{'':10}  {describe_row(row)}"
        if missing <= 0:
            return
        if not goes_on:
            raise BrokenOff(
                f"{directory}: the run is over without its last {plural(missing, 'row')}: no process writes them any "
                f"more; python -m rrm_engine.bench --resume {shlex.quote(str(directory))} goes on with it"
            )
        time.sleep(PAUSE_S)


def _manifest(directory: Path) -> Manifest:
    """The run.json, as soon as there is one."""
    while True:
        loads = (directory / ROWS).is_file() and is_written(directory)  # before the look: nothing comes after it
        if (directory / NAME).exists() or not loads:
            return read_manifest(directory)
        time.sleep(PAUSE_S)


def happening(event: Event) -> str:
    """What is worth a line, in words; else nothing."""
    match event:
        case JobBegan():
            return f"begins: {legible(event.task)}"
        case Started():
            return f"starts to {NAMES.get(event.phase, event.phase)}: {legible(event.task)}"
        case Resumed():
            given = f" with {legible(', '.join(event.after))}" if event.after else ""
            return f"goes on to {NAMES.get(event.phase, event.phase)}{given}"
        case WroteChild(child=None):
            return f"declares {legible(event.id)}, " + (
                f"which is {legible(event.same_as)}" if event.same_as else "which is refused"
            )
        case WroteChild():
            return f"declares {legible(event.id)}: {legible(event.task)}"
        case WroteAwait():
            return f"waits for {legible(', '.join(event.children)) or 'its children'}"
        case WroteAtomic(answer=""):
            return "does not split"
        case WroteMalformed():
            return f"wrote what cannot be read: {legible(event.reason)}"
        case Paused() if event.reason not in SILENT:
            return f"is ended: {legible(event.reason)}"
        case DidNotFit():
            return f"is refused: {legible(event.reason)}"
        case Concluded():
            return f"concludes: {legible(event.answer)}" if event.ok else "concludes without an answer"
        case Cancelled():
            return f"is cancelled: {legible(event.reason)}"
        case Finished():
            return f"ends, {event.status}: {legible(event.answer)}"
    return ""

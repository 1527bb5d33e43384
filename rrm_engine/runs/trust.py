"""How far a row may be trusted to show what recursion gains: one label, marks beside it, and the reason in words.

The label of a recursive row is the first thing that keeps it from being a headline, in the order of `Label`. A mark
says what is true of the row besides, whatever its label: a spliced row is approximate, a cut one had less room than it
asked for, a repaired one was read more kindly than it was written.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from rrm_engine.legible import legible, plural
from rrm_engine.runs.rows import Row

DIRECT, RECURSIVE = "direct", "rrm"


class Label(StrEnum):
    """What a row counts as."""

    FAILED = "failed"  # an error or a cancellation: its time is no solve's
    UNTIMED = "untimed"
    INVALID = "invalid graph"
    FALLBACK = "fallback"  # a direct solve answered in the graph's place
    CONTROL = "control"  # it did not split: direct solving under another prompt
    UNGRADED = "ungraded"
    WRONG = "wrong"
    NO_OVERLAP = "no overlap"  # nodes ran one after another
    UNPAIRED = "unpaired"  # no direct solve that could be compared
    DIRECT_WRONG = "direct wrong"
    HEADLINE = "headline"
    DIRECT = "direct"  # what recursive rows are compared with


class Mark(StrEnum):
    """What is true of a row besides its label."""

    SPLICED = "spliced"
    CUT = "cut by a limit"
    REPAIRED = "repaired events"


@dataclass(frozen=True, slots=True)
class Trust:
    """A row's label, its marks, and why it has them, in words."""

    label: Label
    marks: tuple[Mark, ...]
    reason: str


def trust(row: Row, direct: Row | None = None, unlike: Sequence[str] = ()) -> Trust:
    """Judge a row; ``direct`` is the direct row of the same task and sample, if ``row`` is a recursive one, and
    ``unlike`` names what else it was run with that forbids a comparison, such as another model."""
    label, why = _of_direct(row) if row["mode"] == DIRECT else _of_recursive(row, direct, unlike)
    marks = {
        Mark.SPLICED: _spliced(row),
        Mark.CUT: _counted(row.get("cut"), "--"),
        Mark.REPAIRED: _counted(row.get("repairs")),
    }
    reasons = [why, *(f"{mark}: {about}" for mark, about in marks.items() if about)]
    return Trust(label, tuple(mark for mark, about in marks.items() if about), "; ".join(reasons))


def is_headline(direct: Row, recursive: Row, unlike: Sequence[str] = ()) -> bool:
    """Whether recursive solving did what it is for: see `rrm_engine.bench.summary`."""
    return trust(recursive, direct, unlike).label is Label.HEADLINE


def ran_to_end(row: Row) -> bool:
    """Whether the row's time is that of a whole run. A graph that came to nothing (``invalid``) is one."""
    return bool(row["status"] != "failed")


def has_time(row: Row) -> bool:
    """Whether it is a whole run that took measurable, finite time."""
    return ran_to_end(row) and math.isfinite(row["latency_s"]) and bool(row["latency_s"] > 0)


def _of_direct(row: Row) -> tuple[Label, str]:
    return _unusable(row) or _grade(row) or (Label.DIRECT, "right; recursive rows are compared with it")


def _of_recursive(row: Row, direct: Row | None, unlike: Sequence[str]) -> tuple[Label, str]:
    if found := _unusable(row):
        return found
    match row["status"]:
        case "invalid":
            return Label.INVALID, "its graph came to no answer, and nothing stood in for it"
        case "fallback":
            return Label.FALLBACK, "its graph was unusable, and a direct solve answered"
        case "atomic":
            return Label.CONTROL, "the root did not split: direct solving under another prompt"
    if found := _grade(row):
        return found
    if row["overlap_s"] <= 0:
        return Label.NO_OVERLAP, "no node decoded beside one of its descendants"
    if direct is None:
        return Label.UNPAIRED, "there is no direct row of its task and sample"
    if unlike:
        return Label.UNPAIRED, f"the direct row of its task was run with another {' and another '.join(unlike)}"
    if not has_time(direct):
        return Label.UNPAIRED, "the direct row of its task and sample has no whole run's time"
    if not direct["correct"]:
        return Label.DIRECT_WRONG, "right, and the direct solve was not"
    return Label.HEADLINE, f"right in both modes; nodes overlapped for {row['overlap_s']:.3g} s"


def _unusable(row: Row) -> tuple[Label, str] | None:
    if not ran_to_end(row):
        return Label.FAILED, legible(row["error"] or "it was cancelled")
    if not has_time(row):
        return Label.UNTIMED, "its time is not a positive, finite one"
    return None


def _grade(row: Row) -> tuple[Label, str] | None:
    if row["correct"] is None:
        return Label.UNGRADED, "its task has no expected answer"
    if not row["correct"]:
        problem = row.get("grading_error")
        return Label.WRONG, f"not graded: {legible(problem)}" if problem else "the answer is wrong"
    return None


def _spliced(row: Row) -> str:
    tokens = row.get("spliced_tokens", 0)
    return f"KV of {plural(tokens, 'token')} was attached instead of computed" if tokens else ""


def _counted(found: dict[str, int] | None, prefix: str = "") -> str:
    return ", ".join(
        f"{prefix}{name.replace('_', '-') if prefix else legible(name)} {n}x" for name, n in (found or {}).items()
    )

"""The label of a row is the first thing that keeps it from being a headline; marks and reasons say what else."""

from typing import Any

import pytest
from recorded_runs import both, row

from rrm_engine.graph.types import Status
from rrm_engine.runs.trust import Label, Mark, is_headline, trust

RECURSIVE: list[tuple[dict[str, Any], Label]] = [
    ({}, Label.HEADLINE),
    ({"status": Status.FAILED, "error": "out of memory", "right": False}, Label.FAILED),
    ({"latency_s": 0.0}, Label.UNTIMED),
    ({"latency_s": float("inf")}, Label.UNTIMED),
    ({"status": Status.INVALID, "right": False, "error": "no answer"}, Label.INVALID),
    ({"status": Status.FALLBACK}, Label.FALLBACK),
    ({"status": Status.FALLBACK, "right": False}, Label.FALLBACK),
    ({"status": Status.ATOMIC}, Label.CONTROL),
    ({"right": None}, Label.UNGRADED),
    ({"right": False}, Label.WRONG),
    ({"overlap_s": 0.0}, Label.NO_OVERLAP),
]


@pytest.mark.parametrize(("recursive", "label"), RECURSIVE)
def test_labels_of_recursive_rows(recursive: dict[str, Any], label: Label) -> None:
    first, second = both("a", **recursive)
    assert trust(second, first).label is label
    assert is_headline(first, second) is (label is Label.HEADLINE)


@pytest.mark.parametrize(
    ("direct", "label"),
    [
        ({"right": False}, Label.DIRECT_WRONG),
        ({"right": None}, Label.DIRECT_WRONG),
        ({"latency_s": 0.0}, Label.UNPAIRED),
        ({"status": Status.FAILED, "error": "boom", "right": False}, Label.UNPAIRED),
    ],
)
def test_what_the_direct_row_takes_away(direct: dict[str, Any], label: Label) -> None:
    first, second = both("a", direct=direct)
    assert trust(second, first).label is label
    assert trust(second).label is Label.UNPAIRED


def test_labels_of_direct_rows() -> None:
    assert trust(row("a", "direct")).label is Label.DIRECT
    assert trust(row("a", "direct", right=False)).label is Label.WRONG
    assert trust(row("a", "direct", right=None)).label is Label.UNGRADED
    assert trust(row("a", "direct", status=Status.FAILED, error="boom", right=False)).label is Label.FAILED


def test_marks_and_reasons_are_said_of_any_label() -> None:
    first, second = both("a", spliced_tokens=9, cut={"solver_max_tokens": 2}, repairs={"missing_depends_on": 3})
    found = trust(second, first)
    assert found.label is Label.HEADLINE and found.marks == tuple(Mark)
    assert found.reason == (
        "right in both modes; nodes overlapped for 0.5 s; spliced: KV of 9 tokens was attached instead of computed; "
        "cut by a limit: --solver-max-tokens 2x; repaired events: missing_depends_on 3x"
    )
    failed = row("a", "rrm", status=Status.FAILED, error="line\nbreak", right=False, repairs={"prose": 1})
    assert trust(failed).reason == "line\\nbreak; repaired events: prose 1x"
    assert trust(failed).marks == (Mark.REPAIRED,)

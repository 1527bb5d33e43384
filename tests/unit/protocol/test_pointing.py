"""Which piece of a problem a few words point at, and when that is not certain."""

import pytest

from rrm_engine.protocol.pointing import pointed_at
from rrm_engine.protocol.style import load_style

LIST = "Here are 3 problems.\n(1) Two cats.\n(2) A dog has 4 legs. How many have 2 dogs?\n(3) A hen.\nReport the sum."


@pytest.mark.parametrize(
    ("task", "problem", "found"),
    [
        ("question (2)", LIST, "Here are 3 problems.\n(2) A dog has 4 legs. How many have 2 dogs?"),
        ("Question 3", LIST, "Here are 3 problems.\n(3) A hen."),
        ("solve part (1) of it", LIST, "Here are 3 problems.\n(1) Two cats."),
        ("question (b)", "a) One.\n\nb) Two.\nWhat is the difference of both?", "b) Two."),
        ("question 1", "1. One.\n2. Two.\nSolve each of them. Then report the sum of the 2 answers.", "1. One."),
        ("question 1", "1. One.\n2. Two.\nAll cars go 60 mph.", ""),  # what the items may need
        ("question 1", "1. One.\n2. Two.\nReport the sum of both answers. Each box has 6 eggs.", ""),
        ("question 1", "1. One.\n2. Two.\nWhat is 1 - 2?", ""),
        ("problem 2", "1. One.\n2. Two.", "2. Two."),
        ("question (4)", LIST, ""),  # there is none
        ("questions (1) and (2)", LIST, ""),  # more than one
        ("questions (1) and (9)", LIST, ""),
        ("the dogs", LIST, ""),  # no label
        ("question (2)", "Here: (1) Two cats. (2) A dog. Report the sum.", ""),  # one line: where does (2) end?
        ("question (2)", "(1) One.\n(2) Two,\nor is it?\n(3) Three.", ""),  # an item of two lines
        ("question (2)", "(1) One.\n(3) Three.\n(2) Two.", ""),
        ("question (2)", "(2) Two.\n(3) Three.", ""),
        ("question (2)", "(1) One.\n(2) Twice question 1.", ""),  # speaks of another item
        ("question (2)", "(1) One.\n(2) Add 3 to (1).", ""),
        ("question (2)", "(1) One.\n(2) Double the previous answer.", ""),
        ("question (1)", "(1) One.", ""),
        ("question (1)", "", ""),
    ],
)
def test_what_is_pointed_at(task: str, problem: str, found: str) -> None:
    assert pointed_at(task, problem) == found


def test_a_part_by_reference_is_told_its_item_or_everything() -> None:
    style, rest = load_style("by-reference"), {"given": (), "max_width": 8, "depth_left": 0}
    item = style.user("direct", task="question (2)", problem=LIST, **rest)
    assert "A dog" in item and "cats" not in item and "the sum" not in item and "Solve question (2)." in item
    assert style.opens("direct", task="question (2)", problem=LIST, **rest) == ""
    whole = style.user("direct", task="the dogs", problem=LIST, **rest)
    assert LIST in whole and "Solve only the dogs, leave the rest aside." in whole
    assert style.opens("direct", task="the dogs", problem=LIST, **rest) == "My part is the dogs:"

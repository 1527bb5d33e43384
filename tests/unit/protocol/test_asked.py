"""What a combining node is shown: the question at the end of the task, and the rule with results in it."""

from types import SimpleNamespace

import pytest

from rrm_engine.protocol.asked import MOST_CHARS, asked, with_results


@pytest.mark.parametrize(
    ("task", "found"),
    [
        ("", ""),
        ("How many?", "How many?"),
        ("(1) Two cats.\n(2) A dog.\n\nReport the sum.\n", "Report the sum."),
        ("x. " * 100 + "Let n be it. Find n.", "x. " * 60 + "Let n be it. Find n."),
        ("A" * 300 + ". " + "b" * 300, "b" * 300),
        ("b" * 300, "b" * 300),
    ],
)
def test_the_end_of_a_task_is_what_it_asks(task: str, found: str) -> None:
    assert asked(task) == found
    assert len(found) <= MOST_CHARS or "." not in found


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ("c1 + c2", "50 + 3/4"),
        ("c1 + c10 - c1", "50 + c10 - 50"),
        ("c3 * abc1", "c3 * abc1"),
        ("(c1)^c2, since c5 is long", "(50)^3/4, since c5 is long"),
        ("", ""),
    ],
)
def test_results_take_the_places_of_ids(rule: str, found: str) -> None:
    finals = {"c1": "50", "c2": "3/4", "c3": "", "c5": "x" * 41}
    results = [SimpleNamespace(id=name, final=final, ok=True) for name, final in finals.items()]
    assert with_results(rule, [*results, SimpleNamespace(id="c10", final="7", ok=False)]) == found

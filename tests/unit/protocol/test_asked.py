"""What a combining node is shown: the question at the end of the task, and the rule with results in it."""

from types import SimpleNamespace

import pytest

from rrm_engine.protocol.asked import MOST_CHARS, asked, first_step, values_so_far, with_results


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


@pytest.mark.parametrize(
    ("final", "value"),
    [
        ("Each raised $6,250", "6250"),
        ("100 - (4 * 14) = 44", "44"),
        ("-3.5 degrees", "-3.5"),
        ("2 of 3", "2 of 3"),
        ("x + 1/2", "x + 1/2"),
        ("blue", "blue"),
        ("Beth has 12 eggs.", "12"),
        ("36.67\\%", "36.67"),
        ("\\$6,250", "6250"),
        ("\\sqrt{2}", "\\sqrt{2}"),
        ("2\\pi", "2\\pi"),
        ("2 pi", "2 pi"),
        ("3x", "3x"),
        ("point P2", "point P2"),
        ("\\pi/4", "\\pi/4"),
        ("2^n", "2^n"),
        ("1.2.3", "1.2.3"),
        ("(5)", "(5)"),
    ],
)
def test_of_a_result_in_words_its_only_number_counts(final: str, value: str) -> None:
    assert with_results("c1", [SimpleNamespace(id="c1", final=final, ok=True)]) == value


@pytest.mark.parametrize(
    ("rule", "begins"),
    [
        ("1 + 2 + 3", "1 + 2 ="),
        ("6,250 - 3.5 + -4", "6,250 - 3.5 ="),
        ("1 + 2", ""),
        ("1 + 2 * 3", ""),
        ("1 + x + 3", ""),
        ("the largest of 1, 2, 3", ""),
        ("", ""),
    ],
)
def test_a_sum_begins_with_its_first_two_numbers(rule: str, begins: str) -> None:
    assert first_step(rule) == begins


@pytest.mark.parametrize(
    ("finals", "found"),
    [
        ({"c1": "She saves $37.50 a day", "c2": "Erin had 10 points before scoring 14", "c3": "2"}, "c1 = 37.50, c2 ="),
        ({"c1": "10 points before and 14 after"}, "c1 ="),
        ({"c1": "3 to 4 in all of the cases"}, "c1 ="),
        ({"c1": "50", "c2": "Beth has 12 eggs."}, ""),
        (
            {"c1": "2 of 3", "c2": "x + 1/2", "c3": "(1, 2)", "c4": "2 hours 5 minutes", "c5": "the red one", "c6": ""},
            "",
        ),
        ({"c1": "x" * 41, "c2": "Erin had 10 points before scoring 14"}, ""),
        ({}, ""),
    ],
)
def test_a_value_is_asked_for_where_a_sentence_has_several(finals: dict[str, str], found: str) -> None:
    results = [SimpleNamespace(id=name, final=final, ok=True) for name, final in finals.items()]
    assert values_so_far(results) == found


def test_what_failed_has_no_value() -> None:
    failed = SimpleNamespace(id="c1", final="failed: it took 3 of its 2 awaits", ok=False)
    assert values_so_far([failed]) == ""

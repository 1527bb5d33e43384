"""Grading: the number that counts, formulas that are equal, and nothing that hangs."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrm_engine.bench.grading import grade


@pytest.mark.parametrize(
    "answer",
    [
        "204",
        "FINAL: 204",
        r"\boxed{204}",
        "204.",
        "0204",
        "204.0",
        "$204$",
        "+204",
        r"So the walk takes $\boxed{204}$ minutes.",
        "It takes 4 hours, then 12 minutes.\nFINAL: 204",
        "FINAL: 12 is wrong, so\nFINAL: 204",
        r"First \boxed{12}, then FINAL: 204",
        r"FINAL: \boxed{204}",
        "FINAL: **204**",
        "FINAL: 204 minutes",
        "FINAL: n = 204",
        "FINAL: The answer is 204.",
        r"FINAL: 204^\circ",
        r"FINAL: 204\text{ cm}",
        r"\boxed{\frac{408}{2}}",
        "9 km at 3 km/h, with 24 minutes of coffee, give 204",
        "m+n = 200+4 = 204",
    ],
)
def test_204(answer: str) -> None:
    assert grade(answer, "204") is True


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "no number",
        "205",
        "FINAL: 2040",
        "204, no: FINAL: 205",
        "-204",
        "204.5",
        "FINAL: 1/204",
        r"\boxed{204^2}",
        r"\boxed{\sqrt{204}}",
        "204 apples, of which 3 are bad",  # the last number counts
        "FINAL: unknown, perhaps 204 or 205",
    ],
)
def test_not_204(answer: str) -> None:
    assert grade(answer, "204") is False


@pytest.mark.parametrize("expected", ["204", "0204", "$204$", "204.", r"\boxed{204}"])
def test_ways_to_expect_204(expected: str) -> None:
    assert grade("FINAL: 204", expected) is True


@pytest.mark.parametrize(
    ("answer", "expected", "verdict"),
    [
        ("FINAL: 1,234,567", "1234567", True),
        (r"FINAL: 1{,}234", "1234", True),
        ("FINAL: 1234", "1,234", True),
        ("FINAL: -7", "-7", True),
        ("FINAL: \u22127", "-7", True),
        ("FINAL: 7", "-7", False),
        ("the difference 3-10 is -7", "-7", True),
        ("FINAL: 0", "000", True),
        ("FINAL: 33", "033", True),
    ],
)
def test_whole_numbers(answer: str, expected: str, verdict: bool) -> None:
    assert grade(answer, expected) is verdict


@pytest.mark.parametrize(
    ("answer", "expected", "verdict"),
    [
        (r"\boxed{\frac{3}{4}}", "3/4", True),
        ("FINAL: 0.75", r"\frac{3}{4}", True),
        ("FINAL: 3/5", "3/4", False),
        (r"FINAL: \frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", True),
        ("FINAL: 1+x^2", "x^2+1", True),
        ("FINAL: (1, 2)", "(1,2)", True),
        ("FINAL: (2, 1)", "(1,2)", False),
        (r"FINAL: \{2, 1\}", r"\{1,2\}", True),
        (r"Hence the answer is $\frac{3}{4}$.", r"\frac34", True),
        ("FINAL: B", "B", True),
        ("FINAL: (B)", "B", True),
        (r"\boxed{\text{B}}", "B", True),
        ("FINAL: b", "B", True),
        ("FINAL: C", "B", False),
        ("FINAL: Paris.", "Paris", True),
        ("FINAL: Spair", "Paris", False),
        ("Paris", "Paris", True),
        ("", "Paris", False),
        ("", "3/4", False),
    ],
)
def test_free_form(answer: str, expected: str, verdict: bool) -> None:
    assert grade(answer, expected) is verdict


def test_nothing_expected_is_not_graded() -> None:
    assert grade("FINAL: 204", None) is None


@pytest.mark.parametrize("formula", ["9^{9^{9}}", "9^9^9", "10^{1000000}", "100000!", "9**9**9", "3!!!"])
def test_formulas_that_would_never_end(formula: str) -> None:
    began = time.monotonic()
    assert grade(f"FINAL: {formula}", "5") is False
    assert grade(f"FINAL: {formula}", "x+1") is False
    assert time.monotonic() - began < 30


def test_off_the_main_thread() -> None:
    verdicts: list[bool | None] = []
    thread = threading.Thread(target=lambda: verdicts.append(grade(r"\boxed{\frac{6}{8}}", "3/4")))
    thread.start()
    thread.join()
    assert verdicts == [True]


@given(st.integers(-(10**6), 10**6), st.sampled_from(["{}", "FINAL: {}", r"\boxed{{{}}}", "7 and 8 make {}.", "${}$"]))
def test_every_integer_equals_itself_and_not_its_successor(number: int, form: str) -> None:
    answer = form.format(number)
    assert grade(answer, str(number)) is True
    assert grade(answer, str(number + 1)) is False


@given(st.text(max_size=200))
def test_no_text_raises(text: str) -> None:
    assert grade(text, "204") in (True, False)


@given(st.text(alphabet=r"0123456789+-*/^_{}()[]\$ .,=abcxfrsqt!", max_size=40))
def test_no_formula_raises(text: str) -> None:
    assert grade(f"FINAL: {text}", "3/4") in (True, False)

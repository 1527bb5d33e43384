"""Grading: the number that counts, formulas that are equal, and nothing that hangs."""

import re
import signal
import threading
import time
from contextlib import suppress

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rrm_engine.bench import grading
from rrm_engine.bench.grading import grade
from rrm_engine.bench.notation import same_text, to_latex
from rrm_engine.protocol.final import extract_final, strip_markup

# By what is expected: answers that are right, each after FINAL.
SAME = {
    "204": ["204", "204. I hope it is correct.", "204 minutes", r"204\text{ minutes}", "m+n=204"],
    "0204": ["204"],
    "$204$": ["204"],
    "204.": ["204"],
    r"\boxed{204}": ["204"],
    "1234567": ["1,234,567"],
    "1234": ["1{,}234", "1,234"],
    "1,234": ["1234", r"1\,234", "1{,}234", "1 234"],
    "-7": ["-7", "\u22127"],
    "000": ["0"],
    "033": ["33"],
    r"\frac{3}{4}": ["0.75"],
    r"\frac{\sqrt{2}}{2}": [r"\frac{1}{\sqrt{2}}"],
    "x^2+1": ["1+x^2", "x²+1", "x**2 + 1"],
    "(1,2)": ["(1, 2)", r"\left(1,2\right)", r"\langle 1,2 \rangle"],
    r"\{1,2\}": [r"\{2, 1\}", "{1, 2}", r"\{2,1\}"],
    "B": ["B", "(B)", "b", r"\text{(B)}", "B) 12", "(B) 12", "B. because"],
    "Paris": ["Paris."],
    "1,2": ["$x=1$ or $x=2$", "1,2", "2, 1", "x=1, x=2"],
    "7 days": ["7 whole days", "7"],
    "7 years": ["7 years old"],
    "7 distinct integers": ["7 integers"],
    "66_8": ["66_{8}"],
    r"66^\circ": ["66 degrees"],
    "5 cities": ["5 city"],
    r"10\%": ["10 percent", "10", "0.1"],
    "1,234,567": ["1234567"],
    "10": [r"10\%"],
    "0.1": ["10%"],
    r"1\frac{1}{2}": ["3/2"],
    "1 1/2": ["1.5"],
    "1½": ["3/2"],
    "½": ["0.5"],
    r"6.63\times 10^{-34}": ["6.63e-34"],
    "1.5e8": ["150000000"],
    r"1.5\times10^8": ["150,000,000"],
    "1/3": ["0.333333"],
    r"0.\overline{3}": ["1/3"],
    r"0.1\overline{6}": [r"\frac{1}{6}"],
    r"90^\circ": ["90"],
    "90": ["90°", "90 degrees"],
    r"\$18.90": ["18.9"],
    "18.90": ["$18.90"],
    "20": [r"\$20", "$20"],
    "x=5": ["5"],
    "5": ["x = 5", "x=5.", "5 cm", r"5\text{ cm}", r"\text{5 cm}", r"5\text{ cm}^2", "5 m"],
    r"\pm 2": ["-2, 2", "±2"],
    r"1 \pm \sqrt{2}": [r"1+\sqrt2, 1-\sqrt2"],
    "x>2": ["2<x", r"(2,\infty)"],
    r"x \le 2": ["x ≤ 2"],
    r"\text{(E)}": ["E"],
    r"\text{(E)},": ["E"],
    "Thursday": [r"\text{Thursday}"],
    r"\text{Thursday}": ["thursday"],
    "no solution": ["No solution."],
    r"\text{no solution}": ["no solution"],
    "yes": ["Yes, because it is"],
    r"5\text{ cm}": ["5", "5 centimeters"],
    "18": ["18 square units"],
    r"\sqrt{2}": ["√2", "sqrt(2)"],
    r"\pi": ["π"],
    r"\infty": ["∞"],
    "3 million": ["3000000"],
    "3000000": ["3 million"],
    r"\emptyset": [r"\varnothing"],
    "1:2:3": ["1 : 2 : 3"],
    "3:2": ["3/2"],
    r"10:30 \text{ a.m.}": ["10:30 AM"],
    "123_4": ["123_{4}", "123"],
    "33": ["<33>", "\uff13\uff13", "\u0663\u0663"],
    "120": ["5!"],
    "1024": ["2^{10}"],
    r"\begin{pmatrix}1\\2\end{pmatrix}": [r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"],
    r"\frac{1}{2}": [r"The answer is \frac{1}{2}", r"\frac12\text{ m/s}"],
    "2,2,3": ["2, 2, 3"],
    "y=2x+1": ["2x+1"],
    "0": ["-0"],
    "0.5": [".5", "0.50"],
    "3": ["3.0"],
    "1e3": ["1000"],
    "2x": [r"2x \text{ cm}"],
    r"\sqrt{3}": [r"\sqrt{3} cm"],
    r"\pi r^2 h": [r"\pi h r^2"],
    r"\text{5 apples}": ["5"],
}  # fmt: skip
# The same for answers that are wrong.
DIFFERENT = {
    "-7": ["7"],
    "3/4": ["3/5"],
    "(1,2)": ["(2, 1)", "(2,1)"],
    "B": ["C", "(C) B"],
    "Paris": ["Spair"],
    "y": ["y'"],
    "1,2": ["<1, 2>", "12", "1,3", "1,2,3"],
    r"66^\circ": ["66_8"],
    "66 degrees": ["66_{8}"],
    "66_8": [r"66\%", "66 days"],
    "7 days": ["7 distinct integers"],
    r"7\text{ distinct integers}": [r"7\text{ days}"],
    "7 apples": ["7 pears"],
    r"10\%": ["10 days"],
    r"10^\circ": [r"10\%"],
    r"$k\ge 2$ or $k<-20:(-\infty,-20)\cup[2,\infty)$": [r"k\ge 2"],
    r"k\ge 2": [r"$k\ge 2$ or $k<-20:(-\infty,-20)\cup[2,\infty)$"],
    r"$\sin t=-1$ when $t=2\pi k$": [r"$\sin t=1$ when $t=2\pi k$"],
    "12": ["1,2"],
    "1,23": ["123"],
    "123": ["1,23"],
    "1, 234": ["1234"],
    "1234": ["1, 234"],
    "1,234": ["1, 234", "1,235"],
    "(1,2]": ["(1,2)"],
    "[1,2]": ["(1,2)", "1,2"],
    "[1,2)": ["[1,2]"],
    "(1,2,3)": ["(1,3,2)"],
    r"(-\infty,1)\cup(2,\infty)": [r"(-\infty,1]\cup(2,\infty)"],
    "10": ["0.1"],
    "0.5": ["5"],
    ".5": ["5"],
    "5": [".5", "-5"],
    "5.": [".5"],
    "1/2": ["2", "12"],
    "1 1/2": ["1", "11/2"],
    r"1\frac12": ["1/2"],
    r"6.63\times 10^{-34}": [r"6.63\times 10^{-35}", "0"],
    "0.0000001": ["0.0000002"],
    "10^{-7}": ["0"],
    "0": ["10^{-7}"],
    "0.333333": ["0.33"],
    r"0.\overline{3}": ["0", "0.3"],
    "90": [r"90\pi"],
    r"90^\circ": [r"\pi/2"],
    "-5": ["5"],
    "x-1": ["x+1"],
    "x=5": ["x=-5", "y=5"],
    "x>2": [r"x\ge 2", "x<2"],
    "1<x<2": [r"1<x\le 2"],
    r"\pm 2": ["2"],
    "2": ["±2"],
    "A": ["a b"],
    "Thursday": ["Tuesday"],
    "no solution": ["one solution"],
    "yes": ["no", "No, not yes"],
    "ABC": ["BCA"],
    r"\text{east}": ["seat"],
    "10:30 a.m.": ["10:30 p.m."],
    r"10:30 \text{ a.m.}": [r"10:30 \text{ p.m.}"],
    "2:30": ["3:20"],
    "1:2:3": ["1:3:2"],
    "123_4": ["123_5"],
    "2,2,3": ["2,3"],
    "1": ["1,1"],
    "204": ["204 million", r"204\text{ million}", "204 thousand", "not 204", "The answer is not 204",
        r"\text{The answer is not } 204", "204 or 205", "204 to 205", "204, 205", "205", "2040", "20.4", "204.1",
        "1/204", "204^2", "204x", "204!", "204i", r"204\pi", r"\sqrt{204}", r"204 \cdot 2", "204 + 1", "204 is wrong",
        "{204, 205}", "204e"],
    "x^2": ["x2"],
    "x^{2}": ["x_2"],
    r"\frac{1}{2}": [r"\frac{2}{1}"],
    r"\frac{\pi}{2}": [r"\frac{\pi}{3}"],
    r"\sqrt{2}": [r"\sqrt{3}"],
    "2^{100}": ["1267650600228229401496703205377"],
    "1267650600228229401496703205376": ["1267650600228229401496703205377"],
    r"\begin{pmatrix}1\\2\end{pmatrix}": [r"\begin{pmatrix}2\\1\end{pmatrix}"],
    "1+2i": ["1-2i"],
    r"\infty": [r"-\infty"],
    "V": ["v"],
    "P(1,2)": ["P(2,1)"],
    "June 20": ["June 21"],
    r"\text{June 20}": [r"\text{June 21}"],
    "3 million": ["3"],
    "3": ["3 million", "3t/2"],
    "x+C": ["x"],
    "y=2x+1": ["y=2x-1"],
    r"5\text{ cm}": [r"5\text{ m}", "5 m"],
    "1.5e8": ["1.5e9"],
    "20%": ["20/3"],
    r"\pi r^2 h": [r"\pi r^2"],
    "5h": ["5"],
    r"2\pi": [r"2\pi ab"],
    r"2\pi ab": [r"2\pi"],
    "3t": ["3"],
    r"5\text{ kg}": [r"5\text{ g}"],
    "2x": ["2"],
}  # fmt: skip
# By what is expected: whole texts that state it.
SAID = {
    "204": ["204", "FINAL: 204", r"\boxed{204}", "204.", "0204", "204.0", "$204$", "+204",
        r"So the walk takes $\boxed{204}$ minutes.", "It takes 4 hours, then 12 minutes.\nFINAL: 204",
        "FINAL: 12 is wrong, so\nFINAL: 204", r"First \boxed{12}, then FINAL: 204", r"FINAL: \boxed{204}",
        "FINAL: **204**", "FINAL: 204 minutes", "FINAL: n = 204", "FINAL: The answer is 204.", r"FINAL: 204^\circ",
        r"FINAL: 204\text{ cm}", r"\boxed{\frac{408}{2}}", "9 km at 3 km/h, with 24 minutes of coffee, give 204",
        "m+n = 200+4 = 204"],
    "-7": ["the difference 3-10 is -7"],
    "5": ["It is 5, not 204."],
    "3/4": [r"\boxed{\frac{3}{4}}"],
    r"\frac34": [r"Hence the answer is $\frac{3}{4}$."],
    "B": [r"\boxed{\text{B}}"],
    "Paris": ["Paris", "The answer is Paris."],
    "1,2": [r"$\boxed{1}$ and $\boxed{2}$", r"$x = \boxed{1}$ or $x = \boxed{2}$"],
    "2": [r"First \boxed{1}. Then \boxed{2}"],
    "1/2": [r"Answer: \frac{1}{2}"],
    r"\text{(E)}": ["**Answer: (E) Hyperbola**."],
}  # fmt: skip
# And texts that do not.
UNSAID = {
    "204": ["", "no number", "205", "FINAL: 2040", "204, no: FINAL: 205", "-204", "204.5", "FINAL: 1/204",
        r"\boxed{204^2}", r"\boxed{\sqrt{204}}", "204 apples, of which 3 are bad", "The answer is not 204.",
        "It is 5, not 204.", "FINAL: unknown, perhaps 204 or 205"],
    "-7": ["It isn't -7"],
    "Paris": ["", "The answer is not Paris."],
    "3/4": [""],
    "2": [r"\boxed{1} or \boxed{2}"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "expected", "verdict"),
    [
        *((f"FINAL: {answer}", expected, True) for expected in SAME for answer in SAME[expected]),
        *((f"FINAL: {answer}", expected, False) for expected in DIFFERENT for answer in DIFFERENT[expected]),
        *((text, expected, True) for expected in SAID for text in SAID[expected]),
        *((text, expected, False) for expected in UNSAID for text in UNSAID[expected]),
    ],
)
def test_verdicts(text: str, expected: str, verdict: bool) -> None:
    assert grade(text, expected) is verdict


@pytest.mark.parametrize(
    "answer",
    [
        "Final: 10", "final answer is 10", "**Final Answer**\n10", "FINAL:\n10", "FINAL:\n\n**10**", "Answer: 10",
        "**Answer:** 10.", "### Final Answer\n\nThe answer is 10.", "FINAL ANSWER: 10", "FINAL: <10>",
        "Final answer: $10$",
        "**Final Answer:**\n\\[\n\\boxed{10}\n\\]", "$$\n\\boxed{10}\n$$", "\\boxed {10}", "\\fbox{10}",
        "FINAL: $$\n10\n$$", "FINAL\uff1a\uff11\uff10", "The final answer is $10$. I hope it is correct.",
        "So the answer is 10 because 3 and 7 are left.", "The answer to the whole question is: 10", "FINAL: 10\u00a0cm",
        "I first thought Answer: 7\nbut FINAL: 10", "FINAL: 3\nWait.\nFINAL: 10", "\\boxed{3}, no: \\boxed{10}",
    ],
)  # fmt: skip
def test_ways_to_state_10(answer: str) -> None:
    assert grade(answer, "10") is True
    assert grade(answer, "3") is False
    assert grade(answer, "1") is False


@pytest.mark.parametrize(("said", "wanted"), [("I = 5", "I = 7"), ("$I_p=5t$", "$I=7t$"), ("$I=e^{-t}$", "$I=3$")])
def test_a_current_is_not_the_imaginary_unit(said: str, wanted: str) -> None:
    assert grade(f"FINAL: {said}", wanted) is False
    assert grade(f"FINAL: {wanted}", wanted) is True


def test_nothing_expected_is_not_graded() -> None:
    assert grade("FINAL: 204", None) is None


@pytest.mark.parametrize(
    "formula",
    [
        "9^{9^{9}}", "9^9^9", "10^{1000000}", "100000!", "9**9**9", "3!!!", "2^{100!}", "(10!)!", "1e999999999",
        r"\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}", r"\frac{" * 500,
        "(" * 2000, "}" * 20000, "0." + r"\overline{" + "3" * 5000 + "}", "204" + "a" * 9000,
    ],
)  # fmt: skip
def test_formulas_that_would_never_end(formula: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "SECONDS", 1.0)
    began = time.process_time()
    for expected in ("5", "x+1"):
        with suppress(grading.TooSlow):
            assert grade(f"FINAL: {formula}", expected) is False
    assert time.process_time() - began < 10


def test_a_slow_verdict_is_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    product = r"\cdot ".join(rf"\sin({i}x)" for i in range(2, 20))
    monkeypatch.setattr(grading, "SECONDS", 0.3)
    began, computed = time.monotonic(), time.process_time()
    with pytest.raises(grading.TooSlow, match=r"took more than 0\.3 s"):
        grade(f"FINAL: {product}", r"\pi x")
    assert time.monotonic() - began > 0.2
    assert time.process_time() - computed < 2.5
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    assert grade(r"\boxed{\frac{6}{8}}", "3/4") is True


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


NUMBERS = st.one_of(
    st.integers(-(10**9), 10**9).map(str),
    st.integers(1000, 10**9).map("{:,}".format),
    st.decimals(-1000, 1000, places=3).map(str),
    st.tuples(st.integers(-99, 99), st.integers(1, 99)).map(lambda pair: rf"\frac{{{pair[0]}}}{{{pair[1]}}}"),
    st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda pair: rf"{pair[0]}\times 10^{{-{pair[1]}}}"),
    st.integers(2, 99).map(lambda n: rf"\sqrt{{{n}}}"),
    st.integers(1, 99).map(lambda n: rf"{n}\%"),
    st.integers(1, 99).map(lambda n: f"{n}\u00b0"),
    st.sampled_from([r"\pi", "x+1", "2a-b", r"\infty", "3i", "1\u00bd", r"0.\overline{3}", r"\$4.50", "5 km"]),
)  # fmt: skip
GROUPS = st.sampled_from(
    ["{}", "({})", "[{}]", r"\{{{}\}}", r"\left({}\right]", r"x\in\{{{}\}}", "({}) and (1, 2)", "{}."]
)
ANSWERS = st.one_of(
    st.builds(
        lambda group, items, comma: group.format(comma.join(items)),
        GROUPS,
        st.lists(NUMBERS, min_size=1, max_size=4),
        st.sampled_from([",", ", ", ";", r",\ "]),
    ),
    st.tuples(NUMBERS, st.sampled_from(["=", "<", r"\le", ">", r"\ne"]), NUMBERS).map(" ".join),
    st.text(alphabet="abcxyz ABC-'", min_size=1, max_size=20).filter(str.strip),
    st.builds("{}:{:02}{}".format, st.integers(1, 12), st.integers(0, 59), st.sampled_from(["", " a.m.", " PM"])),
    st.text(alphabet=r"0123456789+-*/^_{}()[]\ .,=:;|<>%!'abcxfrsqt", min_size=1, max_size=25),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(ANSWERS, st.sampled_from(["FINAL: {}", r"Hence \boxed{{{}}}.", "{}"]))
@example("1,2", "FINAL: {}")
@example(r"\text{(E)},", "FINAL: {}")
@example("The mode is $1 / 3$.", "FINAL: {}")
def test_every_answer_equals_itself(answer: str, form: str) -> None:
    balanced = re.fullmatch(r"(?:[^{}\\]|\\[^{}]|\{(?:[^{}\\]|\\[^{}])*\})*", answer)
    stated = extract_final(form.format(answer))
    assume(re.search(r"\w", answer))
    if "boxed" in form:
        assume(balanced)
    else:
        assume(stated is None or same_text(to_latex(strip_markup(stated)), to_latex(strip_markup(answer))))
    assert grade(form.format(answer), answer) is True


@settings(max_examples=10, deadline=None)
@given(st.integers(4300, 9000), st.sampled_from(["FINAL: {}", r"\boxed{{{}}}"]), st.integers(1, 9))
def test_numbers_longer_than_python_converts(length: int, form: str, digit: int) -> None:
    number = str(digit) * length
    assert grade(form.format(number), "7") is False
    assert grade(form.format(number), number) is True
    assert grade(form.format(number + "0"), number) is False
    assert grade(form.format(number), "3/4") is False


@given(st.text(max_size=200))
def test_no_text_raises(text: str) -> None:
    assert grade(text, "204") in (True, False)


@given(st.text(alphabet=r"0123456789+-*/^_{}()[]\$ .,=abcxfrsqt!", max_size=40))
def test_no_formula_raises(text: str) -> None:
    assert grade(f"FINAL: {text}", "3/4") in (True, False)

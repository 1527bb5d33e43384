r"""Is an answer right?

Which part of a text counts as its answer, first match wins:

1. what `rrm_engine.protocol.answers.read_answer` reads, which also makes conclusions;
2. for a whole-number task the last number in the text, otherwise math-verify's own rule (the last formula).

A whole number is compared as one, of any length: ``204``, ``0204``, ``204.``, ``$204$``, ``204.0``, ``n = 204`` and
``204 minutes`` are equal; commas separate thousands only where all groups after them have three digits, so ``1,234``
is 1234, and ``1,23`` and ``1, 234`` are lists. Words and choices are compared as text, case aside. Everything else is
math-verify's to judge, once the notation is one it reads (`rrm_engine.bench.notation`): lists and sets have no order,
tuples have; intervals keep their kinds of ends; a unit, a currency or a degree sign may be left out; ``10%`` is ``10``
and ``0.1``; of ``x = 5`` the 5 counts. Where it takes different answers for equal, `_contradict` has the last word.
"""

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rrm_engine.bench.notation import same_measure, same_text, to_latex, units_of, without_unit, words_of
from rrm_engine.protocol.answers import read_answer
from rrm_engine.protocol.final import extract_final, strip_markup

SECONDS = 3.0  # of CPU time for one verdict of math-verify, so that a busy machine changes none
MAX_FORMULA = 1000  # characters; longer texts are cut from the left
MAX_ANSWER = 20_000  # of a text without a final answer, likewise
TOLERANCE = 1e-5  # relative, between two numbers one of which is rounded: 0.33333 is 1/3

_NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?"
_LABEL = r"(?:[A-Za-z][A-Za-z +_']*\s*(?:=|:|\bis\b)\s*)?"  # "n =", "the answer is"
_NO_UNIT = r"(?:and|but|dozen|hundred|in|is|isn|minus|not|of|or|plus|thousand|times|to|was|wrong|[mbtr]+illion)\b"
_UNIT_WORD = rf"\s*(?!{_NO_UNIT})(?:[A-Za-z]{{2,}}|[mshgLNJWVAKCF])\b"
_UNIT = rf"\s*(?:\\?%|\^\\circ|\^\{{\\circ\}}|(?:{_UNIT_WORD}){{1,3}})?"  # " minutes", "°", "%": no operator
_BARE = re.compile(_NUMBER)
_LABELLED = re.compile(rf"{_LABEL}\$?({_NUMBER}){_UNIT}\.?")
_ANY_NUMBER = re.compile(rf"(?<![\w.^]){_NUMBER}")
_WHOLE = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)")
_CHOICE = re.compile(r"\(?([A-Za-z])\)?[).:]\s.*")
_WORDS = re.compile(r"[a-z][a-z' -]*")
_YES_NO = ("yes", "no", "true", "false")
_PROSE = re.compile(r"^[A-Za-z][A-Za-z ,']*\b(?:is|are|equals)\b:?\s+(?=\S)")
_BOXED = re.compile(r"\\f?box(?:ed)?\s*\{")
_AFTERTHOUGHT = re.compile(r"(?<=[\d)}$])\.\s+[A-Z].*")
_NOT = re.compile(r"\b(?:not|isn't|never|neither)\b(?: equal(?: to)?)?[\s}$\\(]*[-+]?\d")
_FORMULA = re.compile(r"\$[^$]*\$|\\\((?:[^\\]|\\[^)])*\\\)")
_LISTED = re.compile(r"\s*(?:,|;|,?\s*(?:and|or))\s*")
_CURRENT = re.compile(r"(?<![A-Za-z\\])[Ii](?=(?:_(?:\w|\{\w+\}))?\s*=)")  # in "I = 5" it is no imaginary unit
_NOON = re.compile(r"\b([ap])\.?\s?m\b")
# Exponents and factorials that sympy would expand for ever, deep in C where no timeout reaches.
_EXPLOSIVE = re.compile(
    r"\d[}\s)]*(?:\^|\*\*)[\s{(]*\d+[}\s)]*(?:\^|\*\*)|(?:\^|\*\*)[\s{(]*\d{5,}|\d{5,}\s*!|![\s)}]*!|\^\{[^{}]*!"
)


class OutOfTime(BaseException):
    """The time for a verdict is over; sympy swallows every Exception."""


class TooSlow(Exception):
    """No verdict within SECONDS."""


def grade(answer: str, expected: str | None) -> bool | None:
    """Whether ``answer`` states ``expected``; None when nothing is expected.

    Raises TooSlow, after at most a few times SECONDS, on a POSIX main thread; elsewhere, and inside a huge power that
    `_EXPLOSIVE` does not foresee, only the caller can set a limit.
    """
    if expected is None:
        return None
    wanted = _tidy(expected)
    sure = extract_final(answer) is not None
    candidate = _tidy(read_answer(answer) or "")
    if _WHOLE.fullmatch(wanted):
        return _grade_whole(candidate, answer, _digits(wanted), sure=sure)
    if (candidate and same_text(candidate, wanted)) or same_text(_tidy(answer[-MAX_ANSWER:]), wanted):
        return True
    if len(wanted) == 1 and not "A" <= wanted <= "J":
        return candidate == wanted  # a variable
    if _WORDS.fullmatch(words_of(wanted)):  # a word or a choice's letter is no product of variables
        return _same_words(words_of(candidate or answer), words_of(wanted))
    if candidate:
        return not _contradict(candidate, wanted) and _math_equal(_formula(candidate), _formula(wanted))
    return bool(answer.strip()) and _math_equal(answer[-MAX_FORMULA:], _formula(wanted))


def stated(answer: str) -> str:
    """What ``answer`` states as its answer, in one spelling, to compare answers with each other; "" if it states none.

    A number is its digits; of other notations the same answer may have two spellings.
    """
    candidate = _tidy(read_answer(answer) or "")
    labelled = _LABELLED.fullmatch(candidate)
    return _digits(labelled[1]) if labelled and not _NOT.search(candidate) else candidate.casefold()


def warm_up() -> None:
    """Import math-verify now, so that its half second falls on no row's latency."""
    _math_equal("1", "1")


def is_whole(expected: str | None) -> bool:
    """Whether grading against ``expected`` can do without math-verify in the usual case."""
    return expected is None or _WHOLE.fullmatch(_tidy(expected)) is not None


def _grade_whole(candidate: str, answer: str, wanted: str, sure: bool) -> bool:
    """``candidate`` as a number, with a label or a unit; else, where it is not sure, the last number, or a formula."""
    if labelled := _LABELLED.fullmatch(candidate):
        return not _NOT.search(candidate) and _digits(labelled[1]) == wanted
    if not sure:
        text = to_latex(answer[-MAX_ANSWER:])
        negated = {found.end() for found in _NOT.finditer(text)}  # after the first digit of a number that it is not
        numbers = [n[0] for n in _ANY_NUMBER.finditer(text) if n.start() + (n[0][0] in "+-") + 1 not in negated]
        return bool(numbers) and _digits(numbers[-1]) == wanted
    return not _contradict(candidate, wanted) and _math_equal(_formula(candidate), wanted)


def _digits(number: str) -> str:
    """A number in one spelling, compared as text since Python converts no more than 4,300 digits: ``-204``, ``0.5``."""
    sign = "-" if number.startswith("-") else ""
    whole, _, fraction = number.lstrip("+-").replace(",", "").partition(".")
    digits = (whole.lstrip("0") or "0") + (f".{fraction.rstrip('0')}" if fraction.strip("0") else "")
    return digits if digits == "0" else sign + digits


def _tidy(text: str) -> str:
    """``text`` in one notation, without what only sets it off: formula signs around all of it, emphasis, a box."""
    text = strip_markup(text)
    if _BOXED.match(text):
        text = extract_final(text) or text
    return to_latex(_AFTERTHOUGHT.sub("", text)).rstrip(".,; ")


def _formula(candidate: str) -> str:
    """What math-verify is to read of ``candidate``: a formula, or a text with formulas in it."""
    if "$" in candidate or "\\(" in candidate:
        return candidate[-MAX_FORMULA:]
    return without_unit(_PROSE.sub("", candidate))[-MAX_FORMULA:]


def _same_words(said: str, wanted: str) -> bool:
    if len(wanted) == 1 and (choice := _CHOICE.fullmatch(said)):
        said = choice[1]
    return said == wanted or (wanted in _YES_NO and re.split(r"[,.;:]", said)[0] == wanted)


def _contradict(candidate: str, wanted: str) -> bool:
    """Whether two answers differ in what math-verify drops: "not", a.m. and p.m., a number's base, unit or noun where
    both have one, and how often each item of a list stands there."""
    if _NOT.search(candidate) and not _NOT.search(wanted):
        return True
    for find in (_NOON.findall, units_of):
        one, other = find(candidate.casefold()), find(wanted.casefold())
        if one and other and one != other:
            return True
    if not same_measure(candidate, wanted):
        return True
    if _is_torn(candidate, wanted) or _is_torn(wanted, candidate):
        return True
    one, other = _items(candidate), _items(wanted)
    repeats = len(set(one)) < len(one) or len(set(other)) < len(other)
    return repeats and len(one) != len(other)


def _is_torn(one: str, other: str) -> bool:
    """Whether math-verify, which reads lists of formulas, would compare only one of several formulas in ``one``."""
    between = _FORMULA.split(one)[1:-1]
    single = len(_items(other)) == 1 and "\\pm" not in other
    return bool(between) and (single or not all(map(_LISTED.fullmatch, between)))


def _items(text: str) -> list[str]:
    """The items of a list, with or without brackets around it."""
    if _BARE.fullmatch(text):
        return [text]
    text = re.sub(r"^\s*(?:\\\{|[(\[{])|(?:\\\}|[)\]}])\s*$", "", text)
    return [item.strip() for item in re.split(r",|;|\band\b|\bor\b", text)]


def _math_equal(text: str, wanted: str) -> bool:
    """math-verify's verdict. False for what it cannot read. Raises TooSlow."""
    if _EXPLOSIVE.search(text) or _EXPLOSIVE.search(wanted):
        return False
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    def read(text: str) -> Any:
        text = _CURRENT.sub("y", text)
        notation = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
        kinds = [LatexExtractionConfig(normalization_config=notation), ExprExtractionConfig()]
        return parse(text if "$" in text or "\\(" in text else f"${text}$", kinds, parsing_timeout=None)

    # Its own warning about a missing timeout would repeat with every row.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    try:
        with _at_most(SECONDS):
            gold, found = read(wanted), read(text)
            equal = gold and found and verify(gold, found, timeout_seconds=None)
            return bool(equal) and _close(gold[0], found[0])
    except OutOfTime:
        raise TooSlow(f"grading took more than {SECONDS:g} s") from None
    except Exception:  # sympy raises whatever it likes; what cannot be compared is not equal
        return False


def _close(gold: Any, found: Any) -> bool:
    """Whether two numbers are also close relative to their size: math-verify takes all tiny ones for equal."""
    if isinstance(gold, str) or isinstance(found, str) or gold == found:
        return True
    try:
        one, other = complex(gold), complex(found)
    except (TypeError, ValueError, OverflowError, AttributeError):
        return True  # not numbers
    percent = {one, 100 * one, one / 100}
    return any(abs(value - other) <= TOLERANCE * max(abs(value), abs(other)) for value in percent)


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the block when the time is over. Only a POSIX main thread has the signal for it."""
    if os.name != "posix" or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGVTALRM, stop)
    # Again and again: one may fall into a callback that swallows it.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.2)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    finally:  # the last signal may have come at the end of the block, and ended the inner clean-up
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)

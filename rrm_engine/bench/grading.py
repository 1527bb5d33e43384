r"""Is an answer right?

Which part of a text counts as its answer, first match wins:

1. what stands in the last ``FINAL: x`` or ``\boxed{x}`` (``rrm_engine.protocol.final``);
2. for a whole-number task: the last number in the text;
3. otherwise math-verify's own rule (the last formula, "the answer is ...").

A whole number is compared as one: ``204``, ``0204``, ``204.``, ``$204$``, ``204.0``, ``n = 204`` and ``204 minutes``
are equal. Everything else, and a whole number written as a formula, is compared by math-verify.
"""

import logging
import os
import re
import threading
from typing import Any

from rrm_engine.protocol.final import extract_final

VERIFY_SECONDS = 5
MAX_FORMULA = 1000  # characters; longer texts are cut from the left

_NUMBER = r"[-+\u2212]?(?:\d{1,3}(?:(?:,|\\,|\{,\}|\\!)\d{3})+|\d+)(?:\.\d+)?"
_BARE = re.compile(_NUMBER + r"\.?")
_LABEL = r"(?:[A-Za-z][A-Za-z +_']*\s*(?:=|:|\bis\b)\s*)?"  # "n =", "the answer is"
_UNIT = r"\s*(?:°|\\?%|\^\\circ|\^\{\\circ\}|(?:\s[A-Za-z ]+))?"  # " minutes", "°", "%": no operator
_LABELLED = re.compile(rf"{_LABEL}({_NUMBER}){_UNIT}\.?")
_ANY_NUMBER = re.compile(rf"(?<![\w.^]){_NUMBER}")
_WHOLE = re.compile(r"[-+]?\d+")
# Exponents and factorials that sympy would expand for ever, deep in C where no timeout reaches.
_EXPLOSIVE = re.compile(
    r"\d\}*\s*(?:\^|\*\*)\s*[{(]*\s*\d+\}*\s*(?:\^|\*\*)|(?:\^|\*\*)\s*[{(]*\s*\d{5,}|\d{5,}\s*!|!\s*!"
)


def grade(answer: str, expected: str | None) -> bool | None:
    """Whether ``answer`` states ``expected``; None when nothing is expected."""
    if expected is None:
        return None
    final = extract_final(answer)
    candidate = _tidy(final) if final else ""
    wanted = _tidy(expected)
    if _WHOLE.fullmatch(wanted.replace(",", "")):
        return _grade_whole(candidate or _last_number(answer), int(wanted.replace(",", "")))
    if candidate and _plain(candidate) == _plain(wanted):
        return True
    if re.fullmatch(r"[A-Za-z][A-Za-z ]*", wanted):  # a word or a choice's letter is no product of variables
        return _plain(candidate or answer) == _plain(wanted)
    return _math_equal(f"${candidate}$" if candidate else answer[-MAX_FORMULA:], wanted)


def warm_up() -> None:
    """Import math-verify now, so that its half second falls on no row's latency."""
    _math_equal("$1$", "1")


def is_whole(expected: str | None) -> bool:
    """Whether grading against ``expected`` can do without math-verify in the usual case."""
    return expected is None or _WHOLE.fullmatch(_tidy(expected).replace(",", "")) is not None


def _grade_whole(candidate: str, wanted: int) -> bool:
    """``candidate`` as a number, then as a number with a label or a unit, then as a formula."""
    if not candidate:
        return False
    if _BARE.fullmatch(candidate):
        return _value(candidate) == wanted
    if labelled := _LABELLED.fullmatch(candidate):
        return _value(labelled[1]) == wanted
    return _math_equal(f"${candidate}$", str(wanted))


def _value(number: str) -> int | float:
    digits = re.sub(r"[^\d.+-]", "", number.replace("\u2212", "-")).rstrip(".")
    whole, _, fraction = digits.partition(".")
    return float(digits) if fraction.strip("0") else int(whole)


def _last_number(text: str) -> str:
    numbers = _ANY_NUMBER.findall(text)
    return numbers[-1] if numbers else ""


def _tidy(text: str) -> str:
    """``text`` without what only sets it off: spaces, dollar signs, emphasis, one box, a closing stop."""
    text = text.strip().strip("$*` ").strip()
    text = re.sub(r"^\\[(\[]\s*|\s*\\[)\]]$", "", text)
    if boxed := re.fullmatch(r"\\boxed\s*\{(.*)\}", text, re.DOTALL):
        text = boxed[1]
    return text.strip().removesuffix(".").rstrip("$*` ").strip()


def _plain(text: str) -> str:
    """For comparing words and letters: ``(B).`` is ``b``."""
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    return re.sub(r"\s+", " ", text).strip(" .()$").casefold()


def _math_equal(text: str, wanted: str) -> bool:
    """math-verify's verdict. False for what it cannot read, or not within its time."""
    if _EXPLOSIVE.search(text):
        return False
    from math_verify import parse, verify

    # Its own warning about a missing timeout off the main thread would repeat with every row.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    seconds = _timeout()
    gold: Any = parse(f"${wanted}$", parsing_timeout=seconds)
    found: Any = parse(text, parsing_timeout=seconds)
    return bool(gold and found and verify(gold, found, timeout_seconds=seconds))


def _timeout() -> int | None:
    """math-verify times out by SIGALRM, which only a POSIX main thread has; elsewhere it runs untimed."""
    on_main = threading.current_thread() is threading.main_thread()
    return VERIFY_SECONDS if on_main and os.name == "posix" else None

"""What a node that combines results has to look at: what was asked, and the rule with the results in it."""

import re
from collections.abc import Iterable, Sequence
from typing import Final, Protocol

MOST_CHARS: Final = 200
SHORT: Final = 40  # characters of a result that can stand in a formula
_NUMBER: Final = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
# Nothing that makes another value of the number: no second one, no letter at it, no sign, power, fraction or root.
_PLAIN: Final = r"(?:(?!\bpi\b)[^\d\\^/*_+(){}\[\]|√π-])*"
_WORDED: Final = re.compile(rf"{_PLAIN}(?<![A-Za-z])(?P<number>{_NUMBER.pattern})(?![A-Za-z]){_PLAIN}", re.IGNORECASE)
# Two words in a row and a number, in either order.
_WORDS_WITH_NUMBERS: Final = re.compile(r"[A-Za-z]{2,}\s+[A-Za-z]{2,}.*\d|\d.*[A-Za-z]{2,}\s+[A-Za-z]{2,}", re.DOTALL)
_SENTENCE: Final = re.compile(r"(?<=[.?!])\s+(?=\S)")


def asked(task: str) -> str:
    """The last line of ``task`` or, where that is longer than ``MOST_CHARS``, as many of its last sentences as fit.

    The last sentence is there at any length.
    """
    lines = [line.strip() for line in task.splitlines() if line.strip()]
    if not lines or len(lines[-1]) <= MOST_CHARS:
        return lines[-1] if lines else ""
    *others, kept = _SENTENCE.split(lines[-1])
    for sentence in reversed(others):
        if len(sentence) + 1 + len(kept) > MOST_CHARS:
            break
        kept = f"{sentence} {kept}"
    return kept


class Result(Protocol):
    """A conclusion, as far as a rule is concerned."""

    @property
    def id(self) -> str: ...
    @property
    def final(self) -> str: ...
    @property
    def ok(self) -> bool: ...


def with_results(rule: str, results: Iterable[Result]) -> str:
    """``rule`` with a short result in the place of each id that has one: ``c1 + c2`` becomes ``50 + 3``.

    Of a result with words or units around its only number that number stands there.
    """
    known = {one.id: value for one in results if one.ok and 0 < len(value := value_of(one.final)) <= SHORT}
    return re.sub(r"\w+", lambda word: known.get(word[0], word[0]), rule)


def value_of(final: str) -> str:
    """The only number of a result that is otherwise words, units or currency; else the result as it is."""
    told = _WORDED.fullmatch(final.rpartition("=")[2].replace("\\%", "%").replace("\\$", "$"))
    return told["number"].replace(",", "") if told else final


def values_so_far(results: Sequence[Result]) -> str:
    """``c1 = 50, c2 =`` where the second of some results has several numbers in words: the values up to the first such
    result, whose value is left to the reader; "" if there is none, or a long result before it.
    """
    told: list[str] = []
    for one in results:
        value = value_of(one.final)
        if one.ok and _WORDS_WITH_NUMBERS.search(value):
            return ", ".join([*told, f"{one.id} ="])
        if len(value) > SHORT:
            return ""
        told.append(f"{one.id} = {value}")
    return ""


def first_step(sum_: str) -> str:
    """``1 + 2 =`` for ``1 + 2 + 3``, and so for any sum and difference of numbers; "" for everything else."""
    terms = re.split(r"(?<=\d)\s*([+-])\s*", sum_.strip())
    numbers = all(_NUMBER.fullmatch(term) for term in terms[::2])
    return f"{terms[0]} {terms[1]} {terms[2]} =" if len(terms) > 4 and numbers else ""

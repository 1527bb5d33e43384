# ruff: noqa: RUF001
r"""One notation for an answer: the spellings that mean the same, and that math-verify reads wrongly or not at all.

`to_latex` turns Unicode mathematics (``½``, ``x²``, ``√2``, ``≤``, fullwidth digits), programmers' spellings (``2**3``,
``1.5e-7``), mixed numbers (``1 1/2``), repeating decimals and number words (``3 million``) into LaTeX. `same_text` says
whether two answers are the same but for layout.
"""

import re
import unicodedata
from collections.abc import Callable

_SYMBOLS = {
    **dict.fromkeys("\u2212\ufe63\uff0d\u2010\u2011", "-"),
    "×": r"\times ",
    "÷": r"\div ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∗": "*",
    "∕": "/",
    "⁄": "/",
    "∶": ":",
    "±": r"\pm ",
    "∓": r"\mp ",
    "√": r"\sqrt ",
    "∛": r"\sqrt[3] ",
    "∞": r"\infty ",
    "π": r"\pi ",
    "°": r"^{\circ}",
    "≤": r"\le ",
    "≥": r"\ge ",
    "⩽": r"\le ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "⟨": r"\langle ",
    "⟩": r"\rangle ",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}",
    "ℚ": r"\mathbb{Q}",
    "ℂ": r"\mathbb{C}",
    "′": "'",
    "’": "'",
    "‘": "'",
    "“": '"',
    "”": '"',
    "…": r"\ldots ",
    **dict.fromkeys("\u00a0\u2007\u2009\u200a\u202f\u205f\u2002\u2003", " "),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u200e\u200f", ""),
}
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()", strict=True))
_WORDS = {"dozen": "12", "hundred": "10^{2}", "thousand": "10^{3}", "million": "10^{6}", "billion": "10^{9}"}
_WORDS["trillion"] = "10^{12}"

_UNICODE = re.compile(r"[^\x00-\x7f]+")
_SCRIPTS = re.compile(f"([{''.join(_RAISED)}]+)|([{''.join(_LOWERED)}]+)")
_ROOT = re.compile(r"(\\sqrt(?:\[3\])?) (\d+(?:\.\d+)?|[A-Za-z]|\((?:[^()]|\([^()]*\))*\))")
_TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf)|mbox|operatorname)\s*"
_REWRITTEN: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?"), ""),
    (re.compile(r"\\varnothing(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\ce\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\\$|[€£¥]\s?(?=\d)"), ""),
    (re.compile(r"(?<=\d)(?:\{,\}|(?<!\\)\\[,!;: ]|\\!,\\!|,\\!|\\!,)\s?(?=\d{3}(?!\d))"), ","),
    (re.compile(r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![A-Za-z])|\\displaystyle(?![A-Za-z])"), " "),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (
        re.compile(rf"(?<=\d)\s*(?:{_TEXT}\{{\s*)?\b([AaPp])\.?\s?[Mm](?:\.|\b)\s*\}}?"),
        lambda m: rf"\text{{ {m[1].lower()}m}}",
    ),
    (re.compile(rf"{_TEXT}\{{\s*(?=[-+$]?\d)([^{{}}]*)\}}"), r"\1"),  # "\text{5 cm}"
    (re.compile(r"(?<![\d.,])(\d{1,3})((?: \d{3})+)(?![\d.,])"), lambda m: m[1] + m[2].replace(" ", "")),
    (re.compile(r"\*\*\s*(-?\w+|\([^()]*\))"), r"^{\1}"),
    (re.compile(r"(?<![\w.])(-?\d+(?:\.\d+)?)[eE]([-+]?\d+)(?![\w.])"), r"\1 \\times 10^{\2}"),
    (re.compile(r"(?<![\w./])(\d+) (\d+)/(\d+)(?![\w./])"), r"\1\\frac{\2}{\3}"),
    (
        re.compile(r"(?<![\w.])(\d{0,40})\.(\d{0,40})\\(?:overline|bar|dot)\s*\{?(\d{1,40})\}?"),
        lambda m: _repeating(*m.groups()),
    ),
    (re.compile(r"(?<![\w:.])(\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?){2,})(?![\w:.])"), lambda m: _ratio(m[1])),
    (
        re.compile(rf"(?<=[\d.])\s*(?:{_TEXT}\{{\s*)?\b({'|'.join(_WORDS)})s?\b\s*\}}?"),
        lambda m: rf" \times {_WORDS[m[1]]} ",
    ),
]  # fmt: skip
_UNITS = {
    unit: short
    for short, units in {
        "mm": "mm millimeter millimetre", "cm": "cm centimeter centimetre", "m": "m meter metre",
        "km": "km kilometer kilometre", "in": "in inch inche", "ft": "ft foot feet", "yd": "yd yard", "mi": "mi mile",
        "mg": "mg milligram", "g": "g gram", "kg": "kg kilogram", "oz": "oz ounce", "lb": "lb pound",
        "s": "s sec second", "min": "min minute", "h": "h hr hour", "day": "day", "week": "week", "month": "month",
        "year": "yr year", "ml": "ml milliliter millilitre", "l": "l liter litre", "cent": "cent", "dollar": "dollar",
    }.items()
    for unit in units.split()
}  # fmt: skip
# A unit, and no variable, is a text after something, or a common or long word after a number without letters.
_TEXT_UNIT = re.compile(rf"(?<=[\w}})\] %])\s*(?:[ ~/]*{_TEXT}\{{[^{{}}\d]*\}}(?:\^\{{?-?\d\}}?)?)+\s*$")
_WORD_UNIT = re.compile(
    r"^((?:[^A-Za-z\\]|\\[A-Za-z]+)+(?<=[\d}]))(?:([a-z]{2,})|\s([a-z]+)(?:\s[a-z]+){0,2})(?:\^\{?[23]\}?)?$"
)
_UNIT = re.compile(rf"[\d}}]\s*(?:{_TEXT}\{{\s*)?([a-z]+?)s?(?![a-z])")
_COUNTED = re.compile(r"[\d}]\s*((?:[A-Za-z]+[\s-]+){0,3}[A-Za-z]{2,})[\s.!]*$")
_SIGN = re.compile(r"[\d}]\s*(?:(\\?%|\bpercent\b)|\^\{?\\circ\}?|\bdegrees?\b)")
_BASE = re.compile(r"\d_\{?(\d+)\}?(?!\w)")
_PLURAL = re.compile(r"(?:(?<=[sxzh])es|ies|y|s)$")
_NO_NOUN = frozenset(["and", "or", "per", "mod", "pi", "to", "of", "in", "unit", "units", "mph", "kph", "total"])
_UNWRAPPED = re.compile(_TEXT + r"\{([^{}]*)\}")
_BLANK = re.compile(r"(?<![A-Za-z0-9,])\s+|\s+(?![A-Za-z0-9])")


def to_latex(text: str) -> str:
    """``text`` in the LaTeX that math-verify reads as what was meant."""
    text = _UNICODE.sub(lambda found: _ascii(found[0]), text)
    text = _ROOT.sub(lambda found: f"{found[1]}{{{found[2].removeprefix('(').removesuffix(')')}}}", text)
    for pattern, put in _REWRITTEN:
        text = pattern.sub(put, text)
    return " ".join(text.split())


def same_text(one: str, other: str) -> bool:
    """Whether two answers in `to_latex`'s notation are the same letter by letter, but for spaces and text fonts."""
    return bool(plain := _squeezed(one)) and plain == _squeezed(other)


def without_unit(text: str) -> str:
    """``text`` without a unit at its end; math-verify by itself would take the variable of ``5h`` for hours."""
    text = _TEXT_UNIT.sub("", text)
    if (found := _WORD_UNIT.match(text)) and (
        (unit := found[2] or found[3]).removesuffix("s") in _UNITS or len(unit) > 3
    ):
        return found[1]
    return text


def units_of(text: str) -> list[str]:
    """The common units after its numbers, in their short form."""
    return [_UNITS[unit] for unit in _UNIT.findall(text.lower()) if unit in _UNITS]


def same_measure(one: str, other: str) -> bool:
    """Whether two numbers, as far as both say it, count or measure the same: base, percent, degrees, or a noun.

    The last word of one has to be among those after the number in the other: ``7 days`` and ``7 whole days`` agree,
    ``7 days`` and ``7 distinct integers`` do not, and a number in base 8 has no unit at all.
    """
    mine, others = _measure(one), _measure(other)
    return not mine or not others or mine[-1] in others or others[-1] in mine


def _measure(text: str) -> list[str]:
    """The words that follow the last number of a text; none: []."""
    if bases := _BASE.findall(text):
        return [f"base {bases}"]
    if sign := _SIGN.search(text):
        return ["%" if sign[1] else "degree"]
    found = _COUNTED.search(_UNWRAPPED.sub(r" \1 ", text).lower())
    words = re.findall("[a-z]+", found[1]) if found else []
    if _NO_NOUN.intersection(words):
        return []
    return [_UNITS.get(word) or _UNITS.get(word.removesuffix("s")) or _PLURAL.sub("", word) for word in words]


def words_of(text: str) -> str:
    """For comparing words and choices: ``\\text{(B)}.`` is ``b``."""
    text = " ".join(_UNWRAPPED.sub(r"\\1 ".replace("\\\\", "\\"), text).split()).strip(" .,;:!$").casefold()
    return text[1:-1].strip() if text.startswith("(") and text.endswith(")") else text


def _squeezed(text: str) -> str:
    return _BLANK.sub("", _UNWRAPPED.sub(r"\1", text)).rstrip(".,;:")


def _script(found: re.Match[str]) -> str:
    """A run of superscripts or of subscripts."""
    mark, letters, run = ("^", _RAISED, found[1]) if found[1] else ("_", _LOWERED, found[2])
    return f"{mark}{{{''.join(letters[char] for char in run)}}}"


def _ascii(text: str) -> str:
    """A run of characters beyond ASCII."""
    text = _SCRIPTS.sub(_script, text)
    return "".join(map(_ascii_character, text))


def _ascii_character(char: str) -> str:
    if char in _SYMBOLS:
        return _SYMBOLS[char]
    if char.isdecimal():
        return str(unicodedata.decimal(char))
    wide = unicodedata.normalize("NFKC", char)
    if "⁄" in wide:  # a vulgar fraction
        over, _, under = wide.partition("⁄")
        return rf"\frac{{{over}}}{{{under or 1}}}"
    return wide if wide.isascii() else char


def _repeating(whole: str, fixed: str, repeated: str) -> str:
    """``0.1\\overline{6}`` as the fraction that it is: (16 - 1) / 90."""
    over = int(whole + fixed + repeated or "0") - int(whole + fixed or "0")
    return rf"\frac{{{over}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"


def _ratio(text: str) -> str:
    """``1:2:3`` as a tuple: a chain of divisions would lose the order."""
    return f"({', '.join(part.strip() for part in text.split(':'))})"

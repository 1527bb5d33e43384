"""The final answer in a text: the last ``FINAL: ...`` or ``\\boxed{...}``."""

import re

_FINAL = re.compile(r"(?:\bFINAL(?: ANSWER)?|\b[Ff]inal [Aa]nswer)\b[*_ \t]*[:=]")
_BOXED = "\\boxed{"
_MAX_BOXED_CHARS = 2000
_LEADING = re.compile(r"(?:[\s*_$`\"']|\\[(\[])*")
_MARKUP = " \t\r\n*_$`\"'.,;:"
_CLOSED_BY = {"}": "{}", ")": "([)]", "]": "([)]"}  # with their openers; "[1, 2)" is balanced


def extract_final(text: str) -> str | None:
    """The last ``FINAL: ...`` (to the end of its line, without markup) or the last balanced ``\\boxed{...}``.

    Whichever comes last in ``text`` counts; None if there is neither, or nothing but markup in them.
    """
    best, at = None, -1
    for head in reversed(list(_FINAL.finditer(text))):
        line_end = text.find("\n", head.end())
        if value := _unopened(text[head.end() : line_end if line_end >= 0 else None]):
            best, at = value, head.start()
            break
    start = text.rfind(_BOXED)
    while start > at:
        if value := _strip(_braced(text, start + len(_BOXED))):
            return value
        start = text.rfind(_BOXED, 0, start)
    return best


def _braced(text: str, start: int) -> str:
    """The text from ``start`` to the brace that closes the one before it, "" if there is none."""
    depth, escaped = 1, False
    for at in range(start, min(len(text), start + _MAX_BOXED_CHARS)):
        char = text[at]
        if escaped:
            escaped = False
        elif char == "\\":
            escaped = True
        elif char in "{}":
            depth += 1 if char == "{" else -1
            if depth == 0:
                return text[start:at]
    return ""


def _strip(value: str) -> str:
    """``value`` without the markup around it."""
    if leading := _LEADING.match(value):
        value = value[leading.end() :]
    while (shorter := value.rstrip(_MARKUP).removesuffix("\\)").removesuffix("\\]")) != value:
        value = shorter
    return value


def _unopened(value: str) -> str:
    """`_strip`, and without closing brackets at the end that nothing in ``value`` opened."""
    value = _strip(value)
    while kinds := _CLOSED_BY.get(value[-1:]):
        openers, closers = kinds[: len(kinds) // 2], kinds[len(kinds) // 2 :]
        if sum(map(value.count, openers)) >= sum(map(value.count, closers)):
            break
        value = _strip(value[:-1])
    return value

r"""The answer that a text marks as final: the last ``FINAL: ...``, *Final Answer* heading or ``\boxed{...}``."""

import re
from collections.abc import Iterator
from itertools import pairwise

_FINAL = re.compile(
    r"\b(?:FINAL(?: ANSWER)?|[Ff]inal [Aa]nswer)\b[*_ \t]*[:：=]"  # noqa: RUF001
    r"|^[^\w\n]*(?i:(?:the )?final(?: answer)?)[*_ \t]*[:：]"  # noqa: RUF001
    r"|^[^\w\n]*(?i:(?:the )?final answer)[^\w\n]*$",  # a heading
    re.MULTILINE,
)
# Of a text that repeats what it was told to write.
_PLACEHOLDER = re.compile(r"[<\[(]?(?:(?:the|your|bare|final|my)\s)*(?:answer|result)[>\])]?|[.…_?\s]+", re.IGNORECASE)
_EXAMPLE = re.compile(
    r"(?:\be\.g\.|\bfor (?:example|instance)\b|\bsuch as\b|\bin the form\b|\bformat\b)[^.]*$", re.IGNORECASE
)
_BOX_OR_BRACE = re.compile(r"\\+f?box(?:ed)?\s*\{|\\[\s\S]|[{}]")
_MOST_CHARS = 20_000  # of an answer
_BETWEEN_BOXES = re.compile(r"(?:[\s$]|\\[)\]])*(?:,|;|,?\s*\b(?:and|or)\b)(?:[\s$]|\\[(\[]|[a-z]\s*=)*")
_DISPLAY = re.compile(r"[\s*_#>`]*(\$\$|\\\[)")
_PAIRS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ('"', '"'), ("'", "'"), ("“", "”"), ("<", ">"))
_TRAILING = re.compile(r"(?:\\[,;:! ]|[.,;:\s])+\Z")
_CLOSED_BY = {"}": "{}", ")": "([)]", "]": "([)]"}  # with their openers; "[1, 2)" is balanced


def extract_final(text: str) -> str | None:
    r"""What the text gives as its final answer, without markup; None if it names none.

    That is what follows the last ``FINAL:`` or ``Final answer:`` (to the end of the line, else on the next one),
    below the last heading *Final Answer*, or in the last balanced ``\boxed{...}``, whichever begins last. Boxes
    joined by a comma, "and" or "or" are one list.
    """
    best, at = _last_stated(text)
    boxes = [box for box in _boxes(text) if strip_markup(text[box[1] : box[2]])]
    if not boxes or boxes[-1][0] < at:
        return best
    listed = [boxes[-1]]
    for one, following in reversed(list(pairwise(boxes))):
        if not _BETWEEN_BOXES.fullmatch(text, one[2] + 1, following[0]):
            break
        listed.insert(0, one)
    return ", ".join(dict.fromkeys(strip_markup(text[begin:end]) for _, begin, end in listed))


def stated(text: str, heads: re.Pattern[str]) -> Iterator[tuple[str, int, int]]:
    """What follows each of the ``heads`` that something follows, the last one first: the rest of the line or the next
    line, and where the head begins and ends."""
    for head in reversed(list(heads.finditer(text))):
        if value := _following(text, head.end()):
            yield value, head.start(), head.end()


def _last_stated(text: str) -> tuple[str | None, int]:
    """The last final answer that is one, and where its head begins (-1: there is none)."""
    for value, begin, end in stated(text, _FINAL):
        line = text[text.rfind("\n", 0, begin) + 1 : begin]
        rest = text[end:].partition("\n")[0].strip()
        placeholder = _PLACEHOLDER.fullmatch(value) or (rest and _PLACEHOLDER.fullmatch(rest))
        if not placeholder and not _EXAMPLE.search(line):
            return value, begin
    return None, -1


def _following(text: str, at: int) -> str:
    """The rest of the line, or a display formula that begins there; the next line if this one is blank."""
    if display := _DISPLAY.match(text, at):
        end = text.find(display[1].replace("[", "]"), display.end())
        if end > 0 and (value := strip_markup(" ".join(text[display.end() : end].split()))):
            return value
    while at < len(text):
        end = text.find("\n", at)
        line = text[at : end if end >= 0 else None][:_MOST_CHARS]
        at = end + 1 if end >= 0 else len(text)
        if value := _unopened(line):
            return "" if value.startswith('{"') else value  # an event is no answer
    return ""


def _boxes(text: str) -> Iterator[tuple[int, int, int]]:
    """Where each balanced box begins, and its content begins and ends; in the order in which the boxes begin."""
    if "box" not in text:
        return
    found: list[tuple[int, int, int]] = []
    opened: list[tuple[int, int] | None] = []
    for token in _BOX_OR_BRACE.finditer(text):
        if token[0].endswith("}") and token[0][0] != "\\":
            if opened and (box := opened.pop()) and token.start() - box[1] <= _MOST_CHARS:
                found.append((*box, token.start()))
        elif token[0] == "{":
            opened.append(None)
        elif token[0].endswith("{") and len(token[0]) > 2:
            opened.append((token.start(), token.end()))
    yield from sorted(found)


def strip_markup(value: str) -> str:
    """``value`` without the markup around it: emphasis, quotes and formula signs that belong together."""
    before = None
    while value != before:
        before = value
        value = _TRAILING.sub("", value.strip(" \t\r\n*_`"))
        for opener, closer in _PAIRS:
            value = _unwrap(value, opener, closer)
    return value


def _unwrap(value: str, opener: str, closer: str) -> str:
    """``value`` without this pair around it, or without the half of a pair at one end."""
    inner = value[len(opener) : -len(closer)]
    if value.startswith(opener) and value.endswith(closer) and len(value) > len(opener):
        return value if opener in inner or closer in inner or (opener == "<" and "," in inner) else inner
    if opener in "<'":
        return value  # a comparison, a derivative
    alone = value.count(opener) % 2 if opener == closer else value.count(opener) != value.count(closer)
    return value.removeprefix(opener).removesuffix(closer) if alone else value


def _unopened(value: str) -> str:
    """`strip_markup`, and without closing brackets at the end that nothing in ``value`` opened."""
    value = strip_markup(value)
    while kinds := _CLOSED_BY.get(value[-1:]):
        openers, closers = kinds[: len(kinds) // 2], kinds[len(kinds) // 2 :]
        unopened = sum(map(value.count, closers)) - sum(map(value.count, openers))
        if unopened <= 0:
            break
        closing = len(value) - len(value.rstrip(value[-1]))
        value = strip_markup(value[: -min(unopened, closing)])
    return value

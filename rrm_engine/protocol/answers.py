r"""What a text gives as its answer, read in one order wherever an answer is needed, first match wins:

1. what it marks as its final one (`extract_final`): ``FINAL: x``, *Final Answer*, ``\boxed{x}``;
2. what it calls its answer: the last line ``Answer: x`` or sentence "the answer is x";
3. how it ends: with a number that stands alone or after a label, an equals sign or "is", or with a formula alone.

2 and 3 are for texts that came to their end, without thinking. They are not taken where the words around say that it is
no answer: a condition, an example, a quotation, a negation, a question, or a second thought after it.
"""

import re

from rrm_engine.protocol.final import extract_final, stated, strip_markup

MOST_SENTENCES = 2  # of a text in brief
_MOST_CHARS = 400  # of a text in brief beside its answer
_MOST_VALUE = 200  # characters of an answer that is only called one

_ANSWER = re.compile(
    r"^[^\w\n>]*(?i:(?:(?:the|my|our) )?(?:correct |final )?answer)[*_ \t]*[:：=]"  # noqa: RUF001
    r"|\b(?i:(?:the|my|our|its|correct|final|required|desired) answer\b[^.:=,\n?]{0,60}?|(?<!to )answer)"
    r"\s(?i:is)\b[*_ \t]*[:：]?",  # noqa: RUF001
    re.MULTILINE,
)
_SENTENCE_END = re.compile(r"\.(?=\s+[A-Z])|,?\s+(?:because|since)\b")
_ADVERBS = re.compile(
    r"^(?:(?:therefore|thus|hence|then|simply|just|indeed|clearly|again|exactly|equal to|given by|as follows)\b"
    r"[,:]?\s*)+",
    re.IGNORECASE,
)
_CONDITION = re.compile(
    r"\b(?:if|suppose|assum\w+|whether|unless|claim\w*|might|may|maybe|perhaps|example|instance|e\.g|such as|not|why|"
    r"says?|said|ask\w*|check that|show that|prove that)\b",
    re.IGNORECASE,
)
_SECOND_THOUGHT = re.compile(
    r"\b(?:wait|hm+|actually|oops|reconsider|recompute|mistake|error|wrong|incorrect|however)\b", re.IGNORECASE
)
_NEGATION = re.compile(r"(?:not|isn't|never|neither|nowhere|cannot|no longer)\b", re.IGNORECASE)
# Words that an answer does not begin with, and words that are none by themselves.
_PROSE = re.compile(
    r"(?:the|an?|in|on|at|of|to|as|by|for|from|that|this|these|its?|we|let|let's|first|because|since|then|so|given|found|"
    r"obtained|asked|required|expected|either|how|what|when|which|where|who|your|my|our|solve|find|compute|calculate|"
    r"consider|now|you|i|if|here|there|following|likely|probably|between|more|less)\b[,.:;]?\s",
    re.IGNORECASE,
)
_SAYS_NOTHING = re.compile(
    r"(?:in)?correct|wrong|unknown|unclear|obvious|clear|simple|unique|near|close|done|here|below|above|needed|given|"
    r"found|required|answer|number|result|value",
    re.IGNORECASE,
)
_OBJECT = re.compile(
    r"the (?:ordered )?(?:set|interval|pair|triple|tuple|point|number|integer|fraction|vector|matrix|polynomial|line|"
    r"circle|function|value|letter|word|option|choice)\s\S",
    re.IGNORECASE,
)

_NUMBER = r"[-+−]?\s?[$€£]?\s?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s?/\s?\d+)?"  # noqa: RUF001
_NO_UNIT = (
    r"(?:more|less|fewer|times|than|of|and|or|but|as|is|are|was|to|in|on|at|by|for|from|with|which|that|not|plus|minus|"
    r"so|we|if)\b"
)
_UNIT = rf"\s(?!{_NO_UNIT})(?:[A-Za-z]{{2,20}}|[mshgLNJWVAKCF])\b"
_VALUE = rf"{_NUMBER}(?:\s?(?:\\?%|°|\^\\circ|\^\{{\\circ\}}))?(?:{_UNIT}){{0,3}}"
_NO_LABEL = (
    r"(?:answer|find|solve|problem|question|step|part|case|example|exercise|note|hint|check|given|let|if|suppose)\b"
)
_LABEL = rf"(?:(?!(?i:{_NO_LABEL}))[A-Za-z][\w '()]{{0,40}}\s?[=:]\s?)?"
_BARE = re.compile(rf"{_LABEL}({_VALUE})")
_RIGHT_SIDE = re.compile(
    rf"(?:=|≈|\\approx\b|\b(?:is|are|equals|gives|get|has|have|was|totals?|total of)\b)\s*[*$]*({_VALUE})"
)
_FORMULA = re.compile(r"\$\$?[^$]+\$\$?|\\\([^\n]+?\\\)|\\\[[\s\S]+?\\\]")
_DISPLAY_AT_END = re.compile(r"(?:\$\$([^$]+)\$\$|\\\[((?:(?!\\\[)[\s\S])+?)\\\])[\s*_.]*\Z")
_BULLET = re.compile(r"\s*(?:[-*•]|\d+[.)])\s")
_BEGINNING = re.compile(r"^(?:so|thus|therefore|hence|then|finally|and|in total|total)\b[,:]?\s*", re.IGNORECASE)
_SENTENCES = re.compile(r"(?<=[.!?])[\"')\]*_]*\s+(?=[A-Z0-9$\\(\"'*“-])|\n+")


def read_answer(text: str) -> str | None:
    """What ``text``, which came to its end and has no thinking in it, gives as its answer; None if it gives none."""
    final = extract_final(text)
    if final is not None:
        return _called(final) or final
    return _called(text) or _ending(text)


def in_brief(text: str) -> str:
    """``text`` for a node that needs its answer: at most `MOST_SENTENCES` sentences, then the answer.

    A text as short as that stays as it is. Of a longer one its answer is left, or its last sentences where none can
    be read. `read_answer` reads the same in it.
    """
    text = text.strip()
    sentences = [part for part in _SENTENCES.split(text) if part.strip()]
    answer = read_answer(text)
    if len(text) <= _MOST_CHARS and len(sentences) <= MOST_SENTENCES + (answer is not None):
        return text
    if answer is not None:
        return f"FINAL: {answer}"
    return _without_beginning(text[text.rfind(sentences[-MOST_SENTENCES:][0]) :])


def _without_beginning(text: str) -> str:
    """The end of a ``text`` that is too long, from the beginning of a word on."""
    if len(text) <= _MOST_CHARS:
        return text
    return text[-_MOST_CHARS:].partition(" ")[2].strip() or text[-_MOST_CHARS:].strip()


def _called(text: str) -> str | None:
    """What the text says its answer is, if nothing around says otherwise."""
    for value, begin, end in stated(text, _ANSWER):
        line = text[text.rfind("\n", 0, begin) + 1 : begin]
        sentence = re.split(r"[.!?]\s", line)[-1]
        value = strip_markup(_SENTENCE_END.split(_ADVERBS.sub("", value), maxsplit=1)[0])
        quoted = line.lstrip().startswith(">") or line.endswith(('"', "“"))
        if quoted or _CONDITION.search(sentence) or not _may_be_answer(value):
            continue
        return None if _SECOND_THOUGHT.search(text, end) else value
    return None


def _may_be_answer(value: str) -> bool:
    if not value or len(value) > _MOST_VALUE or value.endswith("?") or _NEGATION.match(value):
        return False
    wordy = len(value.split()) > 12 and not re.search(r"[\d$\\]", value)
    prose = _PROSE.match(value) is not None and not _OBJECT.match(value)
    return not wordy and not prose and not _SAYS_NOTHING.fullmatch(value)


def _ending(text: str) -> str | None:
    """The value that the text ends with."""
    if display := _DISPLAY_AT_END.search(text):
        formula = " ".join((display[1] or display[2]).split())
        return strip_markup(formula.rpartition("=")[2]) or None
    lines = [line for line in text.splitlines() if strip_markup(line)]
    if not lines or any(map(_BULLET.match, lines[-2:])):
        return None
    line = strip_markup(lines[-1])
    if line.startswith(("{", "`", ">", "#")) or line.endswith("?"):
        return None
    last = re.split(r"(?<=[^\d\s])\.\s|(?<=\d)\.\s+(?=[A-Z])", line)[-1]
    last = strip_markup(_BEGINNING.sub("", last))
    if found := _BARE.fullmatch(last):
        return strip_markup(found[1])
    if _FORMULA.fullmatch(last):
        return strip_markup(strip_markup(last).rpartition("=")[2]) or None
    sides = list(_RIGHT_SIDE.finditer(last))
    if sides and not last[sides[-1].end() :].strip(" .*$_!") and not _CONDITION.search(last):
        return strip_markup(sides[-1][1])
    return None

"""Which piece of a problem a few words such as "question (2)" point at."""

import re
from itertools import pairwise
from typing import Final

_ITEM: Final = re.compile(r"\s*\(?(\d{1,2}|[a-z])[).]\s+\S")
_LABELLED: Final = r"\b(?:question|problem|part|item|number)s?\s+\(?(\d{1,2}|[a-z])\b"
_NAMED: Final = re.compile(rf"\((\d{{1,2}}|[a-z])\)|{_LABELLED}", re.IGNORECASE)
# What in an item may speak of another one.
_OTHERS: Final = re.compile(
    rf"{_NAMED.pattern}|\b(?:above|previous|preceding|former|latter|both|other|first|last|second) "
    r"(?:answer|result|question|problem|part|item)s?\b",
    re.IGNORECASE,
)
# A sentence after a list that only says what to do with the answers. Others may hold what all items need.
_ASKS: Final = re.compile(
    r"(?:(?:then|finally|and),? )?"
    r"(?:solve|answer|report|give|add|return|state|write|find|compute|calculate|what (?:is|are))\b"
    r".*\b(?:answers?|results?|sum|total|product|difference|average|them|all|both|each)\b.*",
    re.IGNORECASE,
)
_SENTENCE: Final = re.compile(r"(?<=[.?!])\s+")


def pointed_at(task: str, problem: str) -> str:
    """The item of a list in ``problem`` that ``task`` names, after what stands in front of the list.

    A list has its items on neighbouring lines, one line each, numbered from 1 or a on. "" where ``problem`` has no such
    list, ``task`` does not name exactly one item of it, the item seems to speak of others, or what follows the list is
    more than a request for the answers: then nothing but the whole problem is certain to say what is meant.
    """
    lines = [line for line in problem.splitlines() if line.strip()]
    labels = {i: found[1] for i, line in enumerate(lines) if (found := _ITEM.match(line))}
    named = {label.lower() for pair in _NAMED.findall(task) for label in pair if label}
    places = [i for i, label in labels.items() if label in named]
    if len(named) != 1 or len(places) != 1 or not _is_list(labels):
        return ""
    item = lines[places[0]].strip()
    tail = _SENTENCE.split(" ".join(lines[max(labels) + 1 :]).strip())
    if _OTHERS.search(item.split(maxsplit=1)[1]) or not all(_ASKS.fullmatch(one) for one in tail if one):
        return ""
    return "\n".join([*lines[: min(labels)], item])


def _is_list(labels: dict[int, str]) -> bool:
    """Whether these lines, with these labels, are neighbours and count from 1 or a on."""
    numbers = [int(label) if label.isdigit() else ord(label) - ord("a") + 1 for label in labels.values()]
    neighbours = all(after == before + 1 for before, after in pairwise(labels))
    kinds = {label.isdigit() for label in labels.values()}
    return len(labels) > 1 and neighbours and len(kinds) == 1 and numbers == list(range(1, len(labels) + 1))

"""Tokens of text in which only the template's own words may become control tokens.

What was given or written (tasks, conclusions, notes, rules, ids) is `Content`. Where it spells a control token it is
cut after the first character of that, and the parts are tokenised one by one; all other text is tokenised as one, so
that its tokens are those of the whole.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Final

UNKNOWN: Final = "\ufffd"
# Text put after one of these is tokenised as in the middle of a text; one that does not merge with it is taken.
_GUARDS: Final = ("a", "\n", ".", "0", "é")
_MARKUP: Final = re.compile(r"[<\[{(|◁].*[>\]})|▷]", re.DOTALL)
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class Content(str):
    """Text without any markup: none of it becomes a control token."""

    __slots__ = ()


class TextEncoder:
    """Encodes text of templates and content, for a Hugging Face fast tokenizer.

    Control tokens are the special ones and those added ones that look like markup or stand in ``template``, the source
    of a chat template: ``<think>``, ``[INST]``, but neither words nor white space.
    """

    def __init__(self, tokenizer: Any, template: str = "") -> None:
        self._tokenizer = tokenizer
        core = tokenizer.backend_tokenizer
        added = core.get_added_tokens_decoder()
        self.control_ids = frozenset(
            token for token, one in added.items() if one.special or _is_control(one.content, template)
        )
        # What a character that the vocabulary lacks becomes; a model of bytes has none, whatever its tokenizer says.
        self._unknown_text = getattr(core.model, "unk_token", tokenizer.unk_token)
        self._unknown = core.token_to_id(self._unknown_text) if self._unknown_text else None
        # Pieces that stand for bytes; only a vocabulary that lists them as text finds them in text.
        names = (f"<0x{byte:02X}>" for byte in range(256))
        self._bytes = frozenset(token for name in names if (token := core.token_to_id(name)) is not None)

    def __call__(self, texts: Iterable[str], *, continues: bool = False) -> list[int]:
        """The ids of ``texts`` one after the other; ``continues``: they follow other text."""
        texts = [text for text in texts if text]
        edges = [0]
        for text in texts:
            edges.append(edges[-1] + len(text))
        contents = [isinstance(text, Content) for text in texts]
        text, cuts = "".join(texts), {0, edges[-1]}
        while True:
            ids: list[int] = []
            found: list[tuple[int, int]] = []
            for start, stop in pairwise(sorted(cuts)):
                part, places = self._encode(text[start:stop], continues or start > 0)
                ids += part
                places = [(start + first, start + last) for first, last in places]
                spelled = (
                    place for token, place in zip(part, places, strict=True) if self._spells(token, text, *place)
                )
                found += [place for place in spelled if _inside(*place, text, edges, contents)]
            if not found:
                return ids
            for start, stop in found:
                if stop - start == 1:  # a control token of one character: nothing else spells that
                    text = f"{text[:start]}{UNKNOWN}{text[stop:]}"
                cuts.add(start + 1)

    def _spells(self, token: int, text: str, start: int, stop: int) -> bool:
        """Whether the ``text`` there became ``token`` because it spells it, and should not have."""
        if token == self._unknown:
            return text[start:stop].strip() == self._unknown_text
        if token in self.control_ids:
            return text[start:stop] != UNKNOWN
        return token in self._bytes and bool(_BYTE_TOKEN.fullmatch(text, start, stop))

    def _encode(self, text: str, continues: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and places in ``text``, without what a tokenizer puts before a first word if it ``continues``."""
        if continues:
            for guard in _GUARDS:
                alone, (ids, places) = self._tokenize(guard)[0], self._tokenize(guard + text)
                count, size = len(alone), len(guard)
                apart = all(last <= size for _, last in places[:count]) and all(
                    first >= size for first, _ in places[count:]
                )
                if alone and ids[:count] == alone and apart:
                    return ids[count:], [(first - size, last - size) for first, last in places[count:]]
        return self._tokenize(text)

    def _tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(found["input_ids"]), list(found["offset_mapping"])


def _is_control(added: str, template: str) -> bool:
    """Whether an added token that is not special is no text all the same."""
    if not added.strip(" \t\r\n▁") or re.fullmatch(r"\w+", added):
        return False
    return bool(_MARKUP.fullmatch(added)) or added in template


def _inside(start: int, stop: int, text: str, edges: Sequence[int], contents: Sequence[bool]) -> bool:
    """Whether any of the place ``start`` to ``stop``, white space around it aside, lies in content."""
    while start < stop - 1 and text[start].isspace():
        start += 1
    while start < stop - 1 and text[stop - 1].isspace():
        stop -= 1
    first, last = (bisect_right(edges, place) - 1 for place in (start, max(start, stop - 1)))
    return any(contents[first : last + 1])

"""Text of tokens as they come: the pieces add up to what the tokenizer makes of all the tokens at once.

A piece is given out when nothing that may follow can change it. Three things can: the rest of a character whose first
bytes have come; one more byte in a run of SentencePiece's byte tokens, of which an invalid run is U+FFFD throughout;
and, where spaces are cleaned up, what follows a space.
"""

import codecs
import json
import re
from functools import cache
from typing import Any, Final

UNKNOWN: Final = "\ufffd"
_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# `clean_up_tokenization` of transformers replaces sequences of these characters, each beginning with a space.
_CLEANED: Final = re.compile(r" [ .?!,'ntmsver]*\Z")


class Detokenizer:
    """The text of one sequence of tokens, each token looked at a bounded number of times.

    ``tokenizer`` is a Hugging Face fast tokenizer. All pieces that `step` returns and that of `end` are together
    ``tokenizer.decode(tokens, skip_special_tokens=...)``. Ids the tokenizer does not know have no text.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = False) -> None:
        self._stream = _stream(tokenizer, skip_special_tokens)
        self._clean_up = tokenizer.clean_up_tokenization if _cleans_up(tokenizer) else None
        self._held = ""  # text whose spaces may still be cleaned up

    def step(self, token: int) -> str:
        """The text that is certain now that ``token`` has come."""
        return self._certain(self._stream.step(token))

    def end(self) -> str:
        """The text that was held back, for nothing follows any more."""
        rest = self._held + self._stream.end()
        self._held = ""
        return self._clean_up(rest) if self._clean_up else rest

    def _certain(self, piece: str) -> str:
        if self._clean_up is None or not piece:
            return piece
        text = self._held + piece
        open_end = _CLEANED.search(text)
        cut = open_end.start() if open_end else len(text)
        self._held = text[cut:]
        return str(self._clean_up(text[:cut]))


class _Bytes:
    """Byte-level tokens: what they stand for is one string of UTF-8, broken characters being U+FFFD."""

    def __init__(self, core: Any, skip_special_tokens: bool) -> None:
        self._core = core
        self._hidden = _specials(core) if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, token: int) -> str:
        name = self._core.id_to_token(token)
        return "" if name is None or token in self._hidden else self._utf8.decode(_bytes_of(name))

    def end(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Windows:
    """Tokens of any other kind, decoded after the ones that gave the last piece, so that they are not taken for the
    beginning of the text.
    """

    def __init__(self, core: Any, skip_special_tokens: bool, inner_bytes: bool) -> None:
        self._core = core
        self._hidden = _specials(core) if skip_special_tokens else frozenset()
        self._inner_bytes = inner_bytes  # a byte-level decoder is one of several
        self._before: list[int] = []
        self._pending: list[int] = []

    def step(self, token: int) -> str:
        name = self._core.id_to_token(token)
        if name is None or token in self._hidden:
            return ""
        self._pending.append(token)
        return "" if _BYTE_TOKEN.fullmatch(name) else self._piece(last=False)

    def end(self) -> str:
        return self._piece(last=True)

    def _piece(self, last: bool) -> str:
        known = self._core.decode(self._before, skip_special_tokens=False) if self._before else ""
        text = self._core.decode([*self._before, *self._pending], skip_special_tokens=False)
        piece = str(text[len(known) :])
        if not piece or (self._inner_bytes and piece.endswith(UNKNOWN) and not last):
            return piece if last else ""
        self._before, self._pending = self._pending, []
        return piece


def _stream(tokenizer: Any, skip_special_tokens: bool) -> _Bytes | _Windows:
    core = tokenizer.backend_tokenizer
    kind = _decoder(core)
    if kind.get("type") == "ByteLevel":
        return _Bytes(core, skip_special_tokens)
    return _Windows(core, skip_special_tokens, "ByteLevel" in json.dumps(kind))


def _decoder(core: Any) -> dict[str, Any]:
    """The settings of a tokenizer's decoder; none for one that has no decoder."""
    return {} if core.decoder is None else dict(json.loads(core.decoder.__getstate__()))


def _cleans_up(tokenizer: Any) -> bool:
    """Whether ``tokenizer.decode`` cleans spaces up; transformers does not for BPE unless it is made to."""
    if not tokenizer.clean_up_tokenization_spaces:
        return False
    forced = getattr(tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return forced or type(tokenizer.backend_tokenizer.model).__name__ != "BPE"


def _specials(core: Any) -> frozenset[int]:
    return frozenset(token for token, added in core.get_added_tokens_decoder().items() if added.special)


@cache
def _byte_characters() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes in (GPT-2's): printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _bytes_of(name: str) -> bytes:
    """The bytes of a byte-level token; one that holds another character, as added ones do, is its own text."""
    known = _byte_characters()
    try:
        return bytes([known[char] for char in name])
    except KeyError:
        return name.encode()

"""A tolerant reader of one JSON object that arrives in pieces.

`ObjectScanner` finds where the object ends and cuts it into tokens in one pass over its characters;
`read_object` turns the tokens into a dict. Both name every departure from JSON in ``repairs``.

A quote inside a string closes it only where JSON could go on after it (``, } ]``, or ``:`` after a key).
Valid JSON is never read differently for that, and ``'what's left'`` or ``"the "best" case"`` can be read.
"""

import re
from enum import Enum

from rrm_engine.protocol.escapes import QUOTES, unescape

MAX_CHARS = 16_384
MAX_DEPTH = 16

_CLOSERS = {'"': '"', "'": "'", **dict.fromkeys("“”„", '“”"'), **dict.fromkeys("‘’", "‘’'")}  # noqa: RUF001
_IN_STRING = {quote: re.compile(f"[{closers}\\\\:]") for quote, closers in _CLOSERS.items()}
_STRUCTURE = re.compile(f"[{QUOTES}{{}}\\[\\]:,]")
_NOT_SPACE = re.compile(r"\S")
_LOOK_BACK = 140
_TYPE_AFTER = re.compile(rf"\{{\s{{0,64}}([{QUOTES}])type[{QUOTES}]\s{{0,64}}\Z")
_LINE_START = re.compile(r"\n[\s\-*>`.)\d]*\Z")


class Unreadable(ValueError):
    """The text is not an object that can be read; the message says why."""


class Bare(str):
    """A value written without quotes: a number, ``true``, or a word."""

    __slots__ = ()


Value = str | None | list["Value"] | dict[str, "Value"]


class Scan(Enum):
    """How far `ObjectScanner.scan` came."""

    MORE = "more"  # the object is still open at the end of the text
    COMPLETE = "complete"  # `pos` is just after its closing brace
    RESTART = "restart"  # another event begins at `restart`: this object was never closed
    REFUSED = "refused"  # too long, or nested too deeply


class ObjectScanner:
    """Scans the object whose opening brace is at ``start``; every character is looked at once.

    ``scan`` is called again whenever the text has grown; `shift` follows a cut at its front.
    """

    def __init__(self, start: int) -> None:
        self.start = start
        self.pos = start
        self.restart = start
        self.tokens: list[tuple[str, str]] = []  # (structural character or opening quote or "bare", text)
        self.repairs: set[str] = set()
        self._stack: list[str] = []
        self._last = ""  # the last structural character
        self._mark = start  # where the open string, or the run of bare characters, begins
        self._quote = ""  # opening quote of the open string
        self._escaped = False  # the character at `pos` follows a backslash
        self._closing: int | None = None  # a quote that closes the string if the next character allows it

    def shift(self, cut: int) -> None:
        """The first ``cut`` characters of the text were dropped."""
        self.start -= cut
        self.pos -= cut
        self._mark -= cut
        if self._closing is not None:
            self._closing -= cut

    def scan(self, text: str) -> Scan:
        """Go on at ``pos`` as far as the object or the text reaches."""
        limit = min(len(text), self.start + MAX_CHARS)
        while self.pos < limit:
            if not self._quote:
                outcome = self._structure(text, limit)
            elif self._closing is not None:
                outcome = self._after_quote(text, limit)
            else:
                outcome = self._string(text, limit)
            if outcome is not Scan.MORE:
                return outcome
        return Scan.REFUSED if self.pos >= self.start + MAX_CHARS else Scan.MORE

    def _string(self, text: str, limit: int) -> Scan:
        if self._escaped:
            self._escaped = False
            self.pos += 1
            return Scan.MORE
        found = _IN_STRING[self._quote].search(text, self.pos, limit)
        if found is None:
            self.pos = limit
            return Scan.MORE
        at = found.start()
        if text[at] == ":" and self._begins_event(text, at):
            return Scan.RESTART
        self.pos = at + 1
        if text[at] == "\\":
            self._escaped = True
        elif text[at] != ":":
            self._closing = at
        return Scan.MORE

    def _after_quote(self, text: str, limit: int) -> Scan:
        found = _NOT_SPACE.search(text, self.pos, limit)
        if found is None:
            self.pos = limit
            return Scan.MORE
        self.pos = found.start()
        is_key = self._stack[-1] == "{" and self._last in "{,"
        if text[self.pos] in (":,}]" if is_key else ",}]"):
            self.tokens.append((self._quote, text[self._mark : self._closing]))
            self._quote = ""
            self._mark = self.pos
        else:
            self.repairs.add("unescaped_quote")
        self._closing = None
        return Scan.MORE

    def _structure(self, text: str, limit: int) -> Scan:
        found = _STRUCTURE.search(text, self.pos, limit)
        if found is None:
            self.pos = limit
            return Scan.MORE
        at = found.start()
        char = text[at]
        if char == ":" and self._begins_event(text, at):
            return Scan.RESTART
        if bare := text[self._mark : at].strip():
            self.tokens.append(("bare", bare))
        self.pos = self._mark = at + 1
        if char in QUOTES:
            self._quote = char
            return Scan.MORE
        if char in "{[":
            self._stack.append(char)
            if len(self._stack) > MAX_DEPTH:
                return Scan.REFUSED
        elif char == "]" and self._stack[-1] == "{":
            self.repairs.add("extra_bracket")
            return Scan.MORE
        elif char in "}]":
            self._close(char)
        self._last = char
        self.tokens.append((char, char))
        return Scan.MORE if self._stack else Scan.COMPLETE

    def _close(self, char: str) -> None:
        while char == "}" and self._stack[-1] == "[":
            self.repairs.add("missing_bracket")
            self.tokens.append(("]", "]"))
            self._stack.pop()
        self._stack.pop()

    def _begins_event(self, text: str, colon: int) -> bool:
        """Whether this colon ends the head ``{"type":`` of an event that has no place inside this one."""
        found = _TYPE_AFTER.search(text, max(self.start + 1, colon - _LOOK_BACK), colon)
        if found is None:
            return False
        self.restart = found.start()
        before = text[max(self.start, self.restart - _LOOK_BACK) : self.restart]
        if _LINE_START.search(before):
            return True
        if self._quote:
            # Its own quote, unescaped, cannot stand in this string; another kind of quote can.
            return found[1] == self._quote
        return not before.rstrip().endswith(":")


class _Reader:
    def __init__(self, tokens: list[tuple[str, str]], repairs: set[str]) -> None:
        self.tokens = [*tokens, ("end", "")]
        self.repairs = repairs
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at][0]

    def take(self) -> tuple[str, str]:
        token = self.tokens[self.at]
        self.at += 1
        return token

    def value(self) -> Value:
        kind, text = self.take()
        if kind == "{":
            return self.object()
        if kind == "[":
            return self.list()
        if kind == "bare":
            return None if text in ("null", "None") else Bare(text)
        if kind in QUOTES:
            return self.string(kind, text)
        if kind in ",}]":
            self.at -= 1
            self.repairs.add("missing_value")
            return None
        raise Unreadable(f"{text or 'the end'} stands where a value should")

    def object(self) -> dict[str, Value]:
        fields: dict[str, Value] = {}
        while True:
            self.skip_commas()
            kind, text = self.take()
            if kind == "}":
                return fields
            if kind not in QUOTES and kind != "bare":
                raise Unreadable(f"{text or 'the end'} stands where a key should")
            key = self.string(kind, text) if kind in QUOTES else text
            if kind == "bare":
                self.repairs.add("unquoted_key")
            if self.take()[0] != ":":
                raise Unreadable(f"no colon after the key {key[:40]!r}")
            if key in fields:
                self.repairs.add("duplicate_key")
            fields[key] = self.value()
            self.separator("}")

    def list(self) -> list[Value]:
        items: list[Value] = []
        while True:
            self.skip_commas()
            if self.peek() == "]":
                self.take()
                return items
            items.append(self.value())
            self.separator("]")

    def skip_commas(self) -> None:
        while self.peek() == ",":
            self.take()
            self.repairs.add("extra_comma")

    def separator(self, closer: str) -> None:
        kind, text = self.tokens[self.at]
        if kind == ",":
            self.take()
            if self.peek() == closer:
                self.repairs.add("trailing_comma")
        elif kind != closer:
            raise Unreadable(f"no comma before {text[:40]!r}")

    def string(self, quote: str, raw: str) -> str:
        if quote != '"':
            self.repairs.add("single_quotes" if quote == "'" else "smart_quotes")
        if "\n" in raw or "\r" in raw:
            self.repairs.add("newline_in_string")
        return unescape(raw, self.repairs) if "\\" in raw else raw


def read_object(tokens: list[tuple[str, str]], repairs: set[str]) -> dict[str, Value]:
    """The object that ``tokens`` of a complete `ObjectScanner` spell.

    Adds to ``repairs``. Raises Unreadable.
    """
    reader = _Reader(tokens, repairs)
    reader.take()
    return reader.object()

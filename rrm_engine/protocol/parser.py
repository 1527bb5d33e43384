"""Reads events out of what a node writes, while it writes.

An event is complete at its closing brace, so that a child can start in the next step. However the text is cut
into pieces, the same events come out; no text raises; each character is looked at a bounded number of times.
"""

import re
from collections import Counter
from typing import Final

from rrm_engine.protocol.escapes import QUOTES
from rrm_engine.protocol.events import (
    COUNT_LINE,
    PLAIN_FORM,
    Atomic,
    Await,
    Done,
    Event,
    Form,
    Malformed,
    ParsedEvent,
)
from rrm_engine.protocol.fields import to_event
from rrm_engine.protocol.repair import MAX_CHARS, ObjectScanner, Scan, Unreadable, read_object
from rrm_engine.protocol.thinking import DEFAULT, Marks

LAYOUT_REPAIRS: Final = frozenset({"prose", "code_fence", "same_line", "several_lines"})
"""Repairs that only concern what stands around an event or how it is laid out, not what it says."""

_KEY = f"[{QUOTES}][A-Za-z_][A-Za-z0-9_ -]{{0,39}}[{QUOTES}]"
_HEAD = re.compile(rf"\{{\s{{0,64}}{_KEY}\s{{0,64}}:")
_HEAD_SO_FAR = re.compile(rf"\{{\s{{0,64}}(?:[{QUOTES}](?:[A-Za-z_][A-Za-z0-9_ -]{{0,39}}(?:[{QUOTES}]\s{{0,64}})?)?)?")
_TYPE_KEY = re.compile(rf"[{QUOTES}]type[{QUOTES}]\s*:|\btask\b")
_FENCE = re.compile(r"```[ \t]*\w*")
_COUNT = re.compile(rf"^{COUNT_LINE}\d+\s*$", re.MULTILINE)


class EventParser:
    """Incremental, lenient parser of JSON-line events.

    ``thinking``: the text begins inside a thinking block that the chat template opened; everything up to its end is
    ignored, as is every later block. ``marks`` are what blocks stand between. The text follows ``after`` characters
    that others wrote, which count where events stand. ``form`` is how the style has them written.

    An object begins where ``{`` is followed by a quoted key and a colon; other braces are prose. An object
    without a ``type`` is ignored; one that meant to be an event and cannot be read becomes a Malformed, and
    parsing goes on after it. ``repairs`` counts, by name, every leniency that was needed for an event.
    """

    def __init__(self, thinking: bool = False, marks: Marks = DEFAULT, after: int = 0, form: Form = PLAIN_FORM) -> None:
        self.marks = marks
        self.form = form
        self._mark = re.compile(f"[{{{re.escape(marks.open[0])}]")
        self.repairs: Counter[str] = Counter()
        self._thinking = thinking
        self._buffer = ""  # text not yet settled
        self._base = after  # offset of its first character in the whole text
        self._pos = 0  # how far the buffer has been looked at
        self._object: ObjectScanner | None = None
        self._gap: list[str] = []  # visible text since the last event
        self._any_event = False
        self._closed = False

    def feed(self, text: str) -> list[ParsedEvent | Malformed]:
        """The events completed by ``text``, in order. Text fed after `close` is ignored."""
        if self._closed:
            return []
        self._buffer += text
        found: list[ParsedEvent | Malformed] = []
        while self._advance(found):
            pass
        keep = self._object.start if self._object else self._pos
        if keep:
            self._buffer = self._buffer[keep:]
            self._base += keep
            self._pos -= keep
            if self._object:
                self._object.shift(keep)
        return found

    def close(self) -> list[ParsedEvent | Malformed]:
        """The text is over: report the object that is still open, if any."""
        found: list[ParsedEvent | Malformed] = []
        if self._object:
            raw = self._buffer[self._object.start :]
            self._unclosed(self._object, raw, "the text ended inside the object", found, at_end=True)
        self._object = None
        self._closed = True
        return found

    def _advance(self, found: list[ParsedEvent | Malformed]) -> bool:
        """Do one thing; False when more text is needed first."""
        if self._object:
            return self._inside(self._object, found)
        if self._thinking:
            return self._skip_thinking()
        return self._outside()

    @property
    def thinking(self) -> bool:
        """Whether the text so far ends inside a thinking block."""
        return self._thinking

    def _skip_thinking(self) -> bool:
        close = self.marks.close
        end = self._buffer.find(close, self._pos)
        if end < 0:
            self._pos = max(self._pos, len(self._buffer) - len(close) + 1)
            return False
        self._pos = end + len(close)
        self._thinking = False
        return True

    def _outside(self) -> bool:
        mark = self._mark.search(self._buffer, self._pos)
        at = mark.start() if mark else len(self._buffer)
        if at > self._pos:
            self._gap.append(self._buffer[self._pos : at])
            self._pos = at
        if mark is None:
            return False
        if mark[0] != "{":
            think = self.marks.open
            if self._buffer.startswith(think, at):
                self._pos = at + len(think)
                self._thinking = True
                return True
            if think.startswith(self._buffer[at : at + len(think)]):
                return False
        elif _HEAD.match(self._buffer, at):
            self._object = ObjectScanner(at)
            return True
        elif _HEAD_SO_FAR.fullmatch(self._buffer, at):
            return False
        self._gap.append(mark[0])
        self._pos = at + 1
        return True

    def _inside(self, scanner: ObjectScanner, found: list[ParsedEvent | Malformed]) -> bool:
        outcome = scanner.scan(self._buffer)
        if outcome is Scan.MORE:
            return False
        self._object = None
        self._pos = scanner.restart if outcome is Scan.RESTART else scanner.pos
        raw = self._buffer[scanner.start : self._pos]
        if outcome is Scan.COMPLETE:
            self._read(scanner, raw, found)
        elif outcome is Scan.RESTART:
            self._unclosed(scanner, raw, "another event began inside the object", found)
        else:
            reason = f"longer than {MAX_CHARS} characters" if len(raw) >= MAX_CHARS else "nested too deeply"
            self._malformed(scanner, raw, reason, found)
        return True

    def _read(self, scanner: ObjectScanner, raw: str, found: list[ParsedEvent | Malformed]) -> None:
        try:
            event = to_event(read_object(scanner.tokens, scanner.repairs), scanner.repairs)
        except Unreadable as error:
            self._malformed(scanner, raw, str(error), found)
            return
        if event is None:
            self._gap.append(raw)
        else:
            self._parsed(event, scanner, raw, found)

    def _unclosed(
        self,
        scanner: ObjectScanner,
        raw: str,
        reason: str,
        found: list[ParsedEvent | Malformed],
        at_end: bool = False,
    ) -> None:
        """Read an object that only lacks its closing brackets, or report it."""
        text = raw
        raw = text.rstrip(" \t\r\n,")
        for tail in ("}", "]}"):
            again = ObjectScanner(0)
            if again.scan(raw + tail) is not Scan.COMPLETE:
                continue
            repairs = again.repairs | {"missing_brace"}
            try:
                event = to_event(read_object(again.tokens, repairs), repairs)
            except Unreadable:
                continue
            # At the end of the text the fields that are not there may simply have been cut off.
            if at_end and not _complete(event, repairs):
                break
            if event is not None:
                again.shift(-scanner.start)
                again.repairs = repairs
                self._parsed(event, again, raw, found)
                self._gap.append(text[len(raw) :])
                return
        self._malformed(scanner, raw, reason, found)

    def _parsed(self, event: Event, scanner: ObjectScanner, raw: str, found: list[ParsedEvent | Malformed]) -> None:
        repairs = scanner.repairs | self._layout(event, raw)
        if self.form.bare_children:
            repairs.discard("missing_depends_on")
        self.repairs.update(repairs)
        start = self._base + scanner.start
        found.append(ParsedEvent(event, start, start + len(raw), tuple(sorted(repairs))))
        self._gap.clear()
        self._any_event = True

    def _malformed(self, scanner: ObjectScanner, raw: str, reason: str, found: list[ParsedEvent | Malformed]) -> None:
        if not _TYPE_KEY.search(raw):
            self._gap.append(raw)
            return
        start = self._base + scanner.start
        found.append(Malformed(raw, reason, start, start + len(raw)))

    def _layout(self, event: Event, raw: str) -> set[str]:
        gap = "".join(self._gap)
        repairs = set()
        if "\n" in raw:
            repairs.add("several_lines")
        if self._any_event and "\n" not in gap:
            repairs.add("same_line")
        if "```" in gap:
            repairs.add("code_fence")
            gap = _FENCE.sub("", gap)
        gap = _COUNT.sub("", gap)
        if self.form.working and isinstance(event, Atomic) and not self._any_event:
            gap = gap.rpartition("\n")[2]
        if gap.strip(" \t\r\n,[]"):
            repairs.add("prose")
        return repairs


def _complete(event: Event | None, repairs: set[str]) -> bool:
    match event:
        case Atomic(answer):
            return bool(answer)
        case Await(children):
            return bool(children)
        case Done():
            return True
        case _:
            return event is not None and "missing_depends_on" not in repairs

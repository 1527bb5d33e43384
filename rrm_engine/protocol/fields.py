"""From the fields of a JSON object to an event."""

import json
import re
import zlib

from rrm_engine.protocol.escapes import QUOTES
from rrm_engine.protocol.events import Atomic, Await, Child, Done, Event
from rrm_engine.protocol.repair import Bare, Unreadable, Value

MAX_ID_CHARS = 40

_SYNONYMS = {
    "dependson": "depends_on",
    "depends": "depends_on",
    "dependencies": "depends_on",
    "subtask": "task",
    "problem": "task",
    "question": "task",
    "final": "answer",
    "result": "answer",
    "solution": "answer",
}
_FIELDS = {
    "child": ("id", "task", "depends_on"),
    "await": ("children", "rule"),
    "atomic": ("answer",),
    "done": (),
}
_NOT_IN_ID = re.compile(r"[^A-Za-z0-9_-]+")
_JSON_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][+-]?\d+)?")


def sanitize_id(raw: str) -> str:
    """``raw`` as a component of a node path: 1 to 40 of ``[A-Za-z0-9_-]``; "" if it is blank.

    The same ``raw`` always gives the same id, so references keep pointing at their child.
    """
    raw = raw.strip()
    clean = _NOT_IN_ID.sub("_", raw).strip("_") or "".join(f"u{ord(c):x}" for c in raw[:6])
    if len(clean) > MAX_ID_CHARS:
        clean = f"{clean[: MAX_ID_CHARS - 9]}_{zlib.crc32(raw.encode()):08x}"
    return clean


def to_event(fields: dict[str, Value], repairs: set[str]) -> Event | None:
    """The event that ``fields`` describe, or None if they have neither a ``type`` nor a ``task``.

    Adds the name of each leniency to ``repairs``. Raises Unreadable if the type is unknown, or an id or a
    task is missing.
    """
    named = _by_name(fields, repairs)
    if "type" not in named:
        if "task" in named:
            raise Unreadable("a task without a type")
        return None
    kind = _text(named.pop("type", None), "type", repairs)
    if kind != (clean := kind.strip().lower()):
        repairs.add("type_spelling")
    if clean not in _FIELDS:
        raise Unreadable(f"unknown type {kind[:40]!r}")
    if any(key not in _FIELDS[clean] for key in named):
        repairs.add("unknown_field")
    match clean:
        case "child":
            return _child(named, repairs)
        case "await":
            rule = _text(named.get("rule"), "rule", repairs)
            return Await(_ids(named.get("children"), "children", repairs), rule.strip())
        case "atomic":
            return Atomic(_text(named.get("answer"), "answer", repairs).strip())
        case _:
            return Done()


def _by_name(fields: dict[str, Value], repairs: set[str]) -> dict[str, Value]:
    named: dict[str, Value] = {}
    for key, value in fields.items():
        name = key.strip().lower()
        if name != key:
            repairs.add("key_spelling")
        if name in _SYNONYMS and _SYNONYMS[name] not in fields:
            name = _SYNONYMS[name]
            repairs.add("synonym")
        named[name] = value
    return named


def _child(named: dict[str, Value], repairs: set[str]) -> Child:
    name = _id(named.get("id"), repairs)
    task = _text(named.get("task"), "task", repairs).strip()
    if not name:
        raise Unreadable("a child without an id")
    if not task:
        raise Unreadable(f"child {name!r} without a task")
    if "depends_on" not in named:
        repairs.add("missing_depends_on")
    return Child(name, task, _ids(named.get("depends_on"), "depends_on", repairs))


def _text(value: Value, field: str, repairs: set[str]) -> str:
    if value is None:
        return ""
    if isinstance(value, Bare):
        repairs.add("number_as_text" if _JSON_NUMBER.fullmatch(value) else "unquoted_value")
        return str(value)
    if isinstance(value, str):
        return value
    if field == "answer":
        repairs.add("answer_not_text")
        return json.dumps(value, ensure_ascii=False)
    raise Unreadable(f"{field} is not a text")


def _id(value: Value, repairs: set[str]) -> str:
    if isinstance(value, list | dict):
        raise Unreadable("an id is not a text")
    raw = _text(value, "id", repairs)
    clean = sanitize_id(raw)
    if clean != raw:
        repairs.add("id_sanitized")
    return clean


def _ids(value: Value, field: str, repairs: set[str]) -> tuple[str, ...]:
    if isinstance(value, dict):
        raise Unreadable(f"{field} is not a list")
    if value is None:
        return ()
    if not isinstance(value, list):
        repairs.add("text_for_list")
        text = value.strip().strip("[]")
        if field == "children" and text.lower() == "all":
            return ()
        value = [part.strip(f" {QUOTES}") for part in text.split(",")]
    ids = [name for item in value if (name := _id(item, repairs))]
    if len(ids) != len(value):
        repairs.add("empty_id")
    if len(unique := tuple(dict.fromkeys(ids))) != len(ids):
        repairs.add("duplicate_id")
    return unique

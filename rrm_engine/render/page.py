"""The parts of the page put together. Data is JSON in a script element, in which no text can end that element."""

import json
import math
from html import escape
from importlib.resources import files
from typing import Any

from rrm_engine.legible import legible

SCRIPTS = ("base.js", "list.js", "timeline.js", "graph.js", "node.js", "overview.js", "main.js")
OUTSIDE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def page(document: dict[str, Any]) -> str:
    """One HTML document that holds everything it needs."""
    folder = files("rrm_engine.render") / "page"

    def part(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    model = document["runs"][0]["model"] if len(document["runs"]) == 1 else f"{len(document['runs'])} runs"
    parts = {
        "title": escape(legible(f"rrm_engine: {document['runs'][0]['tasks']}, {model}")),
        "style": part("style.css"),
        "d3": part("d3.min.js"),
        "script": "\n".join(part(name) for name in SCRIPTS),
        "data": as_json(document),
    }
    made, rest = "", part("page.html")
    while "{{" in rest:  # what has been put in is not looked at again
        before, _, rest = rest.partition("{{")
        name, _, rest = rest.partition("}}")
        made += before + parts[name]
    return made + rest


def as_json(document: Any) -> str:
    """JSON for a script element: every character that HTML or JavaScript might take otherwise is an escape. Numbers
    that JSON lacks are null, halves of surrogate pairs a replacement character."""
    text = json.dumps(_plain(document), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char, escaped in OUTSIDE.items():
        text = text.replace(char, escaped)
    return text


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(str(name)): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8") if not value.isascii() else str(value)
    return value

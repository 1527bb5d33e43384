"""The rows that run now, as trees that grow: what each of their nodes is doing, and for how long."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

from rrm_engine.graph.paths import ROOT, NodePath
from rrm_engine.legible import legible, legible_key
from rrm_engine.runs.events import Cancelled, Concluded, Finished, JobBegan, Paused, Resumed, Started
from rrm_engine.runs.timeline import NAMES

if TYPE_CHECKING:
    from rich.console import RenderableType

ANSWER = 24  # characters of an answer that are shown


@dataclass(slots=True)
class _Node:
    name: str
    depth: int
    doing: str
    since: float
    over: bool = False


@dataclass(slots=True)
class _Job:
    began: float
    nodes: dict[str, _Node] = field(default_factory=dict)  # by path, parents before their children


class RunningRows:
    """Told of every event as it is written to the trace; may be rendered by another thread."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._lock = Lock()

    def tell(self, event: dict[str, Any]) -> None:
        """Take an event, JSON-ready."""
        kind, key, now = event["event"], event["job"], time.monotonic()
        with self._lock:
            if kind == JobBegan.EVENT:
                self._jobs[key] = _Job(now)
            elif kind == Finished.EVENT:
                self._jobs.pop(key, None)
            elif key in self._jobs:
                _tell(self._jobs[key].nodes, kind, event, now)

    def lines(self, most: int) -> list[str]:
        """Not more than ``most`` lines. Where there is no room for a whole tree its nodes that are over go first."""
        now = time.monotonic()
        with self._lock:
            trees = [list(_tree(key, job, now)) for key, job in self._jobs.items()]
        fits = sum(map(len, trees)) <= most
        lines = [line for tree in trees for line, over in tree if fits or not over]
        if len(lines) > most:
            lines = [*lines[: max(0, most - 1)], f"... and {len(lines) - most + 1} lines more"]
        return lines[:most]

    def render(self, most: int) -> "Iterator[RenderableType]":
        """``lines`` for a terminal, cut at its edge."""
        from rich.text import Text

        for line in self.lines(most):
            yield Text(line, overflow="ellipsis", no_wrap=True)


def _tell(nodes: dict[str, _Node], kind: str, event: dict[str, Any], now: float) -> None:
    path = event["node"]
    if kind == Started.EVENT:
        above = nodes.get(_above(path))
        nodes[path] = _Node(NodePath(path).id, above.depth + 1 if above else 0, _doing(event), now)
        return
    node = nodes.get(path)
    if node is None:
        return
    if kind == Resumed.EVENT:
        node.doing, node.since = _doing(event), now
    elif kind == Paused.EVENT and event["reason"] == "await":
        node.doing, node.since = "waits", now
    elif kind == Concluded.EVENT:
        answer = legible(event["answer"].replace("FINAL:", "").strip(), ANSWER)
        node.doing, node.since, node.over = (f"found {answer}" if event["ok"] else "failed"), now, True
    elif kind == Cancelled.EVENT:
        node.doing, node.since, node.over = "was given up", now, True


def _doing(begun: dict[str, Any]) -> str:
    return f"{NAMES[begun['phase']]}s"


def _tree(key: str, job: _Job, now: float) -> Iterator[tuple[str, bool]]:
    """The lines of a job, each with whether what it tells of is over."""
    yield f"{legible_key(key)}  {now - job.began:.0f} s", False
    for path in _in_order(job.nodes):
        node = job.nodes[path]
        spent = "" if node.over else f"  {now - node.since:.0f} s"
        yield f"{'  ' * (node.depth + 1)}{node.name} {node.doing}{spent}", node.over


def _in_order(nodes: dict[str, _Node]) -> list[str]:
    """Every node under its parent, siblings in the order in which they started."""
    children: dict[str, list[str]] = {}
    for path in nodes:
        children.setdefault(_above(path), []).append(path)
    found, waiting = list[str](), children.get("", [])[::-1]
    while waiting:
        path = waiting.pop()
        found.append(path)
        waiting += children.get(path, [])[::-1]
    return found


def _above(path: str) -> str:
    """The node under which one is shown; "" for the root."""
    return NodePath(path).parent or ("" if path == ROOT else ROOT)

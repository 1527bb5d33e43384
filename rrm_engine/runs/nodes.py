"""The nodes of a job as its events tell of them: also of a job that goes on, broke off or failed."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from rrm_engine.graph.paths import NodePath
from rrm_engine.runs.events import (
    Began,
    Cancelled,
    Concluded,
    DidNotFit,
    Ended,
    Event,
    Finished,
    JobBegan,
    Paused,
    Resumed,
    Started,
    WroteChild,
    WroteMalformed,
)


@dataclass(slots=True)
class Phase:
    """One phase of a node. ``tokens`` it wrote so far; ``pause`` is None while it is not over."""

    began: Began
    tokens: int = 0
    pause: Paused | None = None


@dataclass(slots=True)
class Node:
    """A node that was declared. ``refused``: why its next phase was not taken; ``not_made``: ids of children that it
    declared and that came to no node, with the path of the one that has their task; ``malformed``: why something that
    it wrote could not be read.
    """

    path: NodePath
    task: str = ""
    depends_on: tuple[str, ...] = ()
    phases: list[Phase] = field(default_factory=list)
    end: Ended | None = None
    refused: str = ""
    not_made: dict[str, str] = field(default_factory=dict)
    malformed: list[str] = field(default_factory=list)
    children: list["Node"] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """What it wrote in all of its phases."""
        return sum(phase.tokens for phase in self.phases)

    @property
    def waited_s(self) -> float:
        """How long it was paused between its phases."""
        pairs = zip(self.phases, self.phases[1:], strict=False)
        return sum(after.began.t - before.pause.t for before, after in pairs if before.pause)


def nodes_of(events: Iterable[Event]) -> dict[str, Node]:
    """By path, in the order in which they were declared."""
    nodes: dict[str, Node] = {}
    for event in events:
        if not isinstance(event, JobBegan | Finished):
            _take(nodes, nodes.setdefault(event.node, Node(NodePath(event.node))), event)
    for node in nodes.values():
        parent = node.path.parent
        if parent in nodes:
            nodes[parent].children.append(node)
    return nodes


def tops(nodes: dict[str, Node]) -> list[Node]:
    """Those without a parent: the root, and the fallback of a graph that came to nothing."""
    return [node for node in nodes.values() if node.path.parent not in nodes]


def _take(nodes: dict[str, Node], node: Node, event: Event) -> None:
    if node.phases and node.phases[-1].pause is None:
        node.phases[-1].tokens = max(node.phases[-1].tokens, event.tokens - node.phases[-1].began.tokens)
    match event:
        case Started():
            node.task = event.task
            node.phases.append(Phase(event))
        case Resumed():
            node.phases.append(Phase(event))
        case Paused() if node.phases:
            node.phases[-1].pause = event
            node.phases[-1].tokens = max(0, event.tokens - node.phases[-1].began.tokens)
        case WroteChild(child=None):
            node.not_made[event.id] = event.same_as or ""
        case WroteChild():
            nodes[str(event.child)] = Node(NodePath(str(event.child)), event.task, event.depends_on)
        case WroteMalformed():
            node.malformed.append(event.reason)
        case DidNotFit():
            node.refused = event.reason
        case Concluded() | Cancelled():
            node.end = event

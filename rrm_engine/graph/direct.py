"""A direct solve as a graph of one node that does not split: the same calls and commands as `GraphMachine`."""

from collections import Counter
from collections.abc import Mapping

from rrm_engine.graph.node import Node
from rrm_engine.graph.paths import ROOT, NodePath
from rrm_engine.graph.types import Cancel, Command, Conclusion, EndReason, Finish, Phase, Start, Status, Stop
from rrm_engine.protocol.events import Event, Malformed


class DirectMachine:
    """Whatever the node writes is its answer, however it ends."""

    def __init__(self, task: str) -> None:
        root = Node(ROOT, ROOT, task, Phase.DIRECT, 0)
        self.nodes: Mapping[str, Node] = {ROOT: root}
        self.repairs: Counter[str] = Counter()
        self.accepted: NodePath | None = None
        self.same: NodePath | None = None
        self.max_depth = 0
        self.max_sibling_width = 0

    def start(self) -> list[Command]:
        return [Start(ROOT, Phase.DIRECT, self.nodes[ROOT].task)]

    def on_event(self, node: str, event: Event, text: str | None = None) -> list[Command]:
        """Events are ignored: they are part of the answer."""
        return []

    def on_malformed(self, node: str, malformed: Malformed) -> list[Command]:
        return []

    def on_end(self, node: str, reason: EndReason, text: str) -> list[Command]:
        return [Stop(ROOT, Conclusion(ROOT, text, node=ROOT)), Finish(Status.ATOMIC, text)]

    def on_refused(self, node: str, reason: EndReason) -> list[Command]:
        """The node could not be started."""
        return [Finish(Status.FAILED, "")]

    def cancel(self, reason: str) -> list[Command]:
        return [Cancel(ROOT, reason), Finish(Status.FAILED, "", reason)]

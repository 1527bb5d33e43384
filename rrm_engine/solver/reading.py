"""Reads what a job's nodes write, and hands the events in it to the graph machine."""

from collections.abc import Iterable
from time import monotonic

from rrm_engine.graph.machine import Machine
from rrm_engine.graph.paths import ROOT, NodeKey
from rrm_engine.graph.types import EndReason
from rrm_engine.protocol.events import Atomic, Done, Malformed, ParsedEvent
from rrm_engine.runs.events import FirstToken, Readmitted, WroteMalformed
from rrm_engine.runs.timeline import FALLBACK
from rrm_engine.solver.backend import Backend, Waited, Written
from rrm_engine.solver.commands import Commands
from rrm_engine.solver.metering import Meter
from rrm_engine.solver.node import NodeRun
from rrm_engine.solver.trace import wrote

PREVIEW = 200  # characters that a row or an event quotes at most


class Reading:
    """Reads for one job. ``texts``: also emit an event for every piece of text."""

    def __init__(
        self, backend: Backend, job: str, machine: Machine, meter: Meter, commands: Commands, texts: bool
    ) -> None:
        self._backend = backend
        self._job = job
        self._machine = machine
        self._meter = meter
        self._commands = commands
        self._texts = texts
        self.tokens = 0  # that the job's nodes have written

    def take(self, written: Written) -> None:
        """A node has written. Raises its error, if it had one."""
        if written.error is not None:
            raise written.error
        node, commands = self._commands.nodes[written.node], self._commands
        self.tokens += written.tokens
        now, step, is_child = monotonic(), self._backend.steps, node.path.parent is not None
        self._meter.wrote(node.path, now, written.tokens, step, is_child)
        if node.running and written.waited is not None:
            self._tell_waited(node, written.waited)
        if self._texts and written.text:
            commands.tell_text(node.path, written.text)
        turn = node.turn
        if node.parser is not None and written.text:
            self._read(node, node.parser.feed(written.text))
        if written.end is not None and node.running and node.turn == turn:
            self._ended(node, written.end)

    def _tell_waited(self, node: NodeRun, waited: Waited) -> None:
        now = self._commands.now(node.path)
        if waited.ran_s is None:
            self._commands.tell(FirstToken(**now, queued_s=waited.queued_s))
        else:
            self._commands.tell(Readmitted(**now, queued_s=waited.queued_s, ran_s=waited.ran_s))

    def _read(self, node: NodeRun, items: Iterable[ParsedEvent | Malformed]) -> None:
        """Hand events to the machine until the node is paused or over; what follows is discarded."""
        turn = node.turn
        for item in items:
            if not node.running or node.turn != turn:
                return
            with self._backend.ranges("graph", (NodeKey.of(self._job, node.path),)):
                self._handle(node, item)

    def _handle(self, node: NodeRun, item: ParsedEvent | Malformed) -> None:
        """Tell the machine of one event and carry out its commands."""
        machine, commands = self._machine, self._commands
        node.events.append((item.start, item.end))
        if isinstance(item, Malformed):
            commands.tell(WroteMalformed(**commands.now(node.path), reason=item.reason, text=item.text[:PREVIEW]))
            commands.carry_out(machine.on_malformed(node.path, item))
            return
        commands.repairs.update(item.repairs)
        # The text before it is needed only for events that may conclude the node.
        needed = isinstance(item.event, (Atomic, Done))
        text = self._visible(node, node.text(item.start)) if needed else None
        answer = machine.on_event(node.path, item.event, text)
        if machine.accepted is not None:
            commands.remember_fork(node, machine.accepted)
        commands.tell(wrote(item, machine.accepted, machine.same, commands.now(node.path)))
        commands.carry_out(answer)

    def _ended(self, node: NodeRun, reason: EndReason) -> None:
        if node.parser is not None:
            turn = node.turn
            self._read(node, node.parser.close())
            if not node.running or node.turn != turn:
                return
        with self._backend.ranges("graph", (NodeKey.of(self._job, node.path),)):
            self._commands.halt(node, reason.value)
            text = self._visible(node, node.text())
            self._commands.carry_out(self._machine.on_end(node.path, reason, text))

    def answer_so_far(self) -> str:
        """The text of the root, or of the fallback, in its present phase, without events and thinking."""
        nodes = self._commands.nodes
        node = nodes.get(FALLBACK) or nodes.get(ROOT)
        return self._visible(node, node.text()) if node else ""

    def _visible(self, node: NodeRun, text: str) -> str:
        """``text``, which begins where the node's phase does, without its thinking."""
        return self._backend.marks.visible(text, self._backend.opens_thinking(node.phase))

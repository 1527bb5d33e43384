"""Carries out the graph machine's commands for one job's nodes on a backend."""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Any

from rrm_engine.errors import NoRoom, RrmError
from rrm_engine.graph.machine import Machine
from rrm_engine.graph.paths import NodePath
from rrm_engine.graph.types import (
    Cancel,
    Command,
    Conclusion,
    EndReason,
    Finish,
    Pause,
    Phase,
    Resume,
    Start,
    Stop,
)
from rrm_engine.protocol.parser import EventParser
from rrm_engine.runs.events import Cancelled, Concluded, DidNotFit, Event, Paused, Resumed, Started, Text, Transcript
from rrm_engine.solver.backend import Continuation, Grammar, Opening, Place, Session
from rrm_engine.solver.metering import Meter
from rrm_engine.solver.node import NodeRun
from rrm_engine.solver.runtime import Runtime
from rrm_engine.solver.trace import JobTrace, Now


class Commands:
    """The nodes of one job. ``finish`` is called with the machine's Finish."""

    def __init__(
        self,
        runtime: Runtime,
        session: Session,
        machine: Machine,
        meter: Meter,
        trace: JobTrace,
        finish: Callable[[Finish], None],
    ) -> None:
        self.nodes: dict[str, NodeRun] = {}
        self.repairs: Counter[str] = Counter()
        self.errors: list[str] = []
        self.without_room = 0  # nodes that did not fit into a context
        self.prompt = ""  # of the root
        self._runtime = runtime
        self._session = session
        self._machine = machine
        self._meter = meter
        self._trace = trace
        self._finish = finish
        self._queue: deque[Command] = deque()

    def carry_out(self, commands: Iterable[Command]) -> None:
        """Execute commands in order. One that fails may append further commands."""
        busy = bool(self._queue)
        self._queue.extend(commands)
        while self._queue and not busy:
            match self._queue[0]:
                case Start() as command:
                    self._start(command)
                case Resume() as command:
                    self._resume(command)
                case Pause(node=path):
                    self._pause(self.nodes[path])
                case Stop(node=path, conclusion=conclusion):
                    self._conclude(path, conclusion)
                case Cancel(node=path, reason=reason):
                    transcript = self._close(path, "cancelled")
                    self.tell(Cancelled(**self.now(path), transcript=transcript, reason=reason))
                case Finish() as command:
                    self._finish(command)
            self._queue.popleft()

    def forget(self) -> None:
        """Drop the commands left. One that an exception interrupted would otherwise block all later ones."""
        self._queue.clear()

    def now(self, node: str) -> Now:
        """The fields that every event of ``node`` has, as of now."""
        return self._trace.now(node, self._length(node))

    def tell(self, event: Event) -> None:
        self._trace(event)

    def tell_text(self, node: str, text: str) -> None:
        self._trace(Text(**self._trace.now_of_text(node, self._length(node)), text=text))

    def remember_fork(self, parent: NodeRun, child: str) -> None:
        """``parent`` has just declared ``child``: note where a fork would start, for the child may start later."""
        place = parent.handle.place(parent.boundary) if self._runtime.child_context == "parent" else None
        parent.forks[child] = place, self._meter.clocks[parent.path].chain

    def halt(self, node: NodeRun, reason: str, end: int | None = None) -> None:
        """A node has stopped decoding in its phase. Its text after the character ``end`` is discarded."""
        node.handle.halt()
        if not node.running:
            return
        node.running = False
        node.reasons.append(reason)
        node.phases.append(node.phase)
        self._count_thinking(node, reason)
        self._meter.pause(node.path, monotonic())
        self.tell(Paused(**self.now(node.path), reason=reason, text=node.handle.text[:end]))

    def _start(self, command: Start) -> None:
        given = self._dependencies(command.node)
        after = [self._meter.clocks[path].chain for path in given]
        place = None
        if command.parent is not None:
            place, chain = self.nodes[command.parent].forks[command.node]
            after.append(chain)
        opening = self._opening(command, place)
        self.prompt = self.prompt or opening.system + "\n" + opening.user
        try:
            handle = self._session.open(command.node, opening)
        except RrmError as error:
            self._refused(command.node, error)
            return
        begun = handle.begun
        parser = None if command.phase is Phase.DIRECT else self._parser(command.phase, begun.opens)
        self.nodes[command.node] = NodeRun(command.node, handle, command.phase, parser)
        self._meter.start(command.node, monotonic(), after)
        self.tell(
            Started(
                **self.now(command.node),
                **begun.settings,
                phase=command.phase,
                after=tuple(given),
                prompt_tokens=begun.tokens,
                task=command.task,
                system=opening.system,
                prompt=opening.user,
                opens=begun.opens,
            )
        )

    def _opening(self, command: Start, place: Place | None) -> Opening:
        style, limits, phase = self._runtime.style, self._runtime.limits, command.phase
        values: dict[str, Any] = {
            "task": command.task,
            "given": command.given,
            "depth_left": limits.max_depth - command.depth,
        }
        system = ""
        if command.fork:
            values["id"] = command.node.id
            user, opens = style.user("fork", **values), style.opens("fork", **values)
        else:
            problem = "" if command.parent is None else self._machine.nodes[command.parent].task
            system, user, opens = style.start(phase.value, problem=problem, max_width=limits.max_width, **values)
        if phase is Phase.GRAPH:
            opens = ""
        held = phase is Phase.GRAPH or command.fork  # only these have been told how to write events
        grammar = self._grammar(command.node) if held else None
        return Opening(phase, user, system, opens, command.depth, grammar, place)

    def _resume(self, command: Resume) -> None:
        style, node = self._runtime.style, self.nodes[command.node]
        kind = "solve" if command.phase is Phase.SOLVER else "resume"
        task = self._machine.nodes[node.path].task
        values: dict[str, Any] = {"task": task, "notes": command.notes, "rule": command.rule}

        def render(conclusions: Sequence[Conclusion]) -> str:
            return style.user(kind, conclusions=conclusions, **values)

        given, grammar = command.conclusions, self._grammar(node.path)
        opens = style.opens(kind, conclusions=given, **values)
        continuation = Continuation(command.phase, render(given), given, render, opens, grammar)
        try:
            node.handle.resume(continuation)
        except RrmError as error:
            self._refused(node.path, error)
            return
        begun = node.handle.begun
        node.enter(command.phase, self._parser(command.phase, begun.opens))
        after = list(dict.fromkeys(c.node for c in given if c.node is not None))
        self._meter.resume(node.path, monotonic(), after)
        self.tell(
            Resumed(
                **self.now(node.path),
                **begun.settings,
                phase=command.phase,
                after=tuple(after),
                appended_tokens=begun.tokens,
                appended=continuation.user,
                opens=begun.opens,
                notes=command.notes,
                spliced=tuple(begun.spliced),
            )
        )

    def _pause(self, node: NodeRun) -> None:
        """Stop a node right after the event just read."""
        node.handle.pause(node.boundary)
        self.halt(node, "await", node.boundary)

    def _conclude(self, path: NodePath, conclusion: Conclusion) -> None:
        self._keep(path, conclusion)
        transcript = self._close(path, "concluded")
        self.tell(Concluded(**self.now(path), transcript=transcript, answer=conclusion.answer, ok=conclusion.ok))

    def _close(self, path: str, how: str) -> Transcript | None:
        """End a node that has concluded or was cancelled, and free what it holds. None if it was never opened."""
        node = self.nodes.get(path)
        if node is None:
            return None
        self.halt(node, how)
        return node.handle.finish()

    def _keep(self, path: NodePath, conclusion: Conclusion) -> None:
        """Let the backend hold KV of a concluded node for its parent, before the node is finished."""
        parent = path.parent
        if self._runtime.backend.capabilities.joins and path in self.nodes and parent in self.nodes:
            self._session.keep(parent, path, conclusion)

    def _refused(self, path: str, error: RrmError) -> None:
        """The backend has refused a node, mostly because it is too long: tell the machine that it has failed."""
        self.errors.append(str(error))
        long = isinstance(error, NoRoom)
        self.without_room += long
        self.tell(DidNotFit(**self.now(path), reason=str(error)))
        self._queue.extend(self._machine.on_refused(path, EndReason.CONTEXT if long else EndReason.ERROR))

    def _length(self, path: str) -> int:
        """Tokens of a node's context."""
        return self.nodes[path].handle.length if path in self.nodes else 0

    def _grammar(self, path: str) -> Grammar:
        """What the grammar of a node's next phase depends on: it may split only if the machine would accept that."""
        node, limits = self._machine.nodes[path], self._runtime.limits
        room = limits.max_nodes - len(self._machine.nodes)
        splits = node.depth < limits.max_depth and node.awaits < limits.max_awaits and room >= limits.max_width
        return len(node.children), splits

    def _dependencies(self, path: str) -> list[str]:
        found = dict.fromkeys(d.path for d in self._machine.nodes[path].dependencies.values() if d is not None)
        return [p for p in found if p in self._meter.clocks]

    def _parser(self, phase: Phase, opens: str) -> EventParser:
        backend, form = self._runtime.backend, self._runtime.style.form(phase)
        return EventParser(backend.opens_thinking(phase), backend.marks, len(opens), form)

    def _count_thinking(self, node: NodeRun, reason: str) -> None:
        """Count in the row that a node's thinking was cut off, or was not finished when its phase ended."""
        backend = self._runtime.backend
        if node.handle.thinking_cut:
            self.repairs["thinking_cut"] += 1
        by_itself = reason in set(EndReason)
        if by_itself and backend.marks.unfinished(node.handle.text, backend.opens_thinking(node.phase)):
            self.repairs["thinking_unfinished"] += 1

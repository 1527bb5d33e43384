"""The recursive policy as a state machine: told what nodes wrote or how they ended, it answers with commands.

No I/O, clock, thread or randomness: equal calls give equal commands.

What the driver has to do
    * Execute commands one by one, in order. Those that end or pause a node (Pause, Stop, Cancel) come before those
      that let one decode (Resume, then Start); Finish is last.
    * On Pause, stop the node right after the event just reported. What it wrote after that is discarded and not
      reported, even if a Resume follows in the same answer.
    * Keep a sequence that ended by itself until its node's Stop or Cancel, because the node may be resumed. Each
      started node gets exactly one of the two.
    * Pass as ``text`` the visible text of the phase up to that point, with thinking *and events* cut out: a node
      that wrote nothing but events has written no answer. ``on_event`` needs it for ``done`` and for an ``atomic``
      without an answer; if it is missing there, the machine decides when the node ends.
    * Events and ends of nodes that are not decoding may be reported, because their tokens were in flight; they are
      ignored. A path that was never declared raises KeyError.

Splitting
    * A node starts in GRAPH while ``depth < max_depth``, else in SOLVER. It cannot split in SOLVER.
    * A child starts at its ``child`` event, or as soon as its dependencies have concluded, well or not;
      their conclusions are ``given``. ``depends_on`` names siblings, also ones not declared yet; a name still
      undeclared when the parent waits is dropped. A child that would wait for itself, directly or through others,
      is refused.
    * A child whose id is taken is renamed (``a_2``); its parent may call it by either name. The same id and task
      again, while the first is not awaited, is ignored. Ids are made fit for a path: ``a.b`` becomes ``a_b``.
    * A child with the task of a sibling that is not yet awaited, and with the same dependencies, gets no node of its
      own: the sibling stands for both, and its conclusion is handed over under both ids. ``same`` is then the
      sibling. Tasks are compared as `node.normalised` returns them.
    * A child whose task is that of its parent, or of a node further up, is refused. If the parent is in GRAPH and
      has no other child, it solves its task itself, as after an ``atomic`` without an answer.
    * ``max_width`` bounds the children of one *round*: from the node's start or resume to its next wait.
      ``max_nodes`` bounds the nodes of the graph, the root included, ``root!direct`` not.
    * A refused child takes neither place nor id. At its next resume the parent reads a note about it, and a failed
      conclusion if it awaits it; a sibling that depends on it is given the failed conclusion too.

Waiting
    * ``await`` pauses the node until the named children have concluded. Conclusions come in the order named, each
      once. A name stands for every child declared under it and not yet awaited; an await without names for all
      children not yet awaited. If a child stands for a sibling too, its ids that were not named come after the others.
    * A node that ends (``done``, end of text, budget spent) with children not yet awaited awaits them all. One that
      ends before it could read that a child was refused is resumed too, with the notes alone.
    * A node may await ``max_awaits`` times, awaits of unknown children included. The next await is answered with a
      note to answer now, and any later one is ignored, so that every node's decoding is bounded.

Concluding
    * ``atomic`` with an answer concludes the node; descendants still alive are cancelled. Without an answer
      it turns a GRAPH phase without children into SOLVER, and counts as ``done`` anywhere else.
    * A node that is done concludes with its text. For the root in GRAPH phase that text must give an answer: it
      was asked for a graph, not for prose. A node that was cut off concludes with the FINAL it wrote.
    * A child's conclusion is shortened (`answers.in_brief`) to its answer and at most two sentences.
    * A node that has nothing of this fails: it concludes with ``ok=False``, and the nodes that wait for it go on.
    * Under ``solves_afresh`` a root that would turn from GRAPH into SOLVER ends instead, and one DIRECT node at
      ``root!direct`` (no child id holds a ``!``) solves its task: the run is ATOMIC. As in a direct run, what that
      node wrote is the answer, even where a limit cut it off.
    * A root that fails is replaced by such a node too, the fallback. Events of a DIRECT node are ignored. If it fails
      too, the run is INVALID, or FAILED where either ended in an error.

Order: resumes go first, then deeper nodes, then older ones. There is no deadlock: a node waits only for its children
or, without cycles, for siblings, so some node is decoding until Finish.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from heapq import heappop, heappush
from types import MappingProxyType
from typing import Literal

from rrm_engine.graph.direct import DirectMachine
from rrm_engine.graph.node import Node
from rrm_engine.graph.paths import ROOT, NodePath
from rrm_engine.graph.states import ALIVE, OVER, TRANSITIONS, NodeState
from rrm_engine.graph.types import (
    Cancel,
    Command,
    Conclusion,
    EndReason,
    Finish,
    Limits,
    Pause,
    Phase,
    Resume,
    Start,
    Status,
    Stop,
)
from rrm_engine.protocol.answers import in_brief, read_answer
from rrm_engine.protocol.events import Atomic, Await, Child, Event, Malformed
from rrm_engine.protocol.final import extract_final

MAX_NOTES = 8  # in one resume, so that a runaway node does not flood its own context

FAILURES = {
    EndReason.EOS: "it ended without an answer",
    EndReason.LENGTH: "it ran out of its token budget before it had an answer",
    EndReason.CONTEXT: "its context was full before it had an answer",
    EndReason.ERROR: "an error stopped it before it had an answer",
}


class GraphMachine:
    """One run of one task. See the module's docstring for the rules."""

    def __init__(
        self,
        task: str,
        limits: Limits,
        *,
        child_context: Literal["task", "parent"] = "task",
    ) -> None:
        if child_context not in ("task", "parent"):
            raise ValueError(f"child_context is task or parent, not {child_context!r}")
        self.limits = limits
        self.repairs: Counter[str] = Counter()
        self.finished: Finish | None = None
        self.accepted: NodePath | None = None  # the child that the last event declared, if it was accepted
        self.same: NodePath | None = None  # the sibling that already has the task of the child it declared
        self.max_depth = 0  # of the nodes started
        self.max_sibling_width = 0  # most children accepted in one round of one node
        self._fork = child_context == "parent"
        self._nodes: dict[str, Node] = {}
        self._serial = 0
        self._turns: list[tuple[bool, int, int, Node]] = []
        self._out: list[Command] = []
        self._root = self._register(self._new_node(ROOT, ROOT, task))

    @property
    def nodes(self) -> Mapping[str, Node]:
        """The nodes by path, in order of declaration: also those not started yet, and the fallback."""
        return MappingProxyType(self._nodes)

    @property
    def node_count(self) -> int:
        """Nodes that were started."""
        return sum(n.started for n in self._nodes.values())

    # called by the driver

    def start(self) -> list[Command]:
        if self._root.state is NodeState.BLOCKED:
            self._enqueue(self._root, NodeState.READY)
        elif self.finished is None:
            raise RuntimeError("the graph has been started already")
        return self._commands()

    def on_event(self, node: str, event: Event, text: str | None = None) -> list[Command]:
        """The node wrote an event. ``text``: the phase's visible text before it, for events that may end the node."""
        subject = self._nodes[node]
        self.accepted = self.same = None
        if self._heeded(subject):
            self._handle(subject, event, text)
        return self._commands()

    def on_malformed(self, node: str, malformed: Malformed) -> list[Command]:
        """The node wrote something like an event that could not be read."""
        subject = self._nodes[node]
        if self._heeded(subject):
            self._note(subject, "malformed", f"An event was not understood: {malformed.reason:.100}.")
        return self._commands()

    def on_end(self, node: str, reason: EndReason, text: str) -> list[Command]:
        """The node's decoding stopped by itself. ``text``: the visible text of the phase that ended."""
        subject = self._nodes[node]
        if subject.state is NodeState.RUNNING:
            subject.end = reason
            self._end(subject, reason, text)
        return self._commands()

    def on_refused(self, node: str, reason: EndReason) -> list[Command]:
        """The node could not be started, or could not go on."""
        return self.on_end(node, reason, "")

    def cancel(self, reason: str) -> list[Command]:
        """End the run now."""
        if self.finished is None:
            self._abandon([n for n in self._nodes.values() if n.parent is None], reason)
            self._finish(Status.FAILED, error=reason)
        return self._commands()

    # events

    def _heeded(self, node: Node) -> bool:
        return node.state is NodeState.RUNNING and node.phase is not Phase.DIRECT

    def _handle(self, node: Node, event: Event, text: str | None) -> None:
        match event:
            case Child():
                self._declare(node, event)
            case Await():
                self._await(node, event)
            case Atomic(answer=answer) if answer.strip():
                self._conclude(node, answer.strip())
            case Atomic() if node.phase is Phase.GRAPH and not node.unawaited:
                self._solve_itself(node)
            case _ if self._owes_await(node):
                self._pause(node)
                self._await_rest(node)
            case _ if text is not None:
                self._conclude_with(node, text)

    def _end(self, node: Node, reason: EndReason, text: str) -> None:
        if reason in (EndReason.EOS, EndReason.LENGTH) and self._owes_await(node):
            self._await_rest(node)
        elif reason is EndReason.EOS or (node is not self._root and self._is_whole and reason is not EndReason.ERROR):
            self._conclude_with(node, text)
        elif (final := extract_final(text)) is not None:
            # Only the FINAL: text that was cut off is often one sentence repeated until the budget was spent.
            self._conclude(node, f"FINAL: {final}")
        else:
            self._fail(node, FAILURES[reason])

    # splitting

    def _declare(self, parent: Node, event: Child) -> None:
        if parent.repeats(event.id, event.task):
            self._note(parent, "repeated_child", f"Child {event.id:.64} was declared already.")
            return
        twin = parent.twin(event.task, event.depends_on)
        if twin is not None and not parent.closes_cycle((event.id,), event.depends_on):
            self._merge(parent, twin, event.id)
            return
        child_id = parent.free_id(event.id)
        names = dict.fromkeys((event.id, child_id))
        child = self._new_node(parent.path.child(child_id), child_id, event.task, parent)
        if refusal := self._refusal(parent, event, names):
            self._refuse(parent, child, *refusal)
        else:
            self._accept(parent, child, event)
        parent.adopt(child, child_id, names)
        self._wake_dependants(child)
        self._start_if_unblocked(child)
        if refusal and refusal[0] == "own_task" and parent.phase is Phase.GRAPH and not parent.unawaited:
            self._solve_itself(parent)

    def _merge(self, parent: Node, twin: Node, name: str) -> None:
        """The child ``name`` has the task of its sibling ``twin``, which from now on stands for both."""
        title = parent.free_id(name)
        self.same = twin.path
        self._note(parent, "same_task", f"Child {title} has the task of {twin.id} and is not solved a second time.")
        parent.adopt(twin, title, dict.fromkeys((name, title)))
        self._wake_dependants(twin)

    def _refusal(self, parent: Node, event: Child, names: Iterable[str]) -> tuple[str, str] | None:
        """(repair, reason) if the child is refused."""
        limits = self.limits
        if parent.depth >= limits.max_depth or parent.phase is Phase.SOLVER:
            return "over_depth", "this node cannot start children and solves its task itself"
        if parent.width >= limits.max_width:
            return "over_width", f"a node starts at most {limits.max_width} children at a time"
        if len(self._nodes) >= limits.max_nodes:
            return "over_nodes", f"the graph has all its {limits.max_nodes} nodes"
        if not event.task.strip():
            return "empty_task", "it has no task"
        if (same := parent.ancestor(event.task)) is not None:
            return "own_task", f"it has the task of {'this node itself' if same is parent else 'a node above this one'}"
        if parent.closes_cycle(names, event.depends_on):
            return "cycle", "it would wait for itself"
        return None

    def _refuse(self, parent: Node, child: Node, repair: str, why: str) -> None:
        self._set_state(child, NodeState.REFUSED)
        child.conclusion = Conclusion(child.id, f"failed: not started, {why}", ok=False)
        parent.refusals += 1
        self._note(parent, repair, f"Child {child.id} was not started: {why}.")

    def _accept(self, parent: Node, child: Node, event: Child) -> None:
        if child.id != event.id:
            repair = "duplicate_id_renamed" if event.id in parent.children else "invalid_id_renamed"
            self._note(parent, repair, f"This child {event.id:.64} is called {child.id}.")
        parent.link(child, event.depends_on)
        parent.width += 1
        self.accepted = self._register(child).path
        self.max_sibling_width = max(self.max_sibling_width, parent.width)

    def _start_if_unblocked(self, node: Node) -> None:
        if node.state is NodeState.BLOCKED and not node.blocked:
            self._enqueue(node, NodeState.READY)

    def _wake_dependants(self, node: Node) -> None:
        if node.conclusion is not None:
            for sibling in node.dependants:
                self._start_if_unblocked(sibling)

    # waiting

    def _await(self, node: Node, event: Await) -> None:
        if node.awaits >= self.limits.max_awaits:
            self._refuse_await(node)
            return
        self._pause(node)
        named = [found for name in event.children for found in self._resolve(node, name)]
        if not event.children and not (named := node.unawaited):
            self._note(node, "unknown_await", "There was no child to await.")
        meant = {child for _, child in named}
        others = [(title, child) for title, child in node.children.items() if child in meant]
        self._wait(node, [*named, *others], event.rule)

    def _resolve(self, node: Node, name: str) -> list[tuple[str, Node]]:
        """The children that an await means by ``name``, each with the title that its conclusion is told under."""
        known = node.find(name)
        found = [(node.title(child, name), child) for child in known if not child.awaited]
        if not known:
            waiting = ", ".join(title for title, _ in node.unawaited[:MAX_NOTES]) or "none"
            self._note(node, "unknown_await", f"There is no child {name:.64}; not yet awaited: {waiting}.")
        elif not found:
            self._note(node, "repeated_await", f"Child {name:.64} was awaited before.")
        return found

    def _refuse_await(self, node: Node) -> None:
        first = node.awaits == self.limits.max_awaits
        node.awaits += 1
        self._note(node, "over_awaits", "You cannot await any more. Answer now with what you have.")
        if first:
            self._pause(node)
            self._go_on(node, Phase.CONTINUATION)

    def _owes_await(self, node: Node) -> bool:
        """Whether the node must not end yet: conclusions or notes are there for it to read, and it may still await."""
        unread = bool(node.unawaited) or (node.refusals > 0 and node.phase is not Phase.SOLVER)
        return unread and node.awaits < self.limits.max_awaits

    def _solve_itself(self, node: Node) -> None:
        if self.limits.solves_afresh and node is self._root:
            self._stop(node, Conclusion(node.id, "It stays whole.", node=node.path))
            self._solve_directly()
            return
        self._pause(node)
        self._go_on(node, Phase.SOLVER)

    def _await_rest(self, node: Node) -> None:
        self.repairs["implicit_await"] += 1
        self._wait(node, node.unawaited)

    def _wait(self, node: Node, children: Iterable[tuple[str, Node]], rule: str = "") -> None:
        node.awaiting, node.rule = tuple(dict.fromkeys(children)), rule
        node.awaits += 1
        for _, child in node.awaiting:
            child.awaited = True
        for child, name in node.drop_expected():
            self._note(node, "unknown_dependency", f"Child {child.id} starts without unknown {name:.64}.")
            self._start_if_unblocked(child)
        self._set_state(node, NodeState.AWAITING)
        self._go_on_if_due(node)

    def _go_on_if_due(self, node: Node) -> None:
        if node.state is NodeState.AWAITING and len(node.due) == len(node.awaiting):
            self._go_on(node, Phase.CONTINUATION)

    # concluding

    def _conclude_with(self, node: Node, text: str) -> None:
        """The node is done and its text is its answer, if it is one."""
        planned_only = node is self._root and node.phase is Phase.GRAPH and read_answer(text) is None
        if text.strip() and not planned_only:
            self._conclude(node, text.strip())
        else:
            self._fail(node, FAILURES[EndReason.EOS])

    def _fail(self, node: Node, why: str) -> None:
        self._conclude(node, f"failed: {why}", ok=False)

    def _conclude(self, node: Node, answer: str, ok: bool = True) -> None:
        if ok and node.parent is not None:
            whole, answer = answer, in_brief(answer)
            if answer != whole and read_answer(whole) is None:
                self.repairs["unmarked_answer"] += 1
        conclusion = Conclusion(node.id, answer, ok, node.path)
        self._stop(node, conclusion)
        self._abandon(node.children.values(), f"{node.path} concluded without it")
        if node.parent is None:
            self._conclude_run(node, conclusion)
        else:
            self._wake_dependants(node)
            self._go_on_if_due(node.parent)

    def _stop(self, node: Node, conclusion: Conclusion) -> None:
        node.conclusion = conclusion
        self._set_state(node, NodeState.CONCLUDED)
        self._out.append(Stop(node.path, conclusion))

    def _conclude_run(self, node: Node, conclusion: Conclusion) -> None:
        """The root or the fallback has concluded."""
        if conclusion.ok:
            self._finish(self._status(node), conclusion.answer)
        elif node is self._root:
            self._solve_directly()
        else:
            erred = EndReason.ERROR in (node.end, self._root.end)
            self._finish(Status.FAILED if erred else Status.INVALID, error=conclusion.answer)

    @property
    def _is_whole(self) -> bool:
        """Whether the root stayed whole and left its task to a direct node (``solves_afresh``)."""
        return self.finished is None and self._root.conclusion is not None and self._root.conclusion.ok

    def _solve_directly(self) -> None:
        root = self._root
        direct = self._register(self._new_node(NodePath(f"{root.path}!direct"), f"{root.id}!direct", root.task))
        direct.phase = Phase.DIRECT
        self._enqueue(direct, NodeState.READY)

    def _status(self, node: Node) -> Status:
        if node is not self._root and not self._is_whole:
            return Status.FALLBACK
        return Status.GRAPH if any(c.started for c in node.children.values()) else Status.ATOMIC

    def _abandon(self, nodes: Iterable[Node], reason: str) -> None:
        """Cancel the nodes and their descendants, parents first, in order of declaration."""
        stack = list(nodes)[::-1]
        while stack:
            node = stack.pop()
            if node.state in OVER:  # then so are its descendants
                continue
            if node.state in ALIVE:
                self._out.append(Cancel(node.path, reason))
            self._set_state(node, NodeState.CANCELLED)
            stack += reversed(node.children.values())

    def _finish(self, status: Status, answer: str = "", error: str | None = None) -> None:
        self.finished = Finish(status, answer, error)
        self._out.append(self.finished)

    # what goes on next

    def _pause(self, node: Node) -> None:
        self._out.append(Pause(node.path))

    def _go_on(self, node: Node, phase: Phase) -> None:
        node.phase = phase
        self._enqueue(node, NodeState.RESUMABLE)

    def _enqueue(self, node: Node, state: NodeState) -> None:
        self._set_state(node, state)
        heappush(self._turns, (state is NodeState.READY, -node.depth, node.serial, node))

    def _commands(self) -> list[Command]:
        """Start and resume the nodes that are due, and return all commands decided since the last call."""
        while self._turns:
            node = heappop(self._turns)[-1]
            if node.state is NodeState.READY:
                self._start(node)
            else:
                self._resume(node)
        out, self._out = self._out, []
        return out

    def _start(self, node: Node) -> None:
        node.started = True
        self._set_state(node, NodeState.RUNNING)
        self.max_depth = max(self.max_depth, node.depth)
        parent = node.parent.path if node.parent else None
        fork = self._fork and node.parent is not None
        self._out.append(Start(node.path, node.phase, node.task, parent, node.depth, node.given, fork))

    def _resume(self, node: Node) -> None:
        self._set_state(node, NodeState.RUNNING)
        self._out.append(Resume(node.path, node.phase, node.due, tuple(node.notes), node.rule))
        node.awaiting, node.rule, node.notes = (), "", []
        node.width = node.refusals = 0

    # helpers

    def _new_node(self, path: NodePath, node_id: str, task: str, parent: Node | None = None) -> Node:
        depth = parent.depth + 1 if parent else 0
        phase = Phase.GRAPH if depth < self.limits.max_depth else Phase.SOLVER
        node = Node(path, node_id, task, phase, self._serial, parent, depth)
        self._serial += 1
        return node

    def _register(self, node: Node) -> Node:
        self._nodes[node.path] = node
        return node

    def _set_state(self, node: Node, state: NodeState) -> None:
        assert (node.state, state) in TRANSITIONS, f"{node.path}: no way from {node.state} to {state}"
        node.state = state

    def _note(self, node: Node, repair: str, note: str) -> None:
        """Count a leniency and tell the node about it at its next resume."""
        self.repairs[repair] += 1
        if len(node.notes) < MAX_NOTES and note not in node.notes:
            node.notes.append(note)


Machine = GraphMachine | DirectMachine

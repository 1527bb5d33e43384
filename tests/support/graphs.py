"""Helpers of the graph machine's tests: shorthands, and its contract with its driver.

`Contract` keeps its own record of events told and commands received and never looks into the machine.
"""

import re
from collections import Counter
from dataclasses import dataclass, field, replace

from rrm_engine.graph.machine import GraphMachine
from rrm_engine.graph.paths import NodePath
from rrm_engine.graph.types import (
    Cancel,
    Command,
    Conclusion,
    Finish,
    Limits,
    Pause,
    Phase,
    Resume,
    Start,
    Status,
    Stop,
)
from rrm_engine.protocol.events import Await, Child, Event


def started(*children: str, **limits: int | bool | None) -> GraphMachine:
    """A machine whose root is decoding and has declared ``children``."""
    machine = GraphMachine("the task", Limits(**limits))  # type: ignore[arg-type]
    machine.start()
    for name in children:
        machine.on_event("root", child(name))
    return machine


def brief(commands: list[Command]) -> list[str]:
    """``["pause root", "start root.a"]``"""
    return [f"finish {c.status}" if isinstance(c, Finish) else f"{type(c).__name__.lower()} {c.node}" for c in commands]


def child(id: str, *depends_on: str) -> Child:
    return Child(id, f"task of {id}", depends_on)


def concluded(path: str, answer: str, ok: bool = True, id: str = "") -> Conclusion:
    """What the node at ``path`` hands over; under another ``id`` where it stands for a sibling."""
    return Conclusion(id or path.rpartition(".")[2], answer, ok, NodePath(path))


def resume_of(commands: list[Command]) -> Resume:
    (resume,) = [c for c in commands if isinstance(c, Resume)]
    return resume


# the contract


class Violation(AssertionError):
    pass


def require(ok: bool, what: str) -> None:
    if not ok:
        raise Violation(what)


def is_refusal(conclusion: Conclusion) -> bool:
    return conclusion.answer.startswith("failed: not started")


def _bare(task: str) -> str:
    """A task without what the machine overlooks when it compares two."""
    return re.sub(r"[\s\"'.]", "", task).lower()


def _first_name(id: str) -> str:
    """The name that a child was declared as before it was renamed, made fit for a path."""
    return re.sub(r"(_\d+)+$", "", re.sub(r"[^\w-]+", "_", id) or "child")


@dataclass
class Declared:
    """A child event as told. Each has a task of its own, which leads from a Start back to its event."""

    event: Child
    parent: str
    round: int
    dropped: set[str] = field(default_factory=set)  # names not declared when the parent waited
    path: str | None = None

    @property
    def alone(self) -> bool:
        """It depends on nothing."""
        return not self.event.depends_on


@dataclass
class Contract:
    """Checks every command against what a driver may expect."""

    limits: Limits
    state: dict[str, str] = field(default_factory=dict)  # path -> decoding | paused | ended | over
    depth: dict[str, int] = field(default_factory=dict)
    concluded: dict[str, Conclusion] = field(default_factory=dict)
    declared: dict[str, Declared] = field(default_factory=dict)  # by task
    rounds: Counter[str] = field(default_factory=Counter)
    widths: Counter[tuple[str, int]] = field(default_factory=Counter)
    awaiting: dict[str, tuple[str, ...]] = field(default_factory=dict)
    delivered: set[str] = field(default_factory=set)
    tasks: dict[str, str] = field(default_factory=dict)  # by path
    started: set[tuple[str, int, str]] = field(default_factory=set)  # parent, round, task of those without dependencies
    finish: Finish | None = None
    obeyed: int = 0  # commands

    def decoding(self) -> list[str]:
        return [path for path, state in self.state.items() if state == "decoding"]

    def tell(self, path: str, event: Event) -> None:
        if self.state[path] != "decoding":
            return
        if isinstance(event, Child):
            self.declared.setdefault(event.task, Declared(event, path, self.rounds[path]))
        else:
            self.awaiting[path] = event.children if isinstance(event, Await) else ()
            self._drop_undeclared(path)

    def tell_end(self, path: str) -> None:
        if self.state[path] == "decoding":
            self.state[path] = "ended"
            self.awaiting[path] = ()
            self._drop_undeclared(path)

    def _drop_undeclared(self, parent: str) -> None:
        siblings = [d for d in self.declared.values() if d.parent == parent]
        names = {d.event.id for d in siblings}
        for child in siblings:
            child.dropped |= set(child.event.depends_on) - names

    def obey(self, commands: list[Command]) -> None:
        for command in commands:
            require(self.finish is None, f"{command} after Finish")
            self.obeyed += 1
            match command:
                case Start():
                    self._start(command)
                case Pause(path):
                    self._move(path, {"decoding"}, "paused")
                case Resume():
                    self._resume(command)
                case Stop(path, conclusion):
                    self._move(path, {"decoding", "ended"}, "over")
                    require(path.split(".")[-1] == conclusion.id, "conclusion under a foreign id")
                    self.concluded[path] = conclusion
                case Cancel(path, _):
                    self._move(path, {"decoding", "ended", "paused"}, "over")
                case Finish():
                    self._finish(command)
        require(self.finish is not None or bool(self.decoding()), "nothing decodes and nothing is finished")

    def _move(self, path: str, before: set[str], after: str) -> None:
        require(self.state.get(path) in before, f"{path} is {self.state.get(path)}, not {before}")
        self.state[path] = after

    def _start(self, start: Start) -> None:
        require(start.node not in self.state, f"{start.node} starts twice")
        self.state[start.node] = "decoding"
        self.tasks[start.node] = start.task
        self.depth[start.node] = start.depth
        require(start.depth <= self.limits.max_depth, "too deep")
        nodes = sum(not path.endswith("!direct") for path in self.state)
        require(nodes <= max(1, self.limits.max_nodes), "too many nodes")
        if start.phase is Phase.DIRECT:
            require(start.node.endswith("!direct"), "a stray direct solve")
            require(self.decoding() == [start.node], "the fallback is not alone")
        elif start.parent is None:
            require(start.node == "root" and start.depth == 0 and not start.fork, "a strange root")
        else:
            self._start_child(start, start.parent)

    def _start_child(self, start: Start, parent: str) -> None:
        require(start.task in self.declared, "a child that was not declared")
        child = self.declared[start.task]
        require(child.path is None, "one event, two nodes")
        child.path = start.node
        require(_bare(start.task) != _bare(self.tasks[parent]), "a child with its parent's task")
        if not child.event.depends_on:
            same = (parent, child.round, _bare(start.task))
            require(same not in self.started, "two siblings with one task")
            self.started.add(same)
        require(child.parent == parent and start.node.rpartition(".")[0] == parent, "a foreign parent")
        require(start.depth == self.depth[parent] + 1, "a wrong depth")
        require(self.state[parent] != "over", "a child of a parent that is over")
        expected = Phase.GRAPH if start.depth < self.limits.max_depth else Phase.SOLVER
        require(start.phase is expected, "a wrong phase")
        self.widths[parent, child.round] += 1
        require(self.widths[parent, child.round] <= self.limits.max_width, "too wide")
        self._check_given(start, child)

    def _check_given(self, start: Start, child: Declared) -> None:
        """Every dependency that was ever declared has concluded, and its conclusion is given, in order."""
        names = [n for n in dict.fromkeys(child.event.depends_on) if n not in child.dropped]
        for name in names:
            known = any(d.parent == child.parent and d.event.id == name for d in self.declared.values())
            require(known or name in {c.id for c in start.given}, f"{start.node} does not wait for {name}")
        for conclusion in start.given:
            self._check_conclusion(child.parent, conclusion)
        self._check_order(child.parent, names, start.given)
        require(len(start.given) <= len(child.event.depends_on), "more given than asked for")

    def _check_order(self, parent: str, names: list[str], conclusions: tuple[Conclusion, ...]) -> None:
        """``conclusions`` has those of all ``names``, in order, as far as a name means one started child."""
        plain = []
        refused = {c.id for c in conclusions if is_refusal(c)}
        for name in names:
            known = [d for d in self.declared.values() if d.parent == parent and d.event.id == name]
            if len(known) == 1 and known[0].path == f"{parent}.{name}" and name not in refused:
                require(known[0].path in self.concluded, f"{known[0].path} has not concluded")
                plain.append(name)
        require([c.id for c in conclusions if c.id in plain] == plain, f"{conclusions} are not of {plain}")

    def _check_merged(self, parent: str, conclusions: tuple[Conclusion, ...]) -> None:
        """A child that stands for siblings is told for each of them."""
        told = {_first_name(c.id) for c in conclusions}
        nodes = {c.node for c in conclusions if c.node}
        same = {(_bare(d.event.task), d.round) for d in self.declared.values() if d.path in nodes and d.alone}
        siblings = [d for d in self.declared.values() if d.parent == parent]
        declared = Counter((_first_name(d.event.id), _bare(d.event.task)) for d in siblings)
        for d in siblings:
            name, task = _first_name(d.event.id), _bare(d.event.task)
            merged = d.path is None and d.alone and (task, d.round) in same
            repeats = declared[name, task] > 1
            require(not merged or repeats or name in told, f"{d} is not told")

    def _check_conclusion(self, parent: str, conclusion: Conclusion) -> None:
        """It is word for word what the child concluded, under its id or one that it stands for, or says why there is
        no such node."""
        if is_refusal(conclusion):
            require(not conclusion.ok and conclusion.node is None, "a refusal that is ok or has a node")
            return
        path = conclusion.node or ""
        known = self.concluded.get(path)
        require(known is not None, f"{path} has not concluded")
        require(known == replace(conclusion, id=path.split(".")[-1]), f"{conclusion} is not what {path} concluded")
        own = path == f"{parent}.{conclusion.id}"
        require(own or self._stands_for(path, parent, conclusion.id), f"{conclusion.id} is not {path}")

    def _stands_for(self, path: str, parent: str, name: str) -> bool:
        """Whether a child of that name, or of the one it was renamed from, had the task of the node at ``path``."""
        siblings = (d.event for d in self.declared.values() if d.parent == parent)
        told = [event.task for event in siblings if _first_name(event.id) == _first_name(name)]
        return _bare(self.tasks[path]) in map(_bare, told)

    def _resume(self, resume: Resume) -> None:
        path = resume.node
        self._move(path, {"paused", "ended"}, "decoding")
        require(resume.phase in (Phase.CONTINUATION, Phase.SOLVER), "a wrong phase")
        self.rounds[path] += 1
        names = [n for n in dict.fromkeys(self.awaiting.pop(path, ())) if f"{path}.{n}" not in self.delivered]
        for conclusion in resume.conclusions:
            self._check_conclusion(path, conclusion)
            if not is_refusal(conclusion):
                child = f"{path}.{conclusion.id}"
                require(child not in self.delivered, f"{child} is delivered twice")
                self.delivered.add(child)
        self._check_merged(path, resume.conclusions)
        if resume.conclusions:  # else the await may have been refused
            self._check_order(path, names, resume.conclusions)

    def _finish(self, finish: Finish) -> None:
        self.finish = finish
        alive = [path for path, state in self.state.items() if state != "over"]
        require(not alive, f"finished, but {alive} are alive")
        if finish.status in (Status.GRAPH, Status.ATOMIC):
            require(self.concluded["root"].ok, "a failed root answers")
            afresh = self.concluded.get("root!direct")
            require(afresh is None or (self.limits.solves_afresh and afresh.ok), "a stray direct answer")
            require(finish.answer == (afresh or self.concluded["root"]).answer, "not the root's answer")
            split = any(path.startswith("root.") for path in self.state)
            require((finish.status is Status.GRAPH) == split, "GRAPH means that the root had children")
        elif finish.status is Status.FALLBACK:
            require(not self.concluded["root"].ok, "a fallback of a root that is whole")
            require(finish.answer == self.concluded["root!direct"].answer, "not the fallback's answer")
        else:
            require(bool(finish.error), "failed without saying why")

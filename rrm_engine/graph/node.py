"""A node of the graph and what it knows of its children: names, dependencies, whose conclusion is due."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from rrm_engine.graph.paths import NodePath
from rrm_engine.graph.states import INITIAL, NodeState
from rrm_engine.graph.types import Conclusion, EndReason, Phase


@dataclass(slots=True, eq=False)
class Node:
    """Recorders may read every field; only the machine writes them."""

    path: NodePath
    id: str  # in its parent; the path's last part
    task: str
    phase: Phase  # what it decodes now, or will when it starts or goes on
    serial: int  # order of declaration in the whole graph
    parent: "Node | None" = field(default=None, repr=False)
    depth: int = 0
    state: NodeState = INITIAL
    started: bool = False
    end: EndReason | None = None  # why its decoding last stopped by itself
    conclusion: Conclusion | None = None
    # name -> sibling, None while no sibling of that name is declared; in the order named
    dependencies: dict[str, "Node | None"] = field(default_factory=dict, repr=False)
    dependants: list["Node"] = field(default_factory=list, repr=False)
    awaited: bool = False  # its parent has asked for its conclusion

    # as a parent
    children: dict[str, "Node"] = field(default_factory=dict, repr=False)  # in order of declaration
    names: dict[str, list["Node"]] = field(default_factory=dict, repr=False)  # as declared -> children
    expected: dict[str, list["Node"]] = field(default_factory=dict, repr=False)  # undeclared -> dependants
    awaiting: tuple["Node", ...] = field(default=(), repr=False)
    rule: str = ""
    notes: list[str] = field(default_factory=list)  # for its next resume
    awaits: int = 0
    width: int = 0  # children accepted since it started or last went on
    refusals: int = 0  # children refused since then, which it has not been told

    @property
    def blocked(self) -> bool:
        return any(d is None or d.conclusion is None for d in self.dependencies.values())

    @property
    def given(self) -> tuple[Conclusion, ...]:
        """The conclusions of its dependencies, each once, in the order named."""
        return _conclusions(dict.fromkeys(d for d in self.dependencies.values() if d is not None))

    @property
    def due(self) -> tuple[Conclusion, ...]:
        """The conclusions of the children it awaits, in the order named; those that are there."""
        return _conclusions(self.awaiting)

    @property
    def unawaited(self) -> list["Node"]:
        return [c for c in self.children.values() if not c.awaited and c.state is not NodeState.REFUSED]

    def find(self, name: str) -> list["Node"]:
        """All children declared as ``name``, in order; if every one was refused, the latest of them."""
        known = self.names.get(name, [])
        return [c for c in known if c.state is not NodeState.REFUSED] or known[-1:]

    def repeats(self, name: str, task: str) -> bool:
        """Whether the node has already declared this very child and not awaited it."""
        return any(c.task == task and not c.awaited and c.state is not NodeState.REFUSED for c in self.find(name))

    def free_id(self, name: str) -> str:
        """``name`` made fit for a path and unlike every sibling's id; refused children hold no id."""
        base = re.sub(r"[^\w-]+", "_", name)[:64] or "child"
        candidate, n = base, 1
        while (sibling := self.children.get(candidate)) and sibling.state is not NodeState.REFUSED:
            n += 1
            candidate = f"{base}_{n}"
        return candidate

    def closes_cycle(self, names: Iterable[str], depends_on: Iterable[str]) -> bool:
        """Whether a new child known by ``names`` would, through ``depends_on``, wait for itself."""
        own = [n for n in names if n not in self.names]
        waiting = {c for name in own for c in self.expected.get(name, ())}
        stack: list[Node] = []
        for name in depends_on:
            if name in own:
                return True
            stack += self.find(name)[-1:]
        seen: set[Node] = set()
        while waiting and stack:
            sibling = stack.pop()
            if sibling in waiting:
                return True
            if sibling not in seen:
                seen.add(sibling)
                stack += [d for d in sibling.dependencies.values() if d is not None]
        return False

    def link(self, child: "Node", depends_on: Iterable[str]) -> None:
        """Tie a new child to the siblings it depends on, or to names not declared yet."""
        for name in dict.fromkeys(depends_on):
            target = next(reversed(self.find(name)), None)
            child.dependencies[name] = target
            if target is None:
                self.expected.setdefault(name, []).append(child)
            else:
                target.dependants.append(child)

    def adopt(self, child: "Node", names: Iterable[str]) -> None:
        """Make the child known by ``names``; siblings that expected one of them now depend on it."""
        self.children.pop(child.id, None)  # a refused child of that id; the new one comes last
        self.children[child.id] = child
        for name in names:
            self.names.setdefault(name, []).append(child)
            for sibling in self.expected.pop(name, ()):
                sibling.dependencies[name] = child
                child.dependants.append(sibling)

    def drop_expected(self) -> Iterator[tuple["Node", str]]:
        """Give up on names that were never declared: (child, name) of each dependency dropped."""
        expected, self.expected = self.expected, {}
        for name, children in expected.items():
            for child in children:
                del child.dependencies[name]
                yield child, name


def _conclusions(nodes: Iterable[Node]) -> tuple[Conclusion, ...]:
    return tuple(n.conclusion for n in nodes if n.conclusion is not None)

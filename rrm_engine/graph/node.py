"""A node of the graph and its children: their names and dependencies, and which conclusions are due."""

import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from rrm_engine.graph.paths import NodePath
from rrm_engine.graph.states import INITIAL, NodeState
from rrm_engine.graph.types import Conclusion, EndReason, Phase

_LABEL = re.compile(r"^(?:problem|task|question)\s*:", re.IGNORECASE)
_QUOTES = ('""', "''", "``", "“”", "‘’")  # noqa: RUF001
_CAPITALS = re.compile(r"\b(?:[A-Z][a-z]+|[A-Z]{4,})\b")


@dataclass(slots=True, eq=False)
class Node:
    """Recorders may read every field; only the machine writes them."""

    path: NodePath
    id: str  # in its parent; the path's last part
    task: str
    phase: Phase  # the phase it is in, or will enter when it starts or goes on
    serial: int  # order of declaration in the whole graph
    parent: "Node | None" = field(default=None, repr=False)
    depth: int = 0
    bare: str = field(init=False, repr=False)  # its task, normalised for comparison with others
    state: NodeState = INITIAL
    started: bool = False
    end: EndReason | None = None  # why its decoding last stopped by itself
    conclusion: Conclusion | None = None
    # by name, in the order named: the sibling, None while none of that name is declared
    dependencies: dict[str, "Node | None"] = field(default_factory=dict, repr=False)
    dependants: list["Node"] = field(default_factory=list, repr=False)
    awaited: bool = False  # its parent has asked for its conclusion

    # as a parent
    # children by title, the id that a conclusion is told under, in order of declaration; a child that stands for a
    # sibling too has several titles
    children: dict[str, "Node"] = field(default_factory=dict, repr=False)
    names: dict[str, list["Node"]] = field(default_factory=dict, repr=False)  # children by their name as declared
    expected: dict[str, list["Node"]] = field(default_factory=dict, repr=False)  # by undeclared name: its dependants
    awaiting: tuple[tuple[str, "Node"], ...] = field(default=(), repr=False)  # (title, child)
    rule: str = ""
    notes: list[str] = field(default_factory=list)  # for its next resume
    awaits: int = 0
    width: int = 0  # children accepted since it started or last went on
    refusals: int = 0  # children refused since then, of which it has not been told yet

    def __post_init__(self) -> None:
        self.bare = normalised(self.task)

    @property
    def blocked(self) -> bool:
        return any(d is None or d.conclusion is None for d in self.dependencies.values())

    @property
    def given(self) -> tuple[Conclusion, ...]:
        """The conclusions of its dependencies, in the order named, each title once."""
        if self.parent is None:
            return ()
        titled = [(self.parent.title(d, name), d) for name, d in self.dependencies.items() if d is not None]
        return _conclusions(dict.fromkeys(titled))

    @property
    def due(self) -> tuple[Conclusion, ...]:
        """The conclusions reached so far of the children it awaits, in the order named."""
        return _conclusions(self.awaiting)

    @property
    def unawaited(self) -> list[tuple[str, "Node"]]:
        """The children whose conclusions it has not asked for, under every title."""
        return [(t, c) for t, c in self.children.items() if not c.awaited and c.state is not NodeState.REFUSED]

    def find(self, name: str) -> list["Node"]:
        """The children declared as ``name``, in order, without refused ones; if all were refused, the last of them."""
        known = self.names.get(name, [])
        return [c for c in known if c.state is not NodeState.REFUSED] or known[-1:]

    def title(self, child: "Node", name: str) -> str:
        """The title that the conclusion of ``child`` is told under when it is called ``name``."""
        return name if self.children.get(name) is child else child.id

    def repeats(self, name: str, task: str) -> bool:
        """Whether the node has declared a child of this name and task already and not awaited it yet."""
        known = (c for c in self.find(name) if not c.awaited and c.state is not NodeState.REFUSED)
        return any(c.bare == normalised(task) for c in known)

    def twin(self, task: str, depends_on: Iterable[str]) -> "Node | None":
        """The child not yet awaited that has this task and the same dependencies, if there is one."""
        same, given = normalised(task), {name: next(reversed(self.find(name)), None) for name in depends_on}
        return next((c for _, c in self.unawaited if c.bare == same and c.dependencies == given), None)

    def ancestor(self, task: str) -> "Node | None":
        """This node or the nearest of its ancestors that has this task, if there is one."""
        same = normalised(task)
        node: Node | None = self
        while node is not None and node.bare != same:
            node = node.parent
        return node

    def free_id(self, name: str) -> str:
        """An id made from ``name``: fit for a path and no sibling's; ids of refused children are free."""
        base = re.sub(r"[^\w-]+", "_", name)[:64] or "child"
        candidate, n = base, 1
        while (sibling := self.children.get(candidate)) and sibling.state is not NodeState.REFUSED:
            n += 1
            candidate = f"{base}_{n}"
        return candidate

    def closes_cycle(self, names: Iterable[str], depends_on: Iterable[str]) -> bool:
        """Whether a new child called ``names`` would, through ``depends_on``, wait for itself."""
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
        """Enter the dependencies of a new child: siblings, or names not declared yet."""
        for name in dict.fromkeys(depends_on):
            target = next(reversed(self.find(name)), None)
            child.dependencies[name] = target
            if target is None:
                self.expected.setdefault(name, []).append(child)
            else:
                target.dependants.append(child)

    def adopt(self, child: "Node", title: str, names: Iterable[str]) -> None:
        """Add a child under ``title`` and ``names``. Siblings that depend on one of these names now depend on it."""
        self.children.pop(title, None)  # a refused child had this id; the new one is ordered last
        self.children[title] = child
        for name in names:
            self.names.setdefault(name, []).append(child)
            for sibling in self.expected.pop(name, ()):
                sibling.dependencies[name] = child
                child.dependants.append(sibling)

    def drop_expected(self) -> Iterator[tuple["Node", str]]:
        """Drop dependencies on names that were never declared; yields (child, name) of each."""
        expected, self.expected = self.expected, {}
        for name, children in expected.items():
            for child in children:
                del child.dependencies[name]
                yield child, name


def normalised(task: str) -> str:
    """``task`` in a form in which equal tasks are equal strings: without a label before it ("Problem:"), white space,
    quotes around it and punctuation at its end, and words in lower case.

    Single letters and short runs of capitals keep their case, because "N" and "n", or "AB" and "ab", may be different
    quantities. A final exclamation mark is kept, as it may be a factorial, and so is a quote at one end only, as it may
    be a derivative.
    """
    text, before = unicodedata.normalize("NFC", " ".join(task.split())), None
    while text != before:
        before = text
        text = _LABEL.sub("", text).strip().rstrip(" .?:;,")
        if len(text) > 2 and text[0] + text[-1] in _QUOTES:
            text = text[1:-1].strip()
    return _CAPITALS.sub(lambda word: word[0].lower(), text) or task.strip()


def _conclusions(titled: Iterable[tuple[str, Node]]) -> tuple[Conclusion, ...]:
    return tuple(replace(n.conclusion, id=title, task=n.task) for title, n in titled if n.conclusion is not None)

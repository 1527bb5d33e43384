"""A node of the graph and what it knows of its children: names, dependencies, whose conclusion is due."""

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
    phase: Phase  # what it decodes now, or will when it starts or goes on
    serial: int  # order of declaration in the whole graph
    parent: "Node | None" = field(default=None, repr=False)
    depth: int = 0
    bare: str = field(init=False, repr=False)  # its task as it is compared with others
    state: NodeState = INITIAL
    started: bool = False
    end: EndReason | None = None  # why its decoding last stopped by itself
    conclusion: Conclusion | None = None
    # name -> sibling, None while no sibling of that name is declared; in the order named
    dependencies: dict[str, "Node | None"] = field(default_factory=dict, repr=False)
    dependants: list["Node"] = field(default_factory=list, repr=False)
    awaited: bool = False  # its parent has asked for its conclusion

    # as a parent
    # title -> child, in order of declaration; a child that stands for a sibling's task too is there once per title
    children: dict[str, "Node"] = field(default_factory=dict, repr=False)
    names: dict[str, list["Node"]] = field(default_factory=dict, repr=False)  # as declared -> children
    expected: dict[str, list["Node"]] = field(default_factory=dict, repr=False)  # undeclared -> dependants
    awaiting: tuple[tuple[str, "Node"], ...] = field(default=(), repr=False)  # with the titles they are told under
    rule: str = ""
    notes: list[str] = field(default_factory=list)  # for its next resume
    awaits: int = 0
    width: int = 0  # children accepted since it started or last went on
    refusals: int = 0  # children refused since then, which it has not been told

    def __post_init__(self) -> None:
        self.bare = normalised(self.task)

    @property
    def blocked(self) -> bool:
        return any(d is None or d.conclusion is None for d in self.dependencies.values())

    @property
    def given(self) -> tuple[Conclusion, ...]:
        """The conclusions of its dependencies, each title once, in the order named."""
        if self.parent is None:
            return ()
        titled = [(self.parent.title(d, name), d) for name, d in self.dependencies.items() if d is not None]
        return _conclusions(dict.fromkeys(titled))

    @property
    def due(self) -> tuple[Conclusion, ...]:
        """The conclusions of the children it awaits, in the order named; those that are there."""
        return _conclusions(self.awaiting)

    @property
    def unawaited(self) -> list[tuple[str, "Node"]]:
        """The children whose conclusions it has not asked for, under every title."""
        return [(t, c) for t, c in self.children.items() if not c.awaited and c.state is not NodeState.REFUSED]

    def find(self, name: str) -> list["Node"]:
        """All children declared as ``name``, in order; if every one was refused, the latest of them."""
        known = self.names.get(name, [])
        return [c for c in known if c.state is not NodeState.REFUSED] or known[-1:]

    def title(self, child: "Node", name: str) -> str:
        """What ``child``, meant by ``name``, is told as: one of its titles."""
        return name if self.children.get(name) is child else child.id

    def repeats(self, name: str, task: str) -> bool:
        """Whether the node has already declared this very child and not awaited it."""
        known = (c for c in self.find(name) if not c.awaited and c.state is not NodeState.REFUSED)
        return any(c.bare == normalised(task) for c in known)

    def twin(self, task: str, depends_on: Iterable[str]) -> "Node | None":
        """The child that has this task, is given the same and has not been awaited."""
        same, given = normalised(task), {name: next(reversed(self.find(name)), None) for name in depends_on}
        return next((c for _, c in self.unawaited if c.bare == same and c.dependencies == given), None)

    def ancestor(self, task: str) -> "Node | None":
        """The nearest of this node, its parent and so on that has this task."""
        same = normalised(task)
        node: Node | None = self
        while node is not None and node.bare != same:
            node = node.parent
        return node

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

    def adopt(self, child: "Node", title: str, names: Iterable[str]) -> None:
        """Take the child in under ``title``, known by ``names``; siblings that expected one now depend on it."""
        self.children.pop(title, None)  # a refused child of that id; the new one comes last
        self.children[title] = child
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


def normalised(task: str) -> str:
    """``task`` without what makes no other task of it: a label in front ("Problem:"), white space, quotes around it,
    its last full stop, and the case of words.

    Single letters, and short runs of capitals, keep theirs: "N" and "n", "AB" and "ab" may be two quantities. An
    exclamation mark at the end may be a factorial, and a quote at one end alone a derivative.
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

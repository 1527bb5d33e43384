"""A graph to replay: which node starts which and when, and how many tokens each piece has, or which."""

import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from graphlib import TopologicalSorter
from itertools import groupby

from rrm_engine.errors import RrmError

Tokens = int | tuple[int, ...]  # a count, or token ids


@dataclass(frozen=True, slots=True)
class Decode:
    tokens: Tokens


@dataclass(frozen=True, slots=True)
class Child:
    node: str


@dataclass(frozen=True, slots=True)
class Await:
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Append:
    """``of`` names the child whose conclusion it is: then ``tokens`` are some of those that the child ends with."""

    tokens: Tokens
    of: str | None = None


Step = Decode | Child | Await | Append


@dataclass(frozen=True, slots=True)
class Node:
    """One node's life. ``fork``: its context is its parent's up to the ``child`` step, and then ``prompt``."""

    prompt: Tokens
    steps: tuple[Step, ...]
    after: tuple[str, ...] = ()
    fork: bool = False

    @property
    def children(self) -> list[str]:
        return [step.node for step in self.steps if isinstance(step, Child)]

    @property
    def decoded(self) -> int:
        return sum(count(step.tokens) for step in self.steps if isinstance(step, Decode))

    @property
    def appended(self) -> int:
        return sum(count(step.tokens) for step in self.steps if isinstance(step, Append))


@dataclass(frozen=True, slots=True)
class Attach:
    """At index ``at`` of what is appended to a node stand ``size`` of a child's tokens, from its token ``start`` on."""

    at: int
    child: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Graph:
    id: str
    nodes: dict[str, Node]
    shared_prefix: Tokens = 0
    seed: int = 0
    parents: dict[str, str] = field(init=False, compare=False, repr=False)  # child -> parent; roots are not in it

    def __post_init__(self) -> None:
        found = {child: name for name, node in self.nodes.items() for child in node.children}
        object.__setattr__(self, "parents", found)

    @property
    def roots(self) -> list[str]:
        return [name for name in self.nodes if name not in self.parents]

    def depth(self, name: str) -> int:
        """0 for a root."""
        depth = 0
        while (parent := self.parents.get(name)) is not None:
            name, depth = parent, depth + 1
        return depth

    def context(self, name: str) -> int:
        """Tokens that node ``name`` starts from."""
        node = self.nodes[name]
        if not node.fork:
            return count(self.shared_prefix) + count(node.prompt)
        parent = self.parents[name]
        return self.context(parent) + self.tokens_before(parent, name) + count(node.prompt)

    def tokens_before(self, parent: str, child: str) -> int:
        """Tokens that ``parent`` decodes or is given before the step that starts ``child``."""
        total = 0
        for step in self.nodes[parent].steps:
            if step == Child(child):
                return total
            total += count(step.tokens) if isinstance(step, Decode | Append) else 0
        raise KeyError(child)

    def length(self, name: str) -> int:
        """Tokens that node ``name`` ends with."""
        node = self.nodes[name]
        return self.context(name) + node.decoded + node.appended

    def forked(self) -> "Graph":
        """The same graph with every child starting from its parent's whole context."""
        nodes = {name: replace(node, fork=name in self.parents) for name, node in self.nodes.items()}
        return replace(self, nodes=nodes)

    def transcribed(self) -> "Graph":
        """The same graph with every child's whole answer, all that it decodes at last, in place of its conclusion."""

        def whole(step: Step) -> Step:
            return replace(step, tokens=self.answer(step.of)) if isinstance(step, Append) and step.of else step

        return self._with_steps({name: tuple(map(whole, node.steps)) for name, node in self.nodes.items()})

    def answer(self, name: str) -> Tokens:
        """What node ``name`` decodes after its last await or append; it ends with that."""
        last: list[Tokens] = []
        for step in self.nodes[name].steps:
            if isinstance(step, Decode):
                last.append(step.tokens)
            elif not isinstance(step, Child):
                last = []
        if any(isinstance(tokens, int) for tokens in last):
            return sum(map(count, last))
        return tuple(token for tokens in last for token in ids(tokens))

    def attached(self, steps: Iterable[Step]) -> list[Attach]:
        """Where a drawn graph's ``steps`` between two decodes append children's tokens whose KV can be attached.

        A child's last token has never been run, and after every attached stretch there has to be one that is.
        """
        at, found = 0, list[Attach]()
        for step in steps:
            if not isinstance(step, Append):
                continue
            if step.of is not None:
                start, size = self._place(step.of, step.tokens), count(step.tokens)
                found.append(Attach(at, step.of, start, min(size, self.length(step.of) - 1 - start)))
            at += count(step.tokens)
        bounds = [*(attach.at for attach in found[1:]), at]
        sizes = [min(attach.size, bound - attach.at - 1) for attach, bound in zip(found, bounds, strict=False)]
        return [replace(attach, size=size) for attach, size in zip(found, sizes, strict=True) if size > 0]

    def all_attached(self) -> list[Attach]:
        """All that is attached anywhere."""
        return [attach for name in self.nodes for _, attached in self._turns(name) for attach in attached]

    def exact(self, name: str) -> int:
        """Tokens of a node in front of the first one whose KV is attached, of its own or of what it forks from."""
        if (node := self.nodes[name]).fork:
            inherited = self.exact(self.parents[name])
            if inherited < self.context(name) - count(node.prompt):
                return inherited
        places = [begin + attached[0].at for begin, attached in self._turns(name) if attached]
        return min(places, default=self.length(name))

    def _turns(self, name: str) -> Iterator[tuple[int, list[Attach]]]:
        """For each stretch of appended tokens where it begins in the node, and what is attached there."""
        at = self.context(name)
        for is_turn, group in groupby(self.nodes[name].steps, lambda step: isinstance(step, Append | Await)):
            steps = list(group)
            if is_turn:
                yield at, self.attached(steps)
            at += sum(count(step.tokens) for step in steps if isinstance(step, Append | Decode))

    def _place(self, child: str, tokens: Tokens) -> int:
        """Index in the child's transcript of the last such stretch of its answer. Raises ValueError if none is."""
        answer, wanted = ids(self.answer(child)), ids(tokens)
        for start in reversed(range(len(answer) - len(wanted) + 1)):
            if answer[start : start + len(wanted)] == wanted:
                return self.length(child) - len(answer) + start
        raise ValueError(f"graph {self.id} appends tokens of {child} that {child} does not decode at last")

    def _with_steps(self, steps: Mapping[str, tuple[Step, ...]]) -> "Graph":
        return replace(self, nodes={name: replace(node, steps=steps[name]) for name, node in self.nodes.items()})

    def drawn(self, vocabulary: int) -> "Graph":
        """The same graph with every count replaced by token ids below ``vocabulary``, the same ones every time.

        Raises RrmError if a token id that the graph gives is not below ``vocabulary``.
        """

        def draw(tokens: Tokens, *place: str | int) -> tuple[int, ...]:
            if isinstance(tokens, int):
                numbers = random.Random(f"{self.seed}/{self.id}/{'/'.join(map(str, place))}")
                return tuple(numbers.choices(range(vocabulary), k=tokens))
            if tokens and max(tokens) >= vocabulary:
                raise RrmError(
                    f"graph {self.id} has token id {max(tokens)} and the model knows none above {vocabulary - 1}: "
                    f"replay it with the --model it was recorded with"
                )
            return tokens

        def carried(step: Step) -> bool:
            return isinstance(step, Append) and step.of is not None and isinstance(step.tokens, int)

        nodes = {}
        for name, node in self.nodes.items():
            steps = tuple(
                replace(step, tokens=draw(step.tokens, name, i))
                if isinstance(step, Decode | Append) and not carried(step)
                else step
                for i, step in enumerate(node.steps)
            )
            nodes[name] = replace(node, prompt=draw(node.prompt, name), steps=steps)
        graph = replace(self, nodes=nodes, shared_prefix=draw(self.shared_prefix))

        def carry(step: Step) -> Step:
            if not isinstance(step, Append) or step.of is None or not isinstance(step.tokens, int):
                return step
            return replace(step, tokens=tuple(ids(graph.answer(step.of))[-step.tokens :]))

        return graph._with_steps({name: tuple(map(carry, node.steps)) for name, node in nodes.items()})

    def transcript(self, name: str) -> list[int]:
        """All tokens that node ``name`` ends with; the graph has to be a drawn one."""
        node = self.nodes[name]
        tokens = ids(node.prompt)
        if node.fork:
            parent = self.parents[name]
            tokens = self.transcript(parent)[: self.context(name) - len(tokens)] + tokens
        else:
            tokens = ids(self.shared_prefix) + tokens
        return tokens + [t for step in node.steps if isinstance(step, Decode | Append) for t in ids(step.tokens)]

    def critical_path(self) -> int:
        """Decoded tokens on the longest chain to the answer. Raises graphlib.CycleError if something waits for itself.

        A point (node, i) is where a node stands before its step i; every point waits for others.
        """
        waits: dict[tuple[str, int], list[tuple[str, int]]] = {}
        for name, node in self.nodes.items():
            waits[name, 0] = [self._end(other) for other in node.after]
            if (parent := self.parents.get(name)) is not None:
                waits[name, 0].append((parent, self.nodes[parent].steps.index(Child(name))))
            for i, step in enumerate(node.steps):
                awaited = step.nodes if isinstance(step, Await) else ()
                waits[name, i + 1] = [(name, i), *map(self._end, awaited)]
        reach: dict[tuple[str, int], int] = {}
        for name, i in TopologicalSorter(waits).static_order():
            step_before = self.nodes[name].steps[i - 1] if i else None
            own = count(step_before.tokens) if isinstance(step_before, Decode) else 0
            reach[name, i] = own + max((reach[point] for point in waits[name, i]), default=0)
        return max(reach[self._end(root)] for root in self.roots)

    def _end(self, name: str) -> tuple[str, int]:
        return name, len(self.nodes[name].steps)


def count(tokens: Tokens) -> int:
    """How many they are."""
    return tokens if isinstance(tokens, int) else len(tokens)


def ids(tokens: Tokens) -> list[int]:
    """The token ids of a drawn graph. Raises ValueError for a count."""
    if isinstance(tokens, int):
        raise ValueError("draw the graph's tokens first: Graph.drawn(vocabulary)")
    return list(tokens)

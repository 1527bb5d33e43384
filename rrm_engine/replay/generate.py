"""Seeded shapes of recursive runs. Only counts are drawn here; the tokens come from each graph's own seed."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from rrm_engine.replay.graph import Append, Await, Child, Decode, Graph, Node, Step, count

Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Shape:
    """Ranges, in tokens where nothing else is said, that a graph's sizes are drawn from."""

    system: Range  # the shared prefix
    task: Range  # what follows it in a node's prompt
    plan: Range  # what a planning node writes up to its await
    children: Range
    solve: Range  # what a child writes
    conclusion: Range  # of one child, in its parent's context
    continuation: Range  # what a parent writes after a resume
    splits: float  # share of the children that plan children of their own, one level down
    depends: float  # share of the children that wait for the sibling before them


SHAPES = {
    # As recursive runs on AIME problems look with thinking models.
    "aime": Shape((350, 500), (80, 250), (300, 1500), (2, 12), (500, 7000), (40, 250), (200, 3000), 0.1, 0.15),
    # A few hundred tokens a graph, for CPUs and tiny models.
    "small": Shape((24, 48), (12, 32), (24, 48), (2, 4), (24, 72), (6, 16), (16, 40), 0.25, 0.25),
    # The prompts of "small" and more, and little to decode: for models that take a CPU's cores for every step.
    "short": Shape((64, 96), (16, 32), (10, 16), (2, 3), (8, 16), (6, 8), (6, 10), 0.25, 0.25),
}


def generate(shape: str, count: int, seed: int = 0) -> list[Graph]:
    """``count`` graphs of a shape in ``SHAPES``; the same ones for the same seed, however many are asked for."""
    return [_graph(SHAPES[shape], f"{shape}-{seed}-{i}", seed + i) for i in range(count)]


def scaled(shape: str, factor: int, count: int, seed: int = 0) -> list[Graph]:
    """``count`` graphs of a shape whose tokens (not its nodes) are divided by ``factor``."""
    whole = SHAPES[shape]
    tokens = ("system", "task", "plan", "solve", "conclusion", "continuation")
    parts = {name: tuple(max(1, bound // factor) for bound in getattr(whole, name)) for name in tokens}
    most = whole.children[1]
    low, high = parts["plan"]
    parts["plan"] = max(low, most + 2), max(high, most + 2)  # room for a line for each child
    smaller = replace(whole, **parts)  # type: ignore[arg-type]
    return [_graph(smaller, f"{shape}/{factor}-{seed}-{i}", seed + i) for i in range(count)]


def _graph(shape: Shape, name: str, seed: int) -> Graph:
    numbers = random.Random(name)

    def draw(bounds: Range) -> int:
        return numbers.randint(*bounds)

    nodes: dict[str, Node] = {}
    prefix = draw(shape.system)
    _planner(nodes, "root", shape, draw, numbers, levels=2)
    return Graph(name, dict(sorted(nodes.items())), prefix, seed)


def _planner(
    nodes: dict[str, Node],
    name: str,
    shape: Shape,
    draw: Callable[[Range], int],
    numbers: random.Random,
    levels: int,
    after: tuple[str, ...] = (),
) -> None:
    """Add a node that plans children, awaits them and continues; its children may do the same one level down."""
    low, high = shape.children
    children = [f"{name}.{i:02}" for i in range(draw((low, high if levels > 1 else min(high, low + 2))))]
    plan = draw(shape.plan)
    cuts = sorted(numbers.sample(range(1, plan), len(children)))
    steps: list[Step] = []
    for child, begin, end in zip(children, [0, *cuts], cuts, strict=False):
        steps += [Decode(end - begin), Child(child)]
    steps += [Decode(plan - cuts[-1]), Await(tuple(children))]
    conclusions = [draw(shape.conclusion) for _ in children]
    continuation, task = Decode(draw(shape.continuation)), draw(shape.task)
    for i, child in enumerate(children):
        waits = (children[i - 1],) if i and numbers.random() < shape.depends else ()
        if levels > 1 and numbers.random() < shape.splits:
            _planner(nodes, child, shape, draw, numbers, levels - 1, waits)
        else:
            nodes[child] = Node(draw(shape.task), (Decode(draw(shape.solve)),), waits)
    for child, size in zip(children, conclusions, strict=True):
        last = nodes[child].steps[-1]
        assert isinstance(last, Decode)
        steps.append(Append(min(size, count(last.tokens)), child))
        steps += [Append(size - count(last.tokens))] if size > count(last.tokens) else []
    nodes[name] = Node(task, (*steps, continuation), after)

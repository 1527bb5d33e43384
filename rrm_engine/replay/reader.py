"""Graph files read strictly and written; every refusal is one sentence with the line's number."""

import json
from collections import Counter
from collections.abc import Callable, Iterable
from graphlib import CycleError
from itertools import pairwise
from pathlib import Path
from typing import Any

from rrm_engine.errors import RrmError
from rrm_engine.replay.graph import Append, Await, Child, Decode, Graph, Node, Step, Tokens, count


class GraphError(RrmError):
    """A graph file, or a graph in it, cannot be used; the message is one sentence for the user."""


def read_graphs(path: Path) -> list[Graph]:
    """The graphs of a file. Raises GraphError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise GraphError(f"--graphs {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise GraphError(f"--graphs {path} cannot be read ({error})") from None
    graphs: dict[str, int] = {}
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            graph = parse_graph(_json(line))
            if graph.id in graphs:
                raise GraphError(f"id {graph.id!r} is that of line {graphs[graph.id]} too")
        except GraphError as error:
            raise GraphError(f"{path}, line {number}: {error}") from None
        graphs[graph.id] = number
        found.append(graph)
    if not found:
        raise GraphError(f"{path} holds no graph; a line of it is one graph")
    return found


def write_graphs(path: Path, graphs: Iterable[Graph]) -> None:
    """Write a file that ``read_graphs`` reads."""
    path.write_text("".join(json.dumps(as_json(graph)) + "\n" for graph in graphs), encoding="utf-8")


def as_json(graph: Graph) -> dict[str, Any]:
    """The object of a graph file's line."""
    nodes: dict[str, dict[str, Any]] = {}
    for name, node in graph.nodes.items():
        nodes[name] = {"prompt": _plain(node.prompt), "steps": [_step_json(step) for step in node.steps]}
        nodes[name] |= {"after": list(node.after)} if node.after else {}
        nodes[name] |= {"fork": True} if node.fork else {}
    return {"id": graph.id, "seed": graph.seed, "shared_prefix": _plain(graph.shared_prefix), "nodes": nodes}


def parse_graph(value: Any) -> Graph:
    """A graph from the object of a file's line. Raises GraphError."""
    fields = _object(value, "the line", {"id", "nodes"}, {"seed", "shared_prefix"})
    if not isinstance(fields["id"], str) or not fields["id"]:
        raise GraphError(f"id takes a name, not {_show(fields['id'])}")
    seed = fields.get("seed", 0)
    if not _is_count(seed, 0):
        raise GraphError(f"seed takes a whole number, not {_show(seed)}")
    prefix = _tokens(fields.get("shared_prefix", 0), "shared_prefix", least=0)
    if not isinstance(fields["nodes"], dict) or not fields["nodes"]:
        raise GraphError("nodes takes an object with at least one node")
    nodes = {name: _node(name, node) for name, node in fields["nodes"].items()}
    _check_names(nodes)
    graph = Graph(fields["id"], nodes, prefix, seed)
    for name, node in nodes.items():
        if node.fork and name not in graph.parents:
            raise GraphError(f"{name} forks and no child step starts it")
    try:
        if not graph.roots:
            raise CycleError
        graph.critical_path()
        _check_conclusions(graph)
    except CycleError:
        raise GraphError("its nodes wait for each other in a circle, so it can never end") from None
    return graph


def _node(name: str, value: Any) -> Node:
    fields = _object(value, name, {"prompt", "steps"}, {"after", "fork"})
    if not isinstance(fork := fields.get("fork", False), bool):
        raise GraphError(f"fork of {name} takes true or false, not {_show(fork)}")
    if not isinstance(fields["steps"], list):
        raise GraphError(f"steps of {name} takes a list")
    steps = tuple(_step(name, step) for step in fields["steps"])
    _check_order(name, steps)
    prompt = _tokens(fields["prompt"], f"prompt of {name}", least=1)
    return Node(prompt, steps, _names(fields.get("after", []), f"after of {name}", least=0), fork)


def _step(name: str, value: Any) -> Step:
    if isinstance(value, dict) and value.keys() == {"append", "of"}:
        if not isinstance(of := value["of"], str):
            raise GraphError(f"of of {name} takes a node's name, not {_show(of)}")
        return Append(_tokens(value["append"], f"append of {name}", least=1), of)
    if not isinstance(value, dict) or len(value) != 1 or (kind := next(iter(value))) not in STEPS:
        raise GraphError(f"a step of {name} has one key, decode, child, await or append, and this is {_show(value)}")
    return STEPS[kind](value[kind], f"{kind} of {name}")


def _child(value: Any, what: str) -> Child:
    if not isinstance(value, str):
        raise GraphError(f"{what} takes a node's name, not {_show(value)}")
    return Child(value)


STEPS: dict[str, Callable[[Any, str], Step]] = {
    "decode": lambda value, what: Decode(_tokens(value, what, least=1)),
    "append": lambda value, what: Append(_tokens(value, what, least=1)),
    "await": lambda value, what: Await(_names(value, what, least=1)),
    "child": _child,
}


def _check_order(name: str, steps: tuple[Step, ...]) -> None:
    if not steps or not isinstance(steps[0], Decode) or not isinstance(steps[-1], Decode):
        raise GraphError(f"the first and the last step of {name} have to be decode")
    for before, step in pairwise(steps):
        if isinstance(step, Child) and not isinstance(before, Decode | Child):
            raise GraphError(f"{name} starts {step.node} between two decode steps: child has to follow decode or child")


def _check_names(nodes: dict[str, Node]) -> None:
    started = Counter(child for node in nodes.values() for child in node.children)
    for name, node in nodes.items():
        own: list[str] = []
        for step in node.steps:
            if isinstance(step, Child):
                own.append(step.node)
                if step.node not in nodes:
                    raise GraphError(f"{name} starts {step.node}, and there is no such node")
            if isinstance(step, Await) and (strange := [child for child in step.nodes if child not in own]):
                raise GraphError(f"{name} awaits {strange[0]}, which it has not started before")
        if unknown := [other for other in node.after if other not in nodes]:
            raise GraphError(f"{name} comes after {unknown[0]}, and there is no such node")
    if twice := [name for name, n in started.items() if n > 1]:
        raise GraphError(f"{twice[0]} is started twice")


def _check_conclusions(graph: Graph) -> None:
    """What is appended of a child has to be there, and to be its own."""
    for name, node in graph.nodes.items():
        awaited, carried = set[str](), set[str]()
        for step in node.steps:
            if isinstance(step, Await):
                awaited |= {*step.nodes}
            if not isinstance(step, Append) or step.of is None:
                continue
            if step.of not in awaited or step.of in carried:
                raise GraphError(f"{name} appends tokens of {step.of}, which it has not awaited, or appends twice")
            carried.add(step.of)
            answer = graph.answer(step.of)
            if isinstance(step.tokens, int) and step.tokens > count(answer):
                raise GraphError(f"{name} appends {step.tokens} tokens of {step.of}, which has {count(answer)} at last")
            if not isinstance(step.tokens, int) and not contains(answer, step.tokens):
                raise GraphError(f"{name} appends tokens of {step.of} that {step.of} does not decode at last")


def contains(answer: Tokens, tokens: tuple[int, ...]) -> bool:
    """Whether ``tokens`` stand in ``answer`` in one piece; of a mere count that is not known, so they do not."""
    if isinstance(answer, int):
        return False
    return any(answer[i : i + len(tokens)] == tokens for i in range(len(answer) - len(tokens) + 1))


def _json(line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_unique)
    except GraphError:
        raise
    except (ValueError, RecursionError) as error:
        raise GraphError(f"not JSON ({error})") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise GraphError(f"the key {Counter(k for k, _ in pairs).most_common(1)[0][0]!r} stands twice in one object")
    return found


def _object(value: Any, what: str, needed: set[str], allowed: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise GraphError(f"{what} has to be an object, not {_show(value)}")
    if missing := sorted(needed - value.keys()):
        raise GraphError(f"{what} lacks {missing[0]}")
    if unknown := sorted(value.keys() - needed - allowed):
        raise GraphError(f"{what} has the unknown key {unknown[0]!r}")
    return value


def _tokens(value: Any, what: str, least: int) -> Tokens:
    if _is_count(value, least):
        return value
    if isinstance(value, list) and len(value) >= least and all(_is_count(token, 0) for token in value):
        return tuple(value)
    raise GraphError(f"{what} takes a count of at least {least} or a list of token ids, not {_show(value)}")


def _names(value: Any, what: str, least: int) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) < least or not all(isinstance(name, str) for name in value):
        raise GraphError(f"{what} takes a list of node names, not {_show(value)}")
    return tuple(value)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _plain(tokens: Tokens) -> int | list[int]:
    return tokens if isinstance(tokens, int) else list(tokens)


def _step_json(step: Step) -> dict[str, Any]:
    match step:
        case Decode(tokens):
            return {"decode": _plain(tokens)}
        case Append(tokens, of):
            return {"append": _plain(tokens)} | ({} if of is None else {"of": of})
        case Await(nodes):
            return {"await": list(nodes)}
        case Child(node):
            return {"child": node}


def _show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

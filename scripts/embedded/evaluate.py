"""Greedy runs of tasks in both modes with plain transformers: accuracy, valid graphs, critical path.

    PYTHONPATH=scripts python -m embedded.evaluate rrm_engine/data/embedded_model rrm_engine/data/embedded_tasks.jsonl

The recursive run is played in waves: all nodes that can go on are decoded as one padded batch.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="model folder")
    parser.add_argument("tasks", type=Path, help="JSON lines with problem, answer, kind, family, width")
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    build_parser().parse_args()  # --help is answered before torch is imported

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3ForCausalLM

from embedded.transcripts import Results, direct_prompt, graph_prompt, resume_turn

AWAIT_END = '"],"rule":"sum"}'
MAX_NEW_TOKENS = 1100
MAX_DEPTH = 2
BATCH = 48


@dataclass
class Node:
    """One node of a recursive run. Times are decoded tokens since the root's first one."""

    id: str
    task: str
    depth: int
    depends_on: tuple[str, ...] = ()
    parent: "Node | None" = None
    ids: list[int] = field(default_factory=list)  # context: prompt, own tokens, resume turn
    fork: list[int] = field(default_factory=list)  # tokens up to the end of the await
    last: list[int] = field(default_factory=list)  # tokens after the resume turn, or all of a leaf's
    children: "list[Node]" = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)  # fork tokens written when each child's event closed
    started: bool = False
    result: int | None = None
    error: str | None = None

    @property
    def ended(self) -> bool:
        return self.result is not None or self.error is not None

    def nodes(self) -> "list[Node]":
        return [self, *(node for child in self.children for node in child.nodes())]

    def finish_time(self, start: int = 0) -> int:
        """When the node concludes if every child starts as soon as it can."""
        finished: dict[str, int] = {}
        for child, offset in zip(self.children, self.offsets, strict=True):
            begin = max([start + offset, *(finished[name] for name in child.depends_on)])
            finished[child.id] = child.finish_time(begin)
        resumed = max([start + len(self.fork), *finished.values()])
        return resumed + len(self.last)


class Runner:
    """Greedy decoding of many contexts at once."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
        self.model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        (await_end,) = self.encode(AWAIT_END)
        self.stops = [self.tokenizer.eos_token_id, await_end]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode([i for i in ids if i != self.tokenizer.eos_token_id])

    @torch.no_grad()
    def generate(self, contexts: list[list[int]]) -> list[list[int]]:
        """The new tokens of each context, up to and with a stop token."""
        out: list[list[int]] = [[] for _ in contexts]
        order = sorted(range(len(contexts)), key=lambda i: len(contexts[i]))
        for first in range(0, len(order), BATCH):
            chosen = order[first : first + BATCH]
            length = max(len(contexts[i]) for i in chosen)
            ids = torch.full((len(chosen), length), self.tokenizer.pad_token_id)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(chosen):
                ids[row, length - len(contexts[i]) :] = torch.tensor(contexts[i])
                mask[row, length - len(contexts[i]) :] = 1
            written = self.model.generate(
                ids, attention_mask=mask, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=self.stops
            )
            for row, i in enumerate(chosen):
                out[i] = self._until_stop(written[row, length:].tolist())
        return out

    def _until_stop(self, ids: list[int]) -> list[int]:
        ends = [index for index, token in enumerate(ids) if token in self.stops]
        return ids[: ends[0] + 1] if ends else ids


def final_value(text: str) -> int | None:
    """The number after the last ``FINAL: `` of a text."""
    _, found, tail = text.rpartition("FINAL: ")
    digits = tail.split('"')[0].strip()
    return int(digits) if found and digits.isascii() and digits.isdigit() else None


def run_direct(runner: Runner, problems: list[str]) -> list[tuple[int | None, int]]:
    """(answer, decoded tokens) of each problem."""
    written = runner.generate([runner.encode(direct_prompt(problem)) for problem in problems])
    return [(final_value(runner.decode(ids)), len(ids)) for ids in written]


def run_recursive(runner: Runner, problems: list[str]) -> list[Node]:
    """The root of each problem's run, played to its end."""
    roots = [Node("root", problem, 0) for problem in problems]
    ready = roots
    while ready:
        for node in ready:
            if not node.started:
                given = {sibling.id: sibling.result or 0 for sibling in _dependencies(node)}
                node.ids, node.started = runner.encode(graph_prompt(node.task, given)), True
        written = runner.generate([node.ids for node in ready])
        for node, ids in zip(ready, written, strict=True):
            node.ids += ids
            _digest(runner, node, ids)
        ready = [node for root in roots if not _failed(root) for node in root.nodes() if _runnable(runner, node)]
    return roots


def _dependencies(node: Node) -> list[Node]:
    siblings = node.parent.children if node.parent else []
    return [sibling for sibling in siblings if sibling.id in node.depends_on]


def _failed(root: Node) -> bool:
    return any(node.error for node in root.nodes())


def _digest(runner: Runner, node: Node, ids: list[int]) -> None:
    """Take in what a node wrote: children and an await, or its conclusion."""
    text = runner.decode(ids)
    if node.fork or ids[-1] == runner.tokenizer.eos_token_id:
        node.last = ids
        node.result = final_value(text) if '{"type":"atomic"' in text else None
        node.error = None if node.result is not None else "no conclusion"
        return
    node.fork = ids
    try:
        events = [json.loads(line) for line in text.split("\n")]
        node.children = _children(node, events)
    except (ValueError, KeyError, TypeError) as error:
        node.error = f"fork: {error}"
        return
    closed = [index + 1 for index, token in enumerate(ids) if runner.decode([token]).endswith("}")]
    node.offsets = closed[:-1]


def _children(node: Node, events: list[dict[str, Any]]) -> list[Node]:
    """The children a fork declares; raises ValueError where the graph is not valid."""
    if node.depth >= MAX_DEPTH:
        raise ValueError("too deep")
    *declared, awaited = events
    children: list[Node] = []
    for event in declared:
        depends = tuple(event.get("depends_on", ()))
        if event["type"] != "child" or not set(depends) <= {child.id for child in children}:
            raise ValueError(f"bad child {event}")
        children.append(Node(event["id"], event["task"], node.depth + 1, depends, node))
    names = [child.id for child in children]
    if awaited["type"] != "await" or awaited["children"] != names or len(set(names)) < len(names):
        raise ValueError(f"bad await {awaited}")
    return children


def _runnable(runner: Runner, node: Node) -> bool:
    """Whether a node can be decoded now; a parent whose children have all ended gets its resume turn."""
    if node.ended:
        return False
    if not node.started:
        return all(sibling.ended for sibling in _dependencies(node))
    if not all(child.ended for child in node.children):
        return False
    results: Results = {child.id: child.result or 0 for child in node.children}
    node.ids += runner.encode(resume_turn(results))
    return True


@dataclass(frozen=True, slots=True)
class Row:
    """One task's outcome in both modes. ``direct`` and ``critical`` are decoded tokens."""

    task: dict[str, Any]
    direct_right: bool
    recursive_right: bool
    valid: bool
    direct: int
    critical: int


def evaluate(runner: Runner, tasks: list[dict[str, Any]]) -> list[Row]:
    problems = [task["problem"] for task in tasks]
    rows = []
    for task, (answer, tokens), root in zip(
        tasks, run_direct(runner, problems), run_recursive(runner, problems), strict=True
    ):
        valid, expected = not _failed(root), int(task["answer"])
        critical = root.finish_time() if valid else 0
        rows.append(Row(task, answer == expected, root.result == expected, valid, tokens, critical))
    return rows


def table(rows: Iterable[Row], title: str, key: Callable[[dict[str, Any]], Any]) -> str:
    """Lines of shares per value of ``key``; the ratio is critical path to direct tokens, summed over valid graphs."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row.task)].append(row)
    lines = [f"{title:>10}     n  direct  recursive  valid  critical/direct"]
    for name, members in sorted(groups.items(), key=lambda item: str(item[0])):
        n, valid = len(members), [row for row in members if row.valid]
        ratio = sum(row.critical for row in valid) / max(1, sum(row.direct for row in valid))
        shares = (sum(getattr(row, name) for row in members) / n for name in ("direct_right", "recursive_right"))
        direct, recursive = shares
        lines.append(f"{name!s:>10} {n:5d} {direct:7.3f} {recursive:10.3f} {len(valid) / n:6.3f} {ratio:16.3f}")
    return "\n".join(lines)


def main() -> None:
    args = build_parser().parse_args()
    torch.set_num_threads(args.threads)
    tasks = [json.loads(line) for line in args.tasks.read_text().splitlines()]
    rows = evaluate(Runner(args.model), tasks)
    for title in ("kind", "family", "width"):
        print(table(rows, title, itemgetter(title)))
    print(table(rows, "wide", lambda task: "width >= 4" if task["width"] >= 4 else "width < 4"))
    print(table(rows, "overall", lambda _: "all"))
    for row in rows:
        if not (row.direct_right and row.recursive_right):
            print(f"wrong: {row.task['id']} direct {row.direct_right} recursive {row.recursive_right}")


if __name__ == "__main__":
    main()

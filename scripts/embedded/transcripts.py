"""What each node of a run reads and writes, as text pieces with the ones to be learned marked."""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from embedded.families import IDS, MODULUS, Leaf, Part, Task, add_digits, reversed_digits

STYLE_PATH = Path(__file__).parents[2] / "rrm_engine" / "protocol" / "styles" / "embedded.toml"
STYLE: dict[str, Any] = tomllib.loads(STYLE_PATH.read_text())
_TEMPLATES = {name: jinja2.Template(text, keep_trailing_newline=True) for name, text in STYLE["user"].items()}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
END = "<|im_end|>"

Results = dict[str, int]


@dataclass(frozen=True, slots=True)
class Transcript:
    """One node's text. ``pieces``: (text, whether the model writes it)."""

    kind: str
    family: str
    pieces: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        return "".join(text for text, _ in self.pieces)


def conclusions(results: Results) -> list[dict[str, str]]:
    return [{"id": name, "final": str(value)} for name, value in results.items()]


def direct_prompt(task: str) -> str:
    return _prompt(STYLE["system"]["direct"], _TEMPLATES["direct"].render(task=task))


def graph_prompt(task: str, given: Results) -> str:
    """The prompt of a root or child in recursive mode; ``given``: results of the children it depends on."""
    return _prompt(STYLE["system"]["recursive"], _TEMPLATES["graph"].render(task=task, given=conclusions(given)))


def resume_turn(results: Results) -> str:
    """What is appended after the closing brace of an await."""
    text = _TEMPLATES["resume"].render(conclusions=conclusions(results))
    return f"{END}\n<|im_start|>user\n{text}{END}\n<|im_start|>assistant\n"


def _prompt(system: str, user: str) -> str:
    return f"<|im_start|>system\n{system}{END}\n<|im_start|>user\n{user}{END}\n<|im_start|>assistant\n"


def sum_line(head: str, total: int, value: int) -> str:
    """One step of the combination, e.g. ``b402+710=01202`` and a newline: id, sum so far, value, new sum."""
    return f"{head}{reversed_digits(total)}+{reversed_digits(value)}={add_digits(total, value)}\n"


def combination(results: Results) -> str:
    lines, total = [], 0
    for name, value in results.items():
        lines.append(sum_line(name, total, value))
        total = (total + value) % MODULUS
    return "".join(lines)


def atomic(value: int) -> str:
    return f'{{"type":"atomic","answer":"FINAL: {value}"}}{END}'


def direct_transcript(task: Task) -> Transcript:
    """A plan of all leaves, then one leaf after another with a running sum, in one assistant turn.

    The leaves are labelled in their order, groups or not, and where there are no groups a leaf's label is its part's
    id. What a leaf needs stands close to it: its line of the plan once more, a line such as ``2|402`` with the leaves
    that are left after it and the sum before it, and its label in every line of the scratchpad.
    """
    leaves = [leaf for part in task.parts for leaf in part.leaves]
    results, total = task.results(), 0
    plan = [f"{label} {leaf.canonical()}\n" for label, leaf in zip(IDS, leaves, strict=False)]
    text = f"{''.join(plan)}{len(leaves)}.\n"
    for index, leaf in enumerate(leaves):
        left = f"{len(leaves) - 1 - index}|"
        given = {} if isinstance(leaf.start, int) else {leaf.start: results[leaf.start]}
        start = leaf.start if isinstance(leaf.start, int) else given[leaf.start]
        value = leaf.result(start)
        text += f"{plan[index]}{left}{reversed_digits(total)}\n"
        text += "".join(f"{name} = {known}\n" for name, known in given.items())
        text += f"{leaf.scratchpad(start, IDS[index])}{IDS[index]} = {value}\n{sum_line(left, total, value)}"
        total = (total + value) % MODULUS
    text += f"FINAL: {total}{END}"
    return Transcript("direct", task.family, ((direct_prompt(task.problem), False), (text, True)))


def root_transcript(task: Task) -> Transcript:
    """The root of the recursive run; an atomic task is restated in the short form and solved at once."""
    prompt = graph_prompt(task.problem, {})
    if task.kind == "atomic":
        leaf = task.parts[0].leaves[0]
        text = f"{leaf.canonical()}\n{_solution(leaf, {})}"
        return Transcript("root", task.family, ((prompt, False), (text, True)))
    children = [(part.id, part.canonical(), part.depends_on) for part in task.parts]
    return Transcript("root", task.family, _split(prompt, children, task.results()))


def group_transcript(part: Part) -> Transcript:
    """A child that splits again."""
    results = {inner: leaf.result(int(leaf.start)) for inner, leaf in zip(IDS, part.leaves, strict=False)}
    children = [(inner, leaf.canonical(), None) for inner, leaf in zip(IDS, part.leaves, strict=False)]
    return Transcript("group", "sum", _split(graph_prompt(part.canonical(), {}), children, results))


def leaf_transcript(leaf: Leaf, given: Results) -> Transcript:
    """A child that is solved at once; ``given`` holds the result it starts from, if it starts from one."""
    prompt = graph_prompt(leaf.canonical(), given)
    return Transcript("leaf", leaf.family, ((prompt, False), (_solution(leaf, given), True)))


def task_transcripts(task: Task) -> list[Transcript]:
    """Every transcript of both runs of ``task``, the direct one first, then root, children, grandchildren."""
    out, results = [direct_transcript(task), root_transcript(task)], task.results()
    if task.kind == "atomic":
        return out
    for part in task.parts:
        if len(part.leaves) > 1:
            out.append(group_transcript(part))
        given = {} if part.depends_on is None else {part.depends_on: results[part.depends_on]}
        out += [leaf_transcript(leaf, given) for leaf in part.leaves]
    return out


def _solution(leaf: Leaf, given: Results) -> str:
    start = leaf.start if isinstance(leaf.start, int) else given[leaf.start]
    return leaf.scratchpad(start) + atomic(leaf.result(start))


def _split(
    prompt: str, children: Iterable[tuple[str, str, str | None]], results: Results
) -> tuple[tuple[str, bool], ...]:
    lines = []
    for name, task, dependency in children:
        depends = "" if dependency is None else f',"depends_on":["{dependency}"]'
        lines.append(f'{{"type":"child","id":"{name}","task":"{task}"{depends}}}\n')
    names = '","'.join(results)
    fork = f'{"".join(lines)}{{"type":"await","children":["{names}"],"rule":"sum"}}'
    total = sum(results.values()) % MODULUS
    return (prompt, False), (fork, True), (resume_turn(results), False), (combination(results) + atomic(total), True)

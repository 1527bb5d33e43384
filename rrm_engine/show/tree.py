"""Jobs, and the trees of their nodes, for a terminal. Nothing in what users and models wrote is obeyed."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rrm_engine.bench.progress import describe_row
from rrm_engine.legible import legible, legible_key, plural, spelled
from rrm_engine.protocol.thinking import KNOWN
from rrm_engine.runs.events import Cancelled, Concluded, JobBegan, Paused, Resumed, Started
from rrm_engine.runs.nodes import Node, Phase, nodes_of, tops
from rrm_engine.runs.reader import RecordedJob
from rrm_engine.runs.timeline import NAMES

if TYPE_CHECKING:
    from rich.text import Text
    from rich.tree import Tree

LINES = 6  # of a phase's text in a tree
LINE = 160  # characters of one of them
LIMITS = ("length", "context", "error")  # ends of a phase that were not its own


def title(job: RecordedJob) -> str:
    """What came of the job, in one line."""
    if job.row is not None:
        return describe_row(job.row)
    nodes = sum(isinstance(event, Started) for event in job.events)
    return f"{legible_key(job.key)}: no row, it is still going on or the run broke off in it; {plural(nodes, 'node')}"


def tree(job: RecordedJob) -> "Tree":
    """The job with its nodes below it."""
    from rich.console import Group
    from rich.tree import Tree

    began = job.events[0].t if job.events else 0.0
    task = next((event.task for event in job.events if isinstance(event, JobBegan)), "")
    top = Tree(Group(_text(title(job), "bold"), *_block(task)), guide_style="dim")
    waiting = [(top, node) for node in reversed(tops(nodes_of(job.events)))]
    while waiting:  # not by recursion, for a graph may be deep
        above, node = waiting.pop()
        branch = above.add(Group(*_about(node, began)))
        waiting += [(branch, child) for child in reversed(node.children)]
    return top


def details(node: Node, began: float) -> Iterator["Text"]:
    """All that a node was told and wrote, as it stands in the trace."""
    yield _head(node, began)
    for number, phase in enumerate(node.phases, start=1):
        told, start = phase.began, phase.began
        yield _text(f"\n== phase {number}, {NAMES.get(start.phase, start.phase)}: {_phase(phase, began)}", "bold")
        if isinstance(told, Started):
            yield from _section("system", told.system)
            yield from _section("prompt", told.prompt or told.task)
        elif isinstance(told, Resumed):
            yield from _section("told", told.appended or f"conclusions of {', '.join(told.after) or 'nobody'}")
        yield from _section("wrote", _written(phase))
    if node.refused:
        yield _text(f"\n-- its next phase was refused: {spelled(node.refused)}", "red")
    yield from _section(*_answer(node))


def _section(name: str, text: str) -> Iterator["Text"]:
    if text:
        yield _text(f"-- {name}", "cyan")
        yield _text(spelled(text))


def _about(node: Node, began: float) -> Iterator["Text"]:
    """A node in its tree."""
    yield _head(node, began)
    if node.task and node.path.parent is not None:
        yield _text(f"task: {legible(node.task, LINE)}", "italic")
    if node.depends_on:
        yield _text(f"after: {legible(', '.join(node.depends_on), LINE)}", "dim")
    for phase in node.phases:
        if len(node.phases) > 1 or (phase.pause and phase.pause.reason in LIMITS):
            yield _text(f"[{NAMES.get(phase.began.phase, phase.began.phase)}: {_phase(phase, began)}]", "dim")
        yield from _block(folded(_written(phase)), f"--node {node.path} shows all")
    for child, same_as in node.not_made.items():
        why = f"has the task of {same_as}" if same_as else "was refused"
        yield _text(f"{legible(child, LINE)} {why}", "dim")
    if node.malformed:
        yield _text(f"could not be read, {len(node.malformed)} times: {legible(node.malformed[0], LINE)}", "yellow")
    if node.refused:
        yield _text(f"no room: {legible(node.refused, LINE)}", "red")
    name, answer = _answer(node)
    if answer:
        yield _text(f"{name}: {legible(answer, LINE)}", "green" if name == "answer" else "yellow")


def _head(node: Node, began: float) -> "Text":
    """``root.a  0.52-3.10 s, waited 1.20 s, 212 tokens``."""
    if not node.phases:
        state = "never started" if node.end or node.refused else "not started yet"
        return _text(f"{legible(node.path)}  {state}", "bold")
    first, last = node.phases[0].began.t - began, node.end.t - began if node.end else None
    parts = [f"{first:.2f} s to {last:.2f} s" if last is not None else f"since {first:.2f} s"]
    if node.waited_s >= 0.005:
        parts.append(f"waited {node.waited_s:.2f} s")
    parts.append(plural(node.tokens, "token"))
    if node.end is None:
        over = node.phases[-1].pause
        parts.append("paused" if over and over.reason == "await" else "ended" if over else "still writes")
    return _text(f"{legible(node.path)}  {', '.join(parts)}", "bold")


def _phase(phase: Phase, began: float) -> str:
    end = f"{phase.pause.t - began:.2f} s" if phase.pause else "now"
    reason = f", ended by {legible(phase.pause.reason, 40)}" if phase.pause else ""
    return f"{phase.began.t - began:.2f} s to {end}, {plural(phase.tokens, 'token')}{reason}"


def _written(phase: Phase) -> str:
    return phase.pause.text if isinstance(phase.pause, Paused) else "(its text is recorded when the phase is over)"


def _answer(node: Node) -> tuple[str, str]:
    """What is to be said of how it ended, and how that is called."""
    match node.end:
        case Concluded(ok=True):
            return "answer", node.end.answer
        case Concluded():
            return "no answer", node.end.answer or "-"
        case Cancelled():
            return "cancelled", node.end.reason or "-"
    return "", ""


def folded(text: str) -> str:
    """``text`` with how long its thinking is in the place of that."""
    for marks in KNOWN:
        if marks.close not in text and marks.open not in text:
            continue
        if marks.always or text.find(marks.close) < text.find(marks.open) or marks.open not in text:
            text = marks.open + text  # it began inside of a block
        text = re.sub(marks.block, lambda block: f"[thought, {len(block[0]):,} characters]", text)
    return text


def _block(text: str, more: str = "") -> Iterator["Text"]:
    """The first lines of a text."""
    lines = [line for line in text.splitlines() if line.strip()]
    for line in lines[:LINES]:
        yield _text(legible(line, LINE))
    if len(lines) > LINES:
        yield _text(f"... {plural(len(lines) - LINES, 'more line')}{f', {more}' if more else ''}", "dim")


def _text(line: str, style: str = "") -> "Text":
    from rich.text import Text

    return Text(line, style=style)

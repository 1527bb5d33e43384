"""What every kind of node would be told, token by token as the model reads it, without the model's weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rrm_engine.backends.phases import resolve_phases, thinks
from rrm_engine.backends.settings import longest_prompt
from rrm_engine.bench.tasks import TaskSet
from rrm_engine.config import Resolved, RunConfig
from rrm_engine.graph.types import Conclusion, Phase
from rrm_engine.legible import legible_key, plural, spelled
from rrm_engine.loading.load import load_words
from rrm_engine.protocol.chat import ChatFormat
from rrm_engine.protocol.grammar import PHASES as HELD
from rrm_engine.protocol.style import Style, default_style, load_style
from rrm_engine.solver.outcome import BUDGETS

# A plan that stands for whatever the model would write: two children, of which the first has concluded with an answer.
CHILDREN = ("c1", "c2")
PART = "question (1)"
CONCLUSIONS = (Conclusion("c1", "FINAL: 12", task=PART), Conclusion("c2", "failed", ok=False, task="question (2)"))
RULE = " + ".join(CHILDREN)


@dataclass(frozen=True, slots=True)
class Told:
    """What a node reads before it writes: ``ids`` are those of a new context, or what is appended to its context."""

    what: str
    phase: Phase
    ids: list[int]
    held: bool  # to a grammar, if there are any


def describe(config: RunConfig, tasks: TaskSet) -> Iterator[str]:
    """The lines to print. Raises RrmError where the model's files, its template or the style cannot be used."""
    name, style_name = config.tokenizer or config.model, config.prompt_style
    words = load_words(name, config.trust_remote_code)
    style = load_style(default_style(words.model_type, name) if style_name == "auto" else style_name)
    chat = ChatFormat(words.tokenizer, words.eos_ids)
    used = resolve_phases(config, style, lambda asked, phase: thinks(asked, phase, style, chat, name))
    chosen = tasks.chosen(config.limit, config.shard)
    longest = longest_prompt(used, style, chat, [task.problem for task in chosen])
    yield f"{name} ({words.model_type}), prompt style {style.name}: {style.description}"
    yield (
        f"The longest prompt of {plural(len(chosen), 'task')} has {plural(longest, 'token')}. The task below is "
        f"{legible_key(chosen[0].id)}; its children and their results are made up."
    )
    for told in Kinds(used, style, chat, chosen[0].problem).all():
        yield f"\n=== {told.what}: {plural(len(told.ids), 'token')}, {_settings(used, told)}"
        yield spelled(words.tokenizer.decode(told.ids))


class Kinds:
    """The kinds of nodes that a run under ``config`` can have, for ``task``; ``part`` is that of its children."""

    def __init__(self, config: Resolved, style: Style, chat: ChatFormat, task: str, part: str = PART) -> None:
        self.config, self.style, self.chat, self.task, self.part = config, style, chat, task, part

    def all(self) -> Iterator[Told]:
        """Each of them, in the order in which a row would come to it."""
        config, depth = self.config, self.config.max_depth
        if "direct" in config.modes or self.style.solves_afresh:
            yield self._starts("direct solve", Phase.DIRECT, self.task, depth)
        if "rrm" in config.modes:
            yield from self._recursive(depth) if depth else [self._starts("root", Phase.SOLVER, self.task, 0)]

    def _recursive(self, depth: int) -> Iterator[Told]:
        yield self._starts("root, planning", Phase.GRAPH, self.task, depth)
        if self.config.child_context == "parent":
            values = {"task": self.part, "given": (), "id": CHILDREN[0], "depth_left": depth - 1}
            phase = Phase.GRAPH if depth > 1 else Phase.SOLVER
            yield self._goes_on("child, after its parent's context", phase, "fork", values)
        else:
            if depth > 1:
                yield self._starts("child that may split", Phase.GRAPH, self.part, depth - 1, self.task)
            yield self._starts("child", Phase.SOLVER, self.part, 0, self.task)
        values = {"task": self.task, "conclusions": (), "notes": (), "rule": ""}
        if depth > 1 or not self.style.solves_afresh:
            yield self._goes_on("node that stays whole, appended", Phase.SOLVER, "solve", values)
        values |= {"conclusions": CONCLUSIONS, "rule": RULE}
        yield self._goes_on("parent, appended to it when its children are done", Phase.CONTINUATION, "resume", values)

    def _starts(self, what: str, phase: Phase, task: str, depth_left: int, problem: str = "") -> Told:
        values = {"max_width": self.config.max_sibling_width, "depth_left": depth_left, "given": ()}
        system, user, opens = self.style.start(phase.value, task=task, problem=problem, **values)
        thinking = thinks_in(self.config, phase)
        ids = self.chat.opening(system, user, thinking)
        if not thinking:
            ids += self.chat.opens(opens)
        return Told(what, phase, ids, phase is Phase.GRAPH)

    def _goes_on(self, what: str, phase: Phase, kind: str, values: dict[str, Any]) -> Told:
        style, chat, thinking = self.style, self.chat, thinks_in(self.config, phase)
        ids = chat.turn(style.user(kind, **values), thinking, system=bool(style.system("recursive")))
        if not thinking:
            ids += chat.opens(style.opens(kind, **values))
        free = phase is Phase.SOLVER and (thinking or style.solver_events)
        return Told(what, phase, ids, phase in HELD and not free)


def thinks_in(config: Resolved, phase: Phase) -> bool:
    """Whether the phase thinks."""
    return bool(getattr(config, f"{phase}_thinking"))


def _settings(config: Resolved, told: Told) -> str:
    parts = [f"then at most {getattr(config, BUDGETS[told.phase]):,}"]
    parts += ["it thinks first"] if thinks_in(config, told.phase) else []
    parts += ["held to a grammar"] if told.held and config.constrain == "on" else []
    return ", ".join(parts)

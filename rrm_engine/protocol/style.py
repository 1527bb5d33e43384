"""Prompt styles: the words in which a model is told what to do, as TOML files with Jinja2 templates.

A packaged style lies in ``styles/``; a user's own is loaded by its path and has the same keys:

    name, description    texts
    base                 another style, by name or by a path from this file on: what is not set here is as there
    trained_on_events    the model writes the events without a grammar
    max_depth            levels of children below the root unless a flag says so; left out: 1
    child_context        what a child starts from unless a flag says so, task or parent; left out: task
    max_task_chars       characters of a child's task that a grammar allows; left out: 1200
    counts_parts         true: a plan begins with a line such as "Parts: 3", and "Parts: 1" is a task that stays whole.
                         The graph text has to ask for it, and so has a fork's that may split; left out: false
    solves_afresh        true: a task that stays whole is solved as a direct solve, from that one's prompt on and not
                         from the plan's; left out: false
    solver_events        false: a grammar keeps events out of what a node writes that has read of them and now solves
                         its task; left out: true
    working              phases (of graph, solver, continuation) in which lines of working stand in front of an atomic
                         event, as the texts ask for it; elsewhere text around events is a repair; left out: none
    bare_children        true: a child that depends on nothing is written without depends_on, which is a repair
                         elsewhere; left out: false
    [thinking]           direct, graph, solver, continuation = true | false
    [budgets]            direct, planner, solver, continuation = tokens
    [sampling.thinking]  any of temperature, top_p, top_k, min_p, repetition_penalty; may be left out, as may
    [sampling.plain]
    [phrases]            plain texts of any name, which every template may use: {{ name }}; may be left out
    [system]             direct, recursive
    [user]               direct, graph, solver, resume, solve, fork
    [opens]              any of direct, solver, resume, solve, fork: how the answer to that text begins, written for
                         the model, which goes on from there; not where it thinks first. May be left out

A child that cannot split starts from the text ``solver``. Without one, and so without a budget or thinking of its own
there, it gets those of a direct solve: the same system text, words, tokens and sampling.

What a user template may use is what ``VARIABLES`` says for its kind: ``task``, ``problem`` (the parent's task; ""
for the root), ``given`` (objects with ``id``, ``task``, ``answer`` and ``final``, what `read_answer` reads in it
or else the whole answer; none: []), ``conclusions`` (the same, with ``ok``), ``notes``, ``rule``, ``id`` (of the child
that forks), ``max_width``, ``depth_left`` (levels of children the node may still have below it; 0: it must solve its
task itself), and the phrases. ``{{ task | asked }}`` is what the task asks for at its end, ``{{ rule |
with_results(conclusions) }}`` the rule with results for ids, and ``| first_step`` after it the beginning of a sum that
comes of it. ``{{ conclusions | values_so_far }}`` is ``c1 = 5, c2 =`` where c2's result is a sentence with several
numbers, of which the model is to take one, and "" where all results are values. ``{{ task | pointed_at(problem) }}`` is
the item of a list in the problem that "question (2)" names, "" where that is not certain. A system template may use
phrases alone: every node that plans has the same system text, so that its KV blocks are shared.

A style that builds on another has a name and a description of its own and changes single keys of the other's tables; a
base may have a base in turn.
"""

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Protocol

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rrm_engine.errors import RrmError
from rrm_engine.protocol.answers import read_answer
from rrm_engine.protocol.asked import asked, first_step, values_so_far, with_results
from rrm_engine.protocol.events import MAX_TASK_CHARS, Form, PlanShape
from rrm_engine.protocol.pointing import pointed_at

PHASES: Final = ("direct", "graph", "solver", "continuation")
BUDGETS: Final = ("direct", "planner", "solver", "continuation")
SYSTEM: Final = ("direct", "recursive")
_START: Final = ("task", "problem", "given", "max_width", "depth_left")
_RESUME: Final = ("task", "conclusions", "notes", "rule")
# What the user template of each kind is given, no more and no less.
VARIABLES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "direct": _START,
        "graph": _START,
        "solver": _START,
        "resume": _RESUME,
        "solve": _RESUME,
        "fork": ("task", "given", "id", "depth_left"),
    }
)
USER: Final = tuple(VARIABLES)
CHILD_CONTEXTS: Final = ("task", "parent")
SAMPLING: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Answered(Protocol):
    """A conclusion, as far as a template is concerned."""

    @property
    def id(self) -> str: ...
    @property
    def task(self) -> str: ...
    @property
    def answer(self) -> str: ...
    @property
    def ok(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Part:
    id: str
    task: str
    answer: str
    final: str
    ok: bool


# Much of everything, and as little as there can be: a template is rendered with both when it is loaded.
_FULL: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "task": "task",
        "problem": "problem",
        "given": [_Part("a", "task", "FINAL: 1", "1", True)],
        "conclusions": [_Part("a", "task", "FINAL: 1", "1", True), _Part("b", "task", "", "", False)],
        "notes": ["note"],
        "rule": "rule",
        "id": "a",
        "max_width": 8,
        "depth_left": 2,
    }
)
_BARE: Final[Mapping[str, Any]] = MappingProxyType(
    {**_FULL, "problem": "", "given": [], "conclusions": [], "notes": [], "rule": "", "max_width": 1, "depth_left": 0}
)


@dataclass(frozen=True)
class Style:
    """A prompt style. ``thinking`` is keyed by phase, ``budgets`` as in the file (`budget` takes a phase).

    ``solver_is_direct``: a solver child solves as a direct solve does; both may then lack the solver phase.
    """

    name: str
    description: str
    trained_on_events: bool
    max_depth: int
    child_context: str
    plan_shape: PlanShape
    solves_afresh: bool
    solver_events: bool
    solver_is_direct: bool
    bare_children: bool
    working: frozenset[str]
    thinking: Mapping[str, bool]
    budgets: Mapping[str, int]
    _sampling: Mapping[str, Mapping[str, float]] = field(repr=False)
    _templates: Mapping[str, jinja2.Template] = field(repr=False, compare=False)

    def budget(self, phase: str) -> int:
        """Tokens of a phase; the graph phase's are the planner's."""
        key = "planner" if phase == "graph" else phase
        return self.budgets[key if key in self.budgets else "direct"]

    def thinks(self, phase: str) -> bool:
        """Whether a phase is to think."""
        return self.thinking[phase if phase in self.thinking else "direct"]

    def form(self, phase: str) -> Form:
        """How a phase's events are to be written."""
        return Form(phase in self.working, self.bare_children)

    def sampling(self, thinking: bool) -> dict[str, float]:
        """The style's sampling settings; what it leaves open is the model's own."""
        return dict(self._sampling["thinking" if thinking else "plain"])

    def system(self, mode: str) -> str:
        """The system text of ``mode``: direct or recursive; "" if the style has none.

        Raises ValueError for another mode.
        """
        return self._render("system", mode, {})

    def user(self, kind: str, **values: Any) -> str:
        """The user turn of ``kind``: direct, graph, solver, resume, solve or fork.

        ``values`` are those that ``VARIABLES`` names for it; given and conclusions are iterables of Answered. Raises
        ValueError for another kind and other values, RrmError where the template cannot be rendered with them.
        """
        return self._render("user", kind, _as_given(kind, values))

    def opens(self, kind: str, **values: Any) -> str:
        """How the answer to the user turn of ``kind`` begins; "" if that is the model's own affair.

        Otherwise as ``user``.
        """
        values = _as_given(kind, values)
        return self._render("opens", kind, values) if f"opens.{kind}" in self._templates else ""

    @property
    def has_openings(self) -> bool:
        """Whether any answer is made to begin with a text."""
        return any(key.startswith("opens.") for key in self._templates)

    def start(self, kind: str, **values: Any) -> tuple[str, str, str]:
        """System text, user turn and the answer's opening of a node that starts: ``kind`` is direct, graph or solver.

        Otherwise as ``user``.
        """
        if kind == "solver" and self.solver_is_direct:
            kind = "direct"
        system = self.system("direct" if kind == "direct" else "recursive")
        return system, self.user(kind, **values), self.opens(kind, **values)

    def _render(self, table: str, key: str, values: Mapping[str, Any]) -> str:
        template = self._templates.get(f"{table}.{key}")
        if template is None:
            known = ", ".join(SYSTEM if table == "system" else USER)
            raise ValueError(f"a style has no {table} text {key!r}, only {known}")
        try:
            return template.render(values).strip()
        except Exception as error:  # a template can raise whatever its expressions do
            raise RrmError(f"prompt style {self.name}, {table}.{key}: {error}") from error


def _as_given(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The ``values`` of a text of ``kind`` as its template gets them. Raises ValueError for others than it takes."""
    names = VARIABLES.get(kind)
    if names is not None and values.keys() != set(names):
        raise ValueError(f"a style's user text {kind} takes {', '.join(names)}, not {', '.join(values)}")
    lists = {name: [_part(one) for one in values[name]] for name in ("given", "conclusions") if name in values}
    return {**values, **lists}


def _part(one: Answered) -> _Part:
    return _Part(one.id, one.task.strip(), one.answer.strip(), final_of(one.answer), getattr(one, "ok", True))


def final_of(answer: str) -> str:
    """What templates are given as an answer's ``final``."""
    return read_answer(answer) or answer.strip()


def style_names() -> list[str]:
    """Names of the packaged styles."""
    folder = resources.files(__package__) / "styles"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def default_style(model_type: str, name: str) -> str:
    """The packaged style for a model, from its config's ``model_type`` and the name it was asked for by."""
    if name == "embedded":
        return "embedded"
    return "qwen3" if model_type in ("qwen3", "qwen3_moe") else "by-reference"


def load_style(name_or_path: str | Path) -> Style:
    """A packaged style by its name, or one's own by the path of its TOML file.

    Raises RrmError, saying what is wrong and in which file, for a style that is unknown or cannot be used.
    """
    return _Loader(str(name_or_path), _read_with_bases(name_or_path)).style()


def _read_with_bases(name_or_path: str | Path) -> dict[str, Any]:
    """The data of a style, completed with what it leaves to its base and that one to its own."""
    asked, folder, whose = str(name_or_path), Path(), ""
    data: dict[str, Any] | None = None
    chain: dict[str, str] = {}  # by real path, as asked for
    while True:
        file = _locate(asked, folder, whose)
        place = os.path.realpath(str(file))
        if place in chain:
            raise RrmError(f"prompt style {name_or_path} builds on itself: {' -> '.join([*chain.values(), asked])}")
        chain[place] = asked
        read = _read(file, asked + whose)
        base = read.pop("base", None)
        data = read if data is None else _completed(data, read)
        if base is None:
            return data
        if not isinstance(base, str):
            raise RrmError(f"prompt style {asked}{whose}: base must be a text")
        asked, folder, whose = base, Path(place).parent, f" (the base of {asked})"


def _locate(asked: str, folder: Path, whose: str) -> Traversable:
    path = Path(asked)
    if path.suffix == ".toml" or len(path.parts) > 1:
        return folder / path
    if asked in (names := style_names()):
        return resources.files(__package__) / "styles" / f"{asked}.toml"
    raise RrmError(f"there is no prompt style {asked!r}{whose}; there are {', '.join(names)}, or a TOML file's path")


def _read(file: Traversable, called: str) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RrmError(f"prompt style {called} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise RrmError(f"prompt style {called} is not valid TOML: {error}") from error


def _completed(own: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """``own`` and, of what it leaves open, ``base``; its name and description are its own."""

    def over(below: Any, above: Any) -> Any:
        if isinstance(below, dict) and isinstance(above, dict):
            return below | {key: over(below.get(key), value) for key, value in above.items()}
        return above

    return over({key: value for key, value in base.items() if key not in ("name", "description")}, own)


class _Loader:
    """Checks a style's data and compiles its templates; every complaint names the file and the key."""

    def __init__(self, source: str, data: dict[str, Any]) -> None:
        self.source = source
        self.data = data
        self.jinja = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
        self.jinja.filters |= {f.__name__: f for f in (asked, with_results, first_step, values_so_far, pointed_at)}

    def style(self) -> Style:
        allowed = (
            "name",
            "description",
            "trained_on_events",
            "max_depth",
            "child_context",
            "max_task_chars",
            "counts_parts",
            "solves_afresh",
            "solver_events",
            "working",
            "bare_children",
            "thinking",
            "budgets",
            "sampling",
            "phrases",
            "system",
            "user",
            "opens",
        )
        self.refuse_unknown("", self.data, allowed)
        sampling = self.data.get("sampling", {})
        self.expect("sampling", sampling, dict)
        self.refuse_unknown("sampling.", sampling, ("thinking", "plain"))
        self.jinja.globals.update(self.phrases())
        optional = () if "solver" in self.data.get("user", ()) else ("solver",)
        budgets = self.table("budgets", BUDGETS, int, optional)
        for key, tokens in budgets.items():
            if tokens < 1:
                raise self.complaint(f"budgets.{key} must be at least 1")
        templates = self.templates("system", dict.fromkeys(SYSTEM, ()))
        templates |= self.templates("user", VARIABLES, optional)
        templates.setdefault("user.solver", templates["user.direct"])
        if "opens" in self.data:
            opens = {kind: VARIABLES[kind] for kind in VARIABLES if kind not in ("graph", *optional)}
            templates |= self.templates("opens", opens, tuple(opens))
        return Style(
            name=self.value("name", str),
            description=self.value("description", str),
            trained_on_events=self.value("trained_on_events", bool),
            max_depth=self.at_least("max_depth", 0, 1),
            child_context=self.child_context(),
            plan_shape=PlanShape(self.at_least("max_task_chars", 1, MAX_TASK_CHARS), self.flag("counts_parts", False)),
            solves_afresh=self.flag("solves_afresh", False),
            solver_events=self.flag("solver_events", True),
            solver_is_direct=bool(optional),
            bare_children=self.flag("bare_children", False),
            working=self.working(),
            thinking=MappingProxyType(self.table("thinking", PHASES, bool, optional)),
            budgets=MappingProxyType(budgets),
            _sampling={key: self.settings(key, sampling.get(key, {})) for key in ("thinking", "plain")},
            _templates=templates,
        )

    def complaint(self, what: str) -> RrmError:
        return RrmError(f"prompt style {self.source}: {what}")

    def expect(self, key: str, value: Any, kind: type) -> None:
        names = {str: "a text", bool: "true or false", int: "a whole number", dict: "a table"}
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.complaint(f"{key} must be {names[kind]}")

    def value(self, key: str, kind: type) -> Any:
        if key not in self.data:
            raise self.complaint(f"{key} is missing")
        self.expect(key, self.data[key], kind)
        return self.data[key]

    def flag(self, key: str, default: bool) -> bool:
        """True or false that may be left out."""
        return bool(self.value(key, bool)) if key in self.data else default

    def at_least(self, key: str, least: int, default: int) -> int:
        """A whole number that may be left out."""
        number = self.data.get(key, default)
        self.expect(key, number, int)
        if number < least:
            raise self.complaint(f"{key} must be at least {least}")
        return int(number)

    def child_context(self) -> str:
        context = self.data.get("child_context", CHILD_CONTEXTS[0])
        if context not in CHILD_CONTEXTS:
            raise self.complaint(f"child_context must be {' or '.join(CHILD_CONTEXTS)}")
        return str(context)

    def working(self) -> frozenset[str]:
        found = self.data.get("working", [])
        if not isinstance(found, list) or not all(phase in PHASES[1:] for phase in found):
            raise self.complaint(f"working must be a list of phases: {', '.join(PHASES[1:])}")
        return frozenset(found)

    def refuse_unknown(self, prefix: str, table: dict[str, Any], allowed: tuple[str, ...]) -> None:
        for key in table:
            if key not in allowed:
                raise self.complaint(f"unknown key {prefix}{key}; known are {', '.join(allowed)}")

    def table(self, name: str, keys: tuple[str, ...], kind: type, optional: tuple[str, ...] = ()) -> dict[str, Any]:
        table = self.value(name, dict)
        self.refuse_unknown(f"{name}.", table, keys)
        for key in keys:
            if key not in table and key not in optional:
                raise self.complaint(f"{name}.{key} is missing")
        for key in table:
            self.expect(f"{name}.{key}", table[key], kind)
        return table

    def settings(self, key: str, table: Any) -> Mapping[str, float]:
        self.expect(f"sampling.{key}", table, dict)
        self.refuse_unknown(f"sampling.{key}.", table, SAMPLING)
        for name, number in table.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or number < 0:
                raise self.complaint(f"sampling.{key}.{name} must be a number, at least 0")
        return MappingProxyType(table)

    def phrases(self) -> dict[str, str]:
        phrases: dict[str, str] = self.data.get("phrases", {})
        self.expect("phrases", phrases, dict)
        for key, text in phrases.items():
            self.expect(f"phrases.{key}", text, str)
            if key in _FULL:
                raise self.complaint(f"phrases.{key}: templates are given another {key}; choose another name")
        return phrases

    def templates(
        self, table: str, variables: Mapping[str, tuple[str, ...]], optional: tuple[str, ...] = ()
    ) -> dict[str, jinja2.Template]:
        """Compiled templates by key, each rendered with what it gets: what is wrong is found here, not in mid-run."""
        compiled = {}
        for key, source in self.table(table, tuple(variables), str, optional).items():
            names = variables[key]
            try:
                used = meta.find_undeclared_variables(self.jinja.parse(source))
                if unknown := used - set(names) - self.jinja.globals.keys():
                    known = ", ".join([*names, *self.data.get("phrases", {})]) or "nothing"
                    raise self.complaint(f"{table}.{key} uses {', '.join(sorted(unknown))}; it may use {known}")
                template = compiled[f"{table}.{key}"] = self.jinja.from_string(source)
                for sample in (_FULL, _BARE):
                    template.render({name: sample[name] for name in names})
            except RrmError:
                raise
            except Exception as error:  # a template can raise whatever its expressions do
                raise self.complaint(f"{table}.{key}: {error}") from error
        return compiled

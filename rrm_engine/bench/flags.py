"""The command line, generated from RunConfig's fields, so that a new setting is a flag at once."""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from rrm_engine.command_line import Parser
from rrm_engine.config import MODES, RunConfig
from rrm_engine.errors import RrmError

PROGRAM = "python -m rrm_engine.bench"
DEFAULT_TASKS = "embedded"
PROFILE_STEPS = 200

GROUPS = {
    "model": "model",
    "servers": "who decodes",
    "run": "what to run",
    "graph": "graph",
    "phases": "budgets and thinking (default: decided by the prompt style)",
    "sampling": "sampling",
    "memory": "KV memory",
}
DESCRIPTION = """\
Solve tasks directly and recursively with one model, and compare correctness,
latency and tokens.

TASKS is a packaged set (embedded, the default), aime-2024 or aime-2025 from the
Hugging Face hub, or a .jsonl, .json, .csv or .parquet file with the problem
under problem, question, task or prompt, its answer under answer or expected
(left out: not graded), and optionally an id."""
EPILOG = f"""\
examples:
  {PROGRAM} --limit 5
      five tasks of the packaged set with the packaged model; needs no network
  {PROGRAM} aime-2024 --model Qwen/Qwen3-14B --out runs/aime
      AIME 2024, directly and recursively; interrupt it whenever you like
  {PROGRAM} --resume runs/aime
      go on with the rows that are missing, under the recorded settings
  {PROGRAM} --model Qwen/Qwen3-14B --dry-run
      every kind of prompt, before a GPU is asked for

exit code: 0 all rows done, 1 a row has an error or the run broke off,
2 refused before it began, 130 interrupted (143 by SIGTERM, 129 by SIGHUP)"""


@dataclass(frozen=True, slots=True)
class Options:
    """A parsed command line. ``given`` holds the settings that were written out, by RunConfig's names."""

    tasks: str | None = None
    given: dict[str, Any] = field(default_factory=dict)
    out: Path | None = None
    resume: Path | None = None
    profile: int | None = None
    quiet: bool = False
    dry_run: bool = False

    def config(self) -> RunConfig:
        """The settings, with defaults for what was not given."""
        return RunConfig(**self.given)


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def show(value: Any) -> str:
    """A setting's value as one would write it after its flag."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return "default" if value is None else str(value)


def parse(argv: Sequence[str] | None = None) -> Options:
    """Options from the command line; exits with 2 and one sentence on anything unusable."""
    parser = build_parser()
    values = vars(parser.parse_args(argv))
    names = {f.name for f in fields(RunConfig)}
    options = Options(
        given={name: value for name, value in values.items() if name in names},
        **{name: value for name, value in values.items() if name not in names},
    )
    if options.out and options.resume and options.out.resolve() != options.resume.resolve():
        parser.error("--out and --resume name two directories; give only one of them")
    if options.dry_run and options.resume:
        parser.error("--dry-run shows what a new run would tell its nodes: leave --resume out")
    if options.profile is not None and options.profile < 1:
        parser.error("--profile must be at least 1")
    try:
        config = options.config()
    except RrmError as error:
        parser.error(str(error))
    if options.profile is not None and config.backend != "local":
        parser.error(f"--profile is for the engine in this process, not for --backend {config.backend}")
    return options


def build_parser() -> argparse.ArgumentParser:
    """The parser; settings that are not given leave no trace in the namespace."""
    parser = Parser(
        "second task set",
        prog=PROGRAM,
        usage=f"{PROGRAM} [TASKS] [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_formatter,
        add_help=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("tasks", nargs="?", metavar="TASKS", help=argparse.SUPPRESS)
    hints = get_type_hints(RunConfig)
    groups: dict[str, Any] = {}
    for f in fields(RunConfig):
        name = f.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(GROUPS.get(name, name))
        _add_setting(groups[name], f, hints[f.name])
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_setting(group: Any, f: "Field[Any]", hint: Any) -> None:
    kind = _kind(hint)
    help_text = f.metadata["help"].replace("%", "%%")
    if f.default not in (None, ()):
        help_text += f" (default: {show(f.default)})".replace("%", "%%")
    choices = f.metadata.get("choices")
    metavar = "{" + ",".join(choices) + "}" if choices else f.metadata.get("metavar", kind.metavar)
    reader = _choice(choices) if choices else kind.read
    alone: dict[str, Any] = {"nargs": "?", "const": True} if f.default is False else {}  # without a value: on
    group.add_argument(flag(f.name), dest=f.name, type=reader, metavar=metavar, help=help_text, **alone)


def _add_output(group: Any) -> None:
    group.add_argument("--out", type=Path, metavar="DIR", help="run directory (default: runs/<time>-<model>-<tasks>)")
    group.add_argument(
        "--resume", type=Path, metavar="DIR", help="go on with the run in DIR; other settings are refused"
    )
    group.add_argument(
        "--profile",
        type=_number(int, "a number of steps (write the tasks before it)"),
        nargs="?",
        const=PROFILE_STEPS,
        metavar="STEPS",
        help=f"record the first STEPS steps after a warm-up with torch.profiler ({PROFILE_STEPS} if left out); "
        "rows that run meanwhile are slower",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="print what nodes of every kind would be told, as the model reads it, and its tokens; no weights are read",
    )
    group.add_argument("--quiet", action="store_true", help="only the closing table and the paths")
    group.add_argument("-h", "--help", action="help", help="show this and exit")


@dataclass(frozen=True, slots=True)
class _Kind:
    metavar: str
    read: Callable[[str], Any]


def _kind(hint: Any) -> _Kind:
    """How a type is read; ``X | None`` like ``X``, for leaving the flag out says None."""
    options = [option for option in get_args(hint) if option is not type(None)] or [hint]
    kinds: dict[Any, _Kind] = {
        bool: _Kind("{on,off}", _on_off),
        int: _Kind("N", _number(int, "a whole number")),
        float: _Kind("X", _number(float, "a number")),
        str: _Kind("NAME", str),
    }
    is_tuple = hint is tuple or getattr(hint, "__origin__", None) is tuple
    return _Kind(",".join(MODES), _names) if is_tuple else kinds[options[0]]


def _on_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"takes on or off, not {text!r}")
    return text == "on"


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


def _number(kind: Callable[[str], Any], what: str) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            value = kind(text)
            if not math.isfinite(value):
                raise ValueError
            return value
        except ValueError:
            raise argparse.ArgumentTypeError(f"takes {what}, not {text!r}") from None

    return read


def _choice(choices: Sequence[str]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"takes {', '.join(choices)}, not {text!r}")
        return text

    return read


def _formatter(prog: str) -> argparse.HelpFormatter:
    width = min(int(os.environ.get("COLUMNS", 0)) or _terminal_width(), 110)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=30, width=width)


def _terminal_width() -> int:
    try:
        return os.get_terminal_size().columns
    except OSError:
        return 100

"""What the commands that read a recorded run have in common."""

import argparse
import json
from pathlib import Path
from typing import Any

from rrm_engine.command_line import Parser
from rrm_engine.errors import RrmError
from rrm_engine.runs.directory import ESCAPED, check_output


class TraceError(RrmError):
    """What was found cannot be written or shown; the message is one sentence for the user."""


def make_parser(program: str, description: str, epilog: str) -> Parser:
    """A parser that takes a run's directory as ``run`` and job names as ``--jobs``."""
    parser = Parser(prog=program, description=description, epilog=epilog)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="directory that a bench run has written")
    add_jobs(parser)
    return parser


def add_runs(parser: Parser) -> None:
    """Runs' directories as ``runs`` and job names as ``--jobs``."""
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN_DIR", help="directories that bench runs have written"
    )
    add_jobs(parser)


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """``--jobs``: which jobs of recorded runs."""
    parser.add_argument(
        "--jobs",
        type=names,
        default=[],
        metavar="KEY,...",
        help="only these jobs: id/mode/sample, id/mode or id (default: all)",
    )


def names(text: str) -> list[str]:
    """The value of a flag that takes several names."""
    return [name for name in text.split(",") if name]


def write_json(path: Path, document: Any, flag: str = "--json") -> None:
    """Write what a command found. Raises RrmError if that cannot be done; see `check_output`."""
    check_output(path, flag)
    try:
        path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", errors=ESCAPED)
    except OSError as error:
        raise TraceError(f"{path} cannot be written: {error.strerror or error}") from None

"""What the commands that read a recorded run have in common."""

import json
from pathlib import Path
from typing import Any

from rrm_engine.command_line import Parser
from rrm_engine.errors import RrmError
from rrm_engine.runs.directory import ESCAPED, refuse_own


class TraceError(RrmError):
    """What was found cannot be written or shown; the message is one sentence for the user."""


def make_parser(program: str, description: str, epilog: str) -> Parser:
    """A parser that takes a run's directory as ``run`` and job names as ``--jobs``."""
    parser = Parser(prog=program, description=description, epilog=epilog)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="directory that a bench run has written")
    parser.add_argument(
        "--jobs",
        type=names,
        default=[],
        metavar="KEY,...",
        help="only these jobs: id/mode/sample, id/mode or id (default: all)",
    )
    return parser


def names(text: str) -> list[str]:
    """The value of a flag that takes several names."""
    return [name for name in text.split(",") if name]


def write_json(path: Path, document: Any) -> None:
    """Write what a command found. Raises RrmError if that cannot be done, or would end a run's own file."""
    refuse_own(path, "--json")
    try:
        path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", errors=ESCAPED)
    except OSError as error:
        raise TraceError(f"{path} cannot be written: {error.strerror or error}") from None

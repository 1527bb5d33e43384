"""The command: run directories in, one page out."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rrm_engine.command import OK, guarded
from rrm_engine.command_line import Parser
from rrm_engine.legible import plural, spelled
from rrm_engine.trace.command import add_runs

PROGRAM = "python -m rrm_engine.render"
LONGEST = 20_000
DESCRIPTION = """\
Make one page of recorded runs that opens in any browser, without network.

It shows the figures of the analysis, and for every problem direct and recursive
solving on one axis of time, with replay, KV memory, and each node's prompt, text,
events and conclusions. A run's verify.json, if there is one, goes into its foot."""
EPILOG = f"""\
examples:
  {PROGRAM} runs/aime --out aime.html
  {PROGRAM} runs/pin runs/drop --out policies.html
  {PROGRAM} runs/aime --jobs aime-2024-i-01,aime-2024-i-02 --out two.html
  python -m rrm_engine.verify runs/aime --json runs/aime/verify.json

exit code: 0 done, 2 refused"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded(lambda: _render(build_parser().parse_args(argv)))


def build_parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add_runs(parser)
    add("--out", type=Path, required=True, metavar="FILE", help="the page, such as page.html")
    add(
        "--longest-text",
        type=_characters,
        default=LONGEST,
        metavar="N",
        help=f"characters of a text on the page; of a longer one the middle is left out (default: {LONGEST:,})",
    )
    add(
        "--decode",
        action="store_true",
        help="make the texts of older runs, which recorded token ids alone, with their model's tokenizer",
    )
    return parser


def _render(options: argparse.Namespace) -> int:
    from rrm_engine.analyze.statistics import scipy_stats
    from rrm_engine.errors import RrmError
    from rrm_engine.runs.arms import arms, read_runs
    from rrm_engine.runs.directory import check_output

    check_output(options.out, "--out")
    runs = read_runs(options.runs, options.jobs, tokens=options.decode)
    scipy_stats()  # before anything is made of them
    from rrm_engine.render.document import document
    from rrm_engine.render.page import page

    found = document(arms(runs), options.longest_text, options.decode)
    text = page(found)
    try:
        options.out.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise RrmError(f"--out {options.out} cannot be written: {error.strerror or error}") from None
    size = f"{len(text.encode()) / 1e6:.1f} MB"
    print(f"Written to {spelled(str(options.out))}: {plural(len(found['entries']), 'problem')}, {size}")
    return OK


def _characters(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"takes a number of at least 2, not {text!r}")
    return int(text)

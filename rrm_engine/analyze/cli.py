"""The command: run directories in; tables, and files with all figures out."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rrm_engine.command import OK, guarded, say
from rrm_engine.command_line import Parser
from rrm_engine.legible import spelled
from rrm_engine.trace.command import add_runs

PROGRAM = "python -m rrm_engine.analyze"
DESCRIPTION = """\
Say what recorded runs show: accuracy with intervals, direct against recursive
solving on the same problems, times, tokens, the shape of graphs, controls that
may spend as much, and how far each row can be trusted.

Runs of the same tasks and settings are taken together: shards, and other seeds
as further samples. Runs of other settings are compared on the same problems."""
EPILOG = f"""\
examples:
  {PROGRAM} runs/aime
  {PROGRAM} runs/aime-seed-*
  {PROGRAM} runs/pin runs/drop --out analysis
  {PROGRAM} runs/aime --rows

exit code: 0 done, 2 refused"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded(lambda: _analyse(build_parser().parse_args(argv)))


def build_parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add_runs(parser)
    add("--rows", action="store_true", help="list every row with its trust label and the reason for it")
    add("--out", type=Path, metavar="DIR", help="write analysis.json, tables as CSV, and plots")
    return parser


def _analyse(options: argparse.Namespace) -> int:
    from rrm_engine.analyze.statistics import scipy_stats
    from rrm_engine.runs.arms import arms, read_runs
    from rrm_engine.runs.directory import check_output_folder

    check_output_folder(options.out, "--out")
    runs = read_runs(options.runs, options.jobs)
    scipy_stats()  # before anything is made of them
    from rich.console import Console

    from rrm_engine.analyze.analysis import analyse
    from rrm_engine.analyze.report import print_report

    document = analyse(arms(runs))
    print_report(Console(), document, rows=options.rows)
    if options.out:
        from rrm_engine.analyze.files import PLOT, write

        names = write(document, options.out)
        print(f"Written to {spelled(str(options.out))}: {', '.join(names)}")
        if PLOT not in names:
            say("No plot: it needs one more package: pip install 'rrm-engine[analysis]'")
    return OK

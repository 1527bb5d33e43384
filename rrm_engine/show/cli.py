"""The command: a run directory in; its rows, or the tree of one of them, out."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rrm_engine.command import FAILED, OK, guarded, say
from rrm_engine.command_line import Parser
from rrm_engine.errors import RrmError
from rrm_engine.legible import legible, legible_key
from rrm_engine.runs.manifest import read_manifest
from rrm_engine.runs.reader import TRACE, RecordedJob, read_jobs, read_rows, refuse_unknown
from rrm_engine.runs.rows import row_key

if TYPE_CHECKING:
    from rich.console import Console

PROGRAM = "python -m rrm_engine.show"
DESCRIPTION = """\
Show a recorded run, one that goes on, or what is left of one that broke off.

Without ROW: a line for every row. With ROW: the tree of its nodes, each with
its task, what it wrote, its answer, tokens and times."""
EPILOG = f"""\
examples:
  {PROGRAM} runs/aime
  {PROGRAM} runs/aime aime-2024-i-01/rrm
  {PROGRAM} runs/aime aime-2024-i-01/rrm --node root.c1
  {PROGRAM} runs/aime --follow

exit code: 0 done, 1 the run that was followed broke off, 2 refused, 130 interrupted"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded(lambda: _show(build_parser().parse_args(argv)))


def build_parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="directory that a bench run has written, or writes")
    add("row", nargs="?", metavar="ROW", help="id/mode/sample, id/mode or id (default: list the rows)")
    add("--node", metavar="PATH", help="all that this node was told and wrote, such as root.c1")
    add("--follow", action="store_true", help="tell what happens, as it happens, until all rows are there")
    return parser


def _show(options: argparse.Namespace) -> int:
    if not options.follow:
        read_manifest(options.run)
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    if options.follow:
        return _follow(console, options)
    if not (options.row or options.node or (options.run / TRACE).exists()):
        _print_list(console, [RecordedJob(row_key(row), 0, [], row) for row in read_rows(options.run)])
        console.print(f"It holds no {TRACE}, and so nothing of nodes.")
        return OK
    jobs = read_jobs(options.run, [options.row] if options.row else [], tokens=False, flag="ROW")
    if options.node:
        _print_node(console, jobs, options.node)
    elif options.row:
        _print_trees(console, jobs)
    else:
        _print_list(console, jobs)
    return OK


def _follow(console: "Console", options: argparse.Namespace) -> int:
    from rrm_engine.show.follow import BrokenOff, follow

    if options.node:
        raise RrmError("--follow tells of whole rows: leave --node out")
    try:
        for line in follow(options.run, options.row):
            console.print(line)
            console.file.flush()
    except BrokenOff as end:
        say(str(end))
        return FAILED
    return OK


def _print_list(console: "Console", jobs: Sequence[RecordedJob]) -> None:
    from rrm_engine.show.tree import title

    for job in jobs:
        console.print(title(job))
    if not jobs:
        console.print("Nothing has begun in it yet.")


def _print_trees(console: "Console", jobs: Sequence[RecordedJob]) -> None:
    from rrm_engine.show.tree import tree

    for job in jobs:
        console.print(tree(job), soft_wrap=False)


def _print_node(console: "Console", jobs: Sequence[RecordedJob], path: str) -> None:
    from rrm_engine.runs.nodes import nodes_of
    from rrm_engine.show.tree import details, title

    if len(jobs) > 1:
        names = ", ".join(legible_key(job.key) for job in jobs[:3])
        raise RrmError(f"--node {legible(path)}: name one row with it, such as one of {names}")
    for job in jobs:
        nodes = nodes_of(job.events)
        refuse_unknown("--node", path, "node", path in nodes, nodes)
        console.print(title(job))
        for text in details(nodes[path], job.events[0].t):
            console.print(text)

"""The command: run directories in, a file of conversations out."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from rrm_engine.command import OK, guarded
from rrm_engine.command_line import Parser
from rrm_engine.errors import RrmError
from rrm_engine.legible import plural, spelled
from rrm_engine.runs.trust import Label
from rrm_engine.trace.command import add_runs, names

PROGRAM = "python -m rrm_engine.export"
FORMATS, NODES = ("sft",), ("all", "planner")
MODES = ("direct", "rrm")
DESCRIPTION = """\
Write recorded rows as data for supervised fine-tuning: a line of JSON for every
node, with its conversation as messages and, where the run has token ids, all of
them and who wrote each: the model, the prompt, the runtime that told a parent
its children's conclusions, or a style or grammar that left no choice."""
EPILOG = f"""\
examples:
  {PROGRAM} runs/aime --out planners.jsonl
  {PROGRAM} runs/aime-seed-* --nodes planner --clean --out planners.jsonl
  {PROGRAM} runs/aime --labels direct --out direct.jsonl

exit code: 0 done, 2 refused"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded(lambda: _export(build_parser().parse_args(argv)))


def build_parser() -> Parser:
    """The command's flags."""
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    add = parser.add_argument
    add_runs(parser)
    add("--format", choices=FORMATS, default="sft", help="chat data for supervised fine-tuning")
    add("--out", type=Path, required=True, metavar="FILE", help="the file, such as planners.jsonl")
    add(
        "--labels",
        type=_among(Label),
        default=[Label.HEADLINE.value],
        metavar="LABEL,...",
        help=f"rows with these trust labels: {', '.join(Label)}",
    )
    add("--modes", type=_among(MODES), default=list(MODES), metavar="MODE,...", help="rows of these modes")
    add("--clean", action="store_true", help="leave out rows that were spliced, cut by a limit, or repaired")
    add("--nodes", choices=NODES, default="all", help="all nodes of a row, or only those that made children")
    add("--model", metavar="MODEL", help="where the model is whose tokenizer the run used, if it was moved")
    add("--trust-remote-code", action="store_true", help="run Python code that the checkpoint's tokenizer brings")
    return parser


def _export(options: argparse.Namespace) -> int:
    from rrm_engine.runs.arms import arms, read_runs
    from rrm_engine.runs.directory import ESCAPED, check_output
    from rrm_engine.runs.reader import chosen_jobs
    from rrm_engine.runs.rows import row_key

    check_output(options.out, "--out")
    runs = read_runs(options.runs)
    # All rows are read, for a row's label depends on its partner's.
    jobs = chosen_jobs((row_key(row) for run in runs for row in run.rows), options.jobs)
    from rrm_engine.export.conversations import Choice, conversations  # which take seconds to import

    choice = Choice(jobs, options.labels, options.modes, options.clean, options.nodes == "planner")
    found = conversations(arms(runs), choice, options.model, options.trust_remote_code)
    lines = [json.dumps(line.as_json(), ensure_ascii=False) + "\n" for line in found]
    try:
        with options.out.open("w", encoding="utf-8", errors=ESCAPED, newline="\n") as file:
            file.writelines(lines)
    except OSError as error:
        raise RrmError(f"--out {options.out} cannot be written: {error.strerror or error}") from None
    rows, written = {(line.run, line.job) for line in found}, sum(map(sum, (line.written for line in found)))
    print(
        f"Written to {spelled(str(options.out))}: {plural(len(found), 'node')} of {plural(len(rows), 'row')}, "
        f"{plural(written, 'token')} of the model's own choice"
    )
    return OK


def _among(known: Sequence[str] | type[Label]) -> "argparse._ActionType":
    def chosen(text: str) -> list[str]:
        found, there = [name.strip() for name in names(text)], list(map(str, known))
        for name in found:
            if name not in there:
                raise argparse.ArgumentTypeError(f"takes {', '.join(there)}, not {name!r}")
        return found

    return chosen

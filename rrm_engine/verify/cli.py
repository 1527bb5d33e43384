"""The command: a run directory in, a table and an exit code out."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rrm_engine.command import OK, guarded, say
from rrm_engine.errors import RrmError
from rrm_engine.runs.directory import check_output
from rrm_engine.trace.command import make_parser, names, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from rrm_engine.verify.check import NodeCheck
    from rrm_engine.verify.recording import Recording

PROGRAM = "python -m rrm_engine.verify"
BROKEN = 1
DTYPES = ("run", "float32", "bfloat16", "float16")
DESCRIPTION = """\
Check a recorded run against plain transformers.

The model is loaded as it was published. Each node's transcript goes through it
in one forward, and every token that the model wrote is drawn again from those
logits: greedily, or with the noise, filters and grammar of the run. Beside it
the transcript goes through the engine's paged path, and the logits of the two
are compared. In a float32 run every token must be the same, near ties aside; in
bfloat16 and float16 log-probabilities must be close."""
EPILOG = f"""\
examples:
  {PROGRAM} runs/aime --limit 5
  {PROGRAM} runs/aime --jobs aime-2024-i-01/rrm --nodes root,root.c1

exit code: 0 all promises kept, 1 a promise broken, 2 refused"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded(lambda: _verify(build_parser().parse_args(argv)))


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = make_parser(PROGRAM, DESCRIPTION, EPILOG)
    add = parser.add_argument
    add("--nodes", type=names, default=[], metavar="PATH,...", help="only these, such as root,root.c1")
    add("--limit", type=_positive, metavar="N", help="only the first N nodes")
    add(
        "--dtype",
        type=_dtypes,
        default=["run", "float32"],
        metavar="TYPE,...",
        help="what plain transformers computes in: run (the run's own), float32, bfloat16, float16; "
        "promises are about the run's own (default: run,float32)",
    )
    add("--model", metavar="NAME", help="where the model is now, if not where the run found it")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:0 ...")
    add(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code that the checkpoint brings, as the run was allowed to",
    )
    add("--json", type=Path, metavar="OUT", help="write every check with all its figures")
    add("--quiet", action="store_true", help="no progress")
    return parser


def _verify(options: argparse.Namespace) -> int:
    from rrm_engine.verify.recording import read_recording

    check_output(options.json, "--json")
    recording = read_recording(options.run, options.nodes, options.jobs, options.limit)
    if not options.quiet:
        say(f"Loading {options.model or recording.model} ...")
    from rrm_engine.device.memory import is_out_of_memory
    from rrm_engine.verify.report import print_report

    try:
        checks = _checks(recording, options)
    except (RuntimeError, OSError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RrmError(
            "there is not enough memory for the model twice and a transcript: free some of it, or try another --device"
        ) from error
    print_report(_console(), recording, checks)
    if options.json:
        write_json(options.json, _document(recording, checks))
    return BROKEN if any(check.verdict == "broken" for check in checks) else OK


def _checks(recording: "Recording", options: argparse.Namespace) -> "list[NodeCheck]":
    """The checks, with a bar while they are made."""
    from rich import progress

    from rrm_engine.verify.run import check_all, passes

    console = _console(stderr=True)
    total = len(passes(recording, options.dtype)) * sum(len(record.tokens) for record in recording.nodes)
    bar = progress.Progress(
        progress.BarColumn(bar_width=24),
        progress.TaskProgressColumn(),
        progress.TimeRemainingColumn(compact=True),
        progress.TextColumn("{task.description}", markup=False),
        console=console,
        transient=True,
        disable=options.quiet or not console.is_terminal,
    )
    with bar:
        task = bar.add_task("", total=total)

        def report(what: str, tokens: int) -> None:
            bar.update(task, description=what, advance=tokens)

        return list(
            check_all(recording, options.dtype, options.model, options.device, report, options.trust_remote_code)
        )


def _document(recording: "Recording", checks: "list[NodeCheck]") -> dict[str, Any]:
    from rrm_engine.verify.check import as_json

    about = {name: getattr(recording, name) for name in ("model", "dtype", "seed", "unfinished")}
    return {"run": str(recording.path), **about, "checks": [as_json(check) for check in checks]}


def _dtypes(text: str) -> list[str]:
    found = names(text)
    if not found or set(found) - set(DTYPES):
        raise argparse.ArgumentTypeError(f"takes {', '.join(DTYPES)}, not {text!r}")
    return found


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a number of at least 1, not {text!r}")
    return int(text)


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)

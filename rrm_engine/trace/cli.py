"""The command: a run directory in; a table, a JSON file or a Perfetto trace out."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rrm_engine.command import OK, guarded, say
from rrm_engine.legible import legible, plural, spelled
from rrm_engine.runs.directory import check_output
from rrm_engine.runs.reader import SHOWN_KEYS, RunTrace, read_run
from rrm_engine.trace.attribution import PARTS, RECURSIVE, Attribution, as_json, attribute, is_attributed, medians
from rrm_engine.trace.command import TraceError, make_parser, write_json
from rrm_engine.trace.profile_reader import PROFILE, STEP, RecordedProfile, read_profile

PROGRAM = "python -m rrm_engine.trace"
INCOMPLETE = 1
DESCRIPTION = """\
Show where the time of a recorded run went, or export it for ui.perfetto.dev.

Without --perfetto: a table that splits the latency of every recursive row along
its critical path."""
EPILOG = f"""\
examples:
  {PROGRAM} runs/aime
  {PROGRAM} runs/aime --perfetto aime.pftrace --jobs aime-2024-i-01/rrm/0
  {PROGRAM} runs/aime --plot aime.png --jobs aime-2024-i-01

exit code: 0 done, 1 done but for jobs whose trace is incomplete, 2 refused"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded(lambda: _trace(build_parser().parse_args(argv)))


def _trace(options: argparse.Namespace) -> int:
    for flag in ("perfetto", "plot", "json"):
        check_output(getattr(options, flag), f"--{flag}")
    run = read_run(options.run, options.jobs)
    if options.plot:
        _plot(run, options.plot)
    if options.perfetto:
        _export(run, options.perfetto, _profile(options.run))
    else:
        run.incomplete = {key: why for key, why in run.incomplete.items() if mode_of(key) == RECURSIVE}
    found = [attribute(trace) for trace in run.jobs if is_attributed(trace)]
    if options.json:
        write_json(options.json, _document(found, run))
    if not options.perfetto:
        _show(found)
    _say_incomplete(run)
    return INCOMPLETE if run.incomplete else OK


def build_parser() -> argparse.ArgumentParser:
    parser = make_parser(PROGRAM, DESCRIPTION, EPILOG)
    parser.add_argument("--perfetto", type=Path, metavar="OUT", help="write a Perfetto trace instead of the table")
    parser.add_argument("--plot", type=Path, metavar="OUT", help="draw recursive rows over time (PNG, SVG, PDF)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the attribution with its critical paths")
    return parser


def _profile(directory: Path) -> RecordedProfile | None:
    try:
        return read_profile(directory)
    except (OSError, ValueError) as error:
        raise TraceError(f"{directory / PROFILE} cannot be read ({error}); move it away to export without it") from None


def _export(run: RunTrace, path: Path, profile: RecordedProfile | None) -> None:
    from rrm_engine.trace.perfetto import export, ranges_of

    if not run.jobs:
        _say_incomplete(run)
        raise TraceError("there is no job with a complete trace to export")
    export(run.jobs, path, profile)
    what = f"jobs {len(run.jobs):,}, nodes {sum(len(trace.nodes) for trace in run.jobs):,}"
    if profile:
        steps = [outer for outer in ranges_of(profile, run.jobs) if outer.name == STEP]
        what += f", profiled steps {len(steps):,}"
    print(f"Written to {spelled(str(path))}: {what}; open it at https://ui.perfetto.dev")


def _plot(run: RunTrace, path: Path) -> None:
    from rrm_engine.trace.plot import plot

    drawn = plot(run.jobs, path)
    left = sum(map(is_attributed, run.jobs)) - drawn
    print(
        f"Written to {spelled(str(path))}: {plural(drawn, 'recursive row')}"
        + (f"; {left:,} more, see --jobs" if left else "")
    )


def _show(found: Sequence[Attribution]) -> None:
    from rich.console import Console

    from rrm_engine.trace.report import print_attribution

    print_attribution(Console(), found)


def _document(found: Sequence[Attribution], run: RunTrace) -> dict[str, Any]:
    return {
        "parts": PARTS,
        "medians": medians(found),
        "rows": as_json(found),
        "incomplete": run.incomplete,
    }


def mode_of(key: str) -> str:
    """The mode in a job's key."""
    return key.rsplit("/", 2)[-2] if key.count("/") >= 2 else ""


def _say_incomplete(run: RunTrace) -> None:
    reasons = list(run.incomplete.items())
    for key, reason in reasons[:SHOWN_KEYS]:
        say(f"left out: {legible(key)}: {reason}")
    if len(reasons) > SHOWN_KEYS:
        say(f"left out: {len(reasons) - SHOWN_KEYS:,} more with an incomplete trace")

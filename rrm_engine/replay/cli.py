"""The command: graphs in, a table and a JSON file out."""

import argparse
from collections.abc import Sequence

from rrm_engine.command import FAILED, OK, guarded, say
from rrm_engine.errors import RrmError
from rrm_engine.replay.flags import build_parser
from rrm_engine.replay.recorded import check_from
from rrm_engine.runs.directory import check_output


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded(lambda: _replay(build_parser().parse_args(argv)))


def _replay(options: argparse.Namespace) -> int:
    for flag in ("json", "save"):
        check_output(getattr(options, flag), f"--{flag}")
    if options.run is not None:
        check_from(options.run)
    elif options.jobs:
        raise RrmError("--jobs names jobs of a recorded run: give it with --from")
    from rich.console import Console

    from rrm_engine.replay.check import ReplayMismatch
    from rrm_engine.replay.command import replay

    try:
        replay(options, Console())
    except ReplayMismatch as error:
        say(f"error: {error}")
        return FAILED
    return OK

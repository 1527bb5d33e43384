"""The command: graphs in, a table and a JSON file out."""

import argparse
from collections.abc import Sequence

from rrm_engine.command import FAILED, OK, guarded, say
from rrm_engine.replay.flags import build_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return guarded(lambda: _replay(build_parser().parse_args(argv)))


def _replay(options: argparse.Namespace) -> int:
    from rich.console import Console

    from rrm_engine.replay.check import ReplayMismatch
    from rrm_engine.replay.command import replay

    try:
        replay(options, Console())
    except ReplayMismatch as error:
        say(f"error: {error}")
        return FAILED
    return OK

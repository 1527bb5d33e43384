"""Completion of ``rrm`` in a shell, made by shtab from the commands' own parsers."""

import argparse
from collections.abc import Iterable
from importlib import import_module

from rrm_engine.errors import RrmError

SHELLS = ("bash", "zsh", "tcsh")
PARSERS = {"bench": "rrm_engine.bench.flags", "replay": "rrm_engine.replay.flags"}  # by command, if not in its cli
FOLDERS, FILES = ("RUN_DIR", "DIR"), ("FILE", "OUT", "TASKS", "MODEL")  # metavars whose values are on the disk


def script(shell: str, commands: Iterable[str]) -> str:
    """The completion script for a shell. Raises RrmError for one that is not known, and without shtab."""
    if shell not in SHELLS:
        raise RrmError(f"--print-completion takes {', '.join(SHELLS)}, not {shell!r}")
    try:
        import shtab
    except ImportError:
        raise RrmError("--print-completion needs one more package: pip install 'rrm-engine[completion]'") from None
    top = argparse.ArgumentParser("rrm")
    chosen = top.add_subparsers()
    for name in commands:
        own = import_module(PARSERS.get(name, f"rrm_engine.{name}.cli")).build_parser()
        for action in own._actions:
            if action.metavar in FOLDERS:
                action.complete = shtab.DIRECTORY
            elif action.metavar in FILES:
                action.complete = shtab.FILE
            elif str(action.metavar).startswith("{"):  # the bench checks these by their types
                action.choices = str(action.metavar)[1:-1].split(",")
        chosen.add_parser(name, parents=[own], add_help=False, help=name)
    return str(shtab.complete(top, shell))

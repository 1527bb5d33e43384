"""``python -m rrm_engine``: which commands there are."""

import sys

import rrm_engine
from rrm_engine.command import run, say

COMMANDS = """\
rrm-engine {version}: recursive reasoning on Transformers models.

    python -m rrm_engine.bench [TASKS]    solve tasks directly and recursively, and compare
    python -m rrm_engine.trace RUN_DIR    where the time of a recorded run went
    python -m rrm_engine.verify RUN_DIR   a recorded run against plain transformers

Each of them explains itself with --help. `python -m rrm_engine.bench --limit 5` runs with the packaged model and tasks
and needs no network. In Python: from rrm_engine import RunConfig, Solver."""


def main() -> int:
    if sys.argv[1:] in (["--version"], ["-V"]):
        print(f"rrm-engine {rrm_engine.__version__}")
        return 0
    print(COMMANDS.format(version=rrm_engine.__version__))
    if not sys.argv[1:] or sys.argv[1:] in (["--help"], ["-h"], ["help"]):
        return 0
    say(f"error: python -m rrm_engine takes no arguments, and here is {sys.argv[1]!r}")
    return 2


if __name__ == "__main__":
    run("rrm_engine.__main__")

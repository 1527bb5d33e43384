"""``python -m rrm_engine``: which commands there are."""

from rrm_engine.command import run

COMMANDS = """\
Recursive reasoning on Transformers models. There are six commands:

    python -m rrm_engine.bench [TASKS]    solve tasks directly and recursively, and compare
    python -m rrm_engine.analyze RUN_DIR  what recorded runs show, with intervals
    python -m rrm_engine.show RUN_DIR     a run's rows and the trees of its nodes, also while it runs
    python -m rrm_engine.render RUN_DIR   recorded runs as a page to look at, without network
    python -m rrm_engine.trace RUN_DIR    where the time of a recorded run went
    python -m rrm_engine.verify RUN_DIR   a recorded run against plain transformers

Each explains itself with --help. `python -m rrm_engine.bench --limit 5` takes the packaged model
and tasks and needs no network. In Python: from rrm_engine import RunConfig, Solver."""


def main() -> int:
    """Say which commands there are; returns the exit code."""
    from rrm_engine.command_line import Parser

    parser = Parser(prog="python -m rrm_engine", usage="python -m rrm_engine.COMMAND ...", description=COMMANDS)
    parser.parse_args()
    parser.print_help()
    return 0


if __name__ == "__main__":
    run("rrm_engine.__main__")

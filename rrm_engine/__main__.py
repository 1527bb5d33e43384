"""``rrm`` and ``python -m rrm_engine``: which commands there are, and each of them."""

import sys
from typing import NoReturn

from rrm_engine.command import guarded, run

COMMANDS = {
    "bench": ("[TASKS]", "solve tasks directly and recursively, and compare"),
    "analyze": ("RUN_DIR...", "what recorded runs show, with intervals"),
    "show": ("RUN_DIR [ROW]", "a run's rows and the trees of its nodes, also while it runs"),
    "render": ("RUN_DIR...", "recorded runs as a page to look at, without network"),
    "export": ("RUN_DIR...", "recorded rows as data to train planners on"),
    "trace": ("RUN_DIR", "where the time of a recorded run went"),
    "verify": ("RUN_DIR", "a recorded run against plain transformers"),
    "replay": ("", "the same graphs under other KV policies, token by token"),
}
LISTED = "\n".join(f"    rrm {f'{name} {takes}':22}{what}" for name, (takes, what) in COMMANDS.items())
DESCRIPTION = f"""\
Recursive reasoning on Transformers models. There are these commands:

{LISTED}

Each explains itself with --help; `python -m rrm_engine` does as `rrm` does. `rrm bench --limit 5`
takes the packaged model and tasks and needs no network. In Python: from rrm_engine import RunConfig,
Solver."""


def console() -> NoReturn:
    """Be the process of ``rrm``."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in COMMANDS:
        run("rrm_engine.__main__")
    del sys.argv[1]
    run(f"rrm_engine.{name}.cli", kept=name == "bench")


def main() -> int:
    """Say which commands there are; returns the exit code."""
    import difflib

    from rrm_engine.command_line import Parser
    from rrm_engine.legible import legible

    parser = Parser("command", prog="rrm", usage="rrm COMMAND ...", description=DESCRIPTION)
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if close := difflib.get_close_matches(name, COMMANDS, n=1):
        parser.error(f"there is no command '{legible(name, 40)}'; did you mean {close[0]}?")
    parser.add_argument("--print-completion", metavar="SHELL", help="print what makes bash, zsh or tcsh complete rrm")
    if shell := parser.parse_args().print_completion:
        return guarded(lambda: _print_completion(shell))
    parser.print_help()
    return 0


def _print_completion(shell: str) -> int:
    from rrm_engine.completion import script

    print(script(shell, COMMANDS))
    return 0


if __name__ == "__main__":
    console()

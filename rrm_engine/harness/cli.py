"""The command: lm-evaluation-harness's own command line, with the model ``rrm`` among its models."""

import sys
import traceback
from importlib.util import find_spec

from rrm_engine.command import FAILED, OK, guarded
from rrm_engine.command_line import Parser
from rrm_engine.errors import RrmError

PROGRAM = "python -m rrm_engine.harness"
DESCRIPTION = """\
Run the command line of EleutherAI's lm-evaluation-harness with a model named rrm
among its models, for releases of it whose `lm_eval` does not find that by itself.
All arguments are the harness's own."""
EPILOG = f"""\
examples:
  {PROGRAM} --model rrm --model_args model=Qwen/Qwen3-14B,mode=rrm --tasks gsm8k
  {PROGRAM} --model rrm --model_args model=embedded --include_path tasks --tasks mine
  {PROGRAM} run --help

exit code: 0 done, 1 the harness failed, 2 refused"""
OWN = ("-h", "--help", "--version")


def main() -> int:
    """Run the command; returns the exit code."""
    words = sys.argv[1:]
    if not words or words[0] in OWN:
        build_parser().parse_args(words or ["--help"])
    return guarded(_hand_over)


def build_parser() -> Parser:
    """What is said of the command itself."""
    parser = Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="what lm_eval takes")
    return parser


def _hand_over() -> int:
    if find_spec("lm_eval") is None:
        raise RrmError("lm-evaluation-harness is not installed: pip install 'rrm-engine[lm-eval]'")
    from lm_eval.__main__ import cli_evaluate

    import rrm_engine.harness.lm_eval  # noqa: F401  (makes the model known)

    try:
        cli_evaluate()
    except RrmError:
        raise
    except Exception:  # the harness's own, which it would tell so itself
        traceback.print_exc()
        return FAILED
    return OK

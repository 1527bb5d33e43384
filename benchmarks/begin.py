"""Where a benchmark begins: --help and wrong flags are answered before torch is imported, or even installed.

A checkout need not be installed either: what is imported after this module is found in it.
"""

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT), str(ROOT / "kernels")]


def flags_first(build_parser: Callable[[], argparse.ArgumentParser], *needs: str) -> None:
    """Parse the command line once, so that it is answered; exit with one sentence if torch or ``needs`` are missing."""
    parser = build_parser()
    parser.parse_args()
    needed = ("torch", "transformers", "rich", *needs)
    if missing := [name for name in needed if find_spec(name) is None]:
        parser.error(
            f"{' and '.join(missing)} cannot be imported by {sys.executable}: pip install {' '.join(missing)}, or run "
            f"scripts/setup.sh and use {ROOT / '.venv/bin/python'}"
        )


def kernel_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of everything that measures kernels."""
    parser.add_argument("--dtypes", default="bf16,fp32")
    parser.add_argument("--variants", default="native", help="of the compiled kernels: see rrm_kernels/build.py")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--json", type=Path, help="where to write the result")

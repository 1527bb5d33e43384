"""Where a benchmark begins: --help and wrong flags are answered before torch is imported, or even installed.

A checkout need not be installed either: what is imported after this module is found in it.
"""

import argparse
import math
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


def add_replay_settings(parser: argparse.ArgumentParser) -> None:
    """Those that graph_replay.py and kv_ablation.py have in common."""
    parser.add_argument("--count", type=int, default=3, metavar="N", help="graphs of a shape, or the first N of a file")
    parser.add_argument("--seed", type=int, default=0, help="of a shape's graphs")
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="rounds; every contender replays the smallest graph before them",
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, metavar="M", help="begin no further round that would not end by then"
    )
    parser.add_argument("--threads", type=int, help="default: as many as torch takes")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--attention", default="auto", choices=("auto", "native", "triton", "varlen", "flash", "sdpa"))
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument(
        "--step-tokens", type=int, default=None, help="token budget of a step (default: 512, on CUDA 4096)"
    )
    parser.add_argument("--max-concurrency", type=int, default=64, help="sequences decoding at once")

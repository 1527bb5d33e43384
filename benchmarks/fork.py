"""What a fork costs: host time and blocks copied, by the length of the parent's context.

    python benchmarks/fork.py --json OUT

A child that starts from its parent's whole context shares every block of it. Measured on the engine's own bookkeeping,
without a model: the time of ``Engine.submit(fork_of=...)`` and of planning the child's first step, which copies the one
block that is partly filled. Quoted are medians; the file has the quartiles too.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

from begin import flags_first

from rrm_engine.command_line import Parser


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser


if __name__ == "__main__":
    flags_first(build_parser)

import torch

from rrm_engine.engine.engine import Engine
from rrm_engine.engine.sampler import SamplingParams
from rrm_engine.engine.scheduler import SchedulerOutput, Work
from rrm_engine.engine.settings import EngineSettings
from rrm_engine.runs.environment import environment

LENGTHS = (512, 2048, 8192, 32768)
BLOCK_SIZE = 16


class Bookkeeping:
    """In the place of a model runner: every step samples token 0."""

    def run(self, step: SchedulerOutput) -> tuple[torch.Tensor, list[Work]]:
        order = [work for work in step.work if work.samples]
        return torch.zeros(len(order), 2), order


def measure(length: int, repeats: int) -> dict[str, Any]:
    blocks = 2 * length // BLOCK_SIZE
    engine = Engine(
        Bookkeeping(),  # type: ignore[arg-type]
        EngineSettings(blocks=blocks, block_size=BLOCK_SIZE, step_tokens=length, max_sequence_tokens=length + 64),
    )
    parent = engine.submit("root", list(range(length - 5)), 1, SamplingParams())
    engine.step()
    submits, steps, copied = [], [], 0
    for index in range(repeats):
        tokens = [*parent.tokens[:-1], 1, 2, 3]
        began = perf_counter()
        child = engine.submit(f"root.{index}", tokens, 1, SamplingParams(), depth=1, fork_of=(parent, len(tokens) - 3))
        submits.append(perf_counter() - began)
        began = perf_counter()
        engine.step()
        steps.append(perf_counter() - began)
        copied = max(copied, child.counters.copied_blocks)
        assert child.counters.prefilled == 3
        engine.finish(child)
    return {
        "tokens": length,
        "blocks_shared": -(-length // BLOCK_SIZE),
        "blocks_copied": copied,
        "submit_us": statistics.median(submits) * 1e6,
        "submit_us_quartiles": quartiles(submits),
        "first_step_us": statistics.median(steps) * 1e6,
        "first_step_us_quartiles": quartiles(steps),
    }


def quartiles(seconds: list[float]) -> list[float]:
    """The first and the third one, in microseconds."""
    first, _, third = statistics.quantiles(seconds, n=4)
    return [first * 1e6, third * 1e6]


def main() -> None:
    args = build_parser().parse_args()
    rows = [measure(length, args.repeats) for length in LENGTHS]
    print("  tokens  shared  copied  submit us  first step us")
    for row in rows:
        print(
            f"{row['tokens']:>8}  {row['blocks_shared']:>6}  {row['blocks_copied']:>6}  {row['submit_us']:>9.1f}  "
            f"{row['first_step_us']:>13.1f}"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {"block_size": BLOCK_SIZE, **{name: str(value) for name, value in vars(args).items()}}
        result = {"command": " ".join(["python", *sys.argv]), **environment(), "settings": settings, "rows": rows}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Held-out tasks for the embedded model, as JSON lines.

    PYTHONPATH=scripts python -m embedded.benchmark rrm_engine/data/embedded_tasks.jsonl

Every leaf of every task comes from the residue class of parameters that training never draws from. Every
other task has made-up names and nouns.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedded.families import FAMILIES, Kind, Task
from embedded.wording import random_task

SHAPES: tuple[tuple[Kind, tuple[int, ...], int], ...] = (  # kind, widths, tasks per width
    ("flat", (2, 3, 4, 5, 6, 7, 8), 5),
    ("depends", (3, 4, 5, 6), 3),
    ("nested", (2, 3, 4), 3),
    ("atomic", (1,), 6),
)


def benchmark_tasks(seed: int, repeats: int = 1) -> Iterator[Task]:
    """The benchmark's tasks; ``repeats`` times as many of every shape."""
    rng = random.Random(seed)
    families = (*FAMILIES, "mixed")
    for kind, widths, copies in SHAPES:
        choices = families[:-1] if kind == "atomic" else families
        for index in range(copies * repeats):
            for place, width in enumerate(widths):
                family = choices[(place + index) % len(choices)]
                invented = float((place + index // 2) % 2)
                yield random_task(rng, kind, width=width, family=family, held_out=True, invented=invented)


def record(task: Task, index: int) -> dict[str, Any]:
    return {
        "id": f"{task.kind}-{index:03d}",
        "problem": task.problem,
        "answer": task.answer(),
        "family": task.family,
        "width": task.width,
        "depth": task.depth,
        "kind": task.kind,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="tasks of each shape, as a multiple of the shipped set")
    args = parser.parse_args()
    tasks = benchmark_tasks(args.seed, args.repeats)
    lines = [json.dumps(record(task, index)) for index, task in enumerate(tasks)]
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""What drafts are worth: the same tasks solved without and with them, in turns, on one loaded model.

    python benchmarks/drafts.py --model embedded --batch 1,4,16
    python benchmarks/drafts.py --model DIR --tasks FILE.jsonl --modes direct,rrm --batch 1,4 --tokens 96 --json OUT

For each mode and number of tasks at once it prints steps for each hundred tokens of the critical path, tokens drafted
and accepted, and the time without drafts over that with them, round by round. Answers must be the same, or it says so.
"""

import argparse
import gc
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

from begin import flags_first

from rrm_engine.command_line import Parser


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded", help="as the bench's")
    parser.add_argument("--dtype", default="auto", help="as the bench's")
    parser.add_argument("--tasks", default="embedded", help="as the bench's: a packaged set or a file")
    parser.add_argument("--modes", default="direct,rrm", help="of direct and rrm")
    parser.add_argument("--batch", default="1,4,16", help="tasks at once; each is solved once a round")
    parser.add_argument("--tokens", type=int, help="of each phase at most; default: as the style has it")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-depth", type=int, default=1)
    parser.add_argument("--draft", default="auto", help="as the bench's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write every round")
    return parser


if __name__ == "__main__":
    flags_first(build_parser)

from rrm_engine.backends.local import Solver
from rrm_engine.bench.tasks import load_tasks
from rrm_engine.config import RunConfig
from rrm_engine.solver.result import Job, JobResult

BUDGETS = ("direct_max_tokens", "planner_max_tokens", "solver_max_tokens", "continuation_max_tokens")


def main() -> None:
    args = build_parser().parse_args()
    tasks = [task.problem for task in load_tasks(args.tasks).tasks]
    batches = [int(n) for n in args.batch.split(",")]
    budgets: dict[str, Any] = dict.fromkeys(BUDGETS, args.tokens) if args.tokens else {}
    config = RunConfig(
        model=args.model,
        dtype=args.dtype,
        temperature=args.temperature,
        max_depth=args.max_depth,
        prefix_cache=False,  # or the second of two runs would find the prompts of the first
        draft="off",
        **budgets,
    )
    tasks = (tasks * max(batches))[: max(batches)] if len(tasks) < max(batches) else tasks[: max(batches)]
    without = Solver.load(config, tasks)
    with_drafts = Solver(without.model, replace(config, draft=args.draft), tasks)
    results = []
    for mode in args.modes.split(","):
        for batch in batches:
            rounds = []
            for _ in range(args.rounds):
                pair = [solve(solver, tasks[:batch], mode, batch) for solver in (without, with_drafts)]
                rounds.append({"off": pair[0], "on": pair[1]})
            results.append({"mode": mode, "batch": batch, "rounds": rounds})
            print(sentence(mode, batch, rounds), flush=True)
    if args.json:
        args.json.write_text(
            json.dumps({"command": " ".join(["python", *sys.argv]), "model": args.model, "results": results}, indent=1)
        )


def solve(solver: Solver, tasks: list[str], mode: str, batch: int) -> dict[str, Any]:
    """One round of one contender."""
    gc.collect()
    steps, began = solver.engine.steps, perf_counter()
    found: list[JobResult] = list(
        solver.run([Job(f"task{i}", task, mode) for i, task in enumerate(tasks)], None, batch)
    )
    totals = {
        name: sum(getattr(result, name) for result in found)
        for name in ("total_tokens", "critical_path_tokens", "critical_path_steps", "drafted", "accepted")
    }
    return {
        "seconds": perf_counter() - began,
        "steps": solver.engine.steps - steps,
        "answers": [result.answer for result in sorted(found, key=lambda result: result.job.key)],
        **totals,
    }


def sentence(mode: str, batch: int, rounds: list[dict[str, Any]]) -> str:
    off, on = rounds[-1]["off"], rounds[-1]["on"]
    times = [one["off"]["seconds"] / one["on"]["seconds"] for one in rounds]
    best = min(one["off"]["seconds"] for one in rounds) / min(one["on"]["seconds"] for one in rounds)
    accepted = 100 * on["accepted"] / on["drafted"] if on["drafted"] else 0.0
    path = 100 * on["critical_path_steps"] / max(1, on["critical_path_tokens"])
    same = "same answers" if off["answers"] == on["answers"] else "OTHER ANSWERS"
    return (
        f"{mode:7} {batch:3} at once: {off['steps']:5} -> {on['steps']:5} steps for {on['total_tokens']:,} tokens, "
        f"{path:.0f} steps per 100 tokens of the critical path, {on['drafted']:,} drafted, {accepted:.0f} % accepted; "
        f"time off/on {statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f}), "
        f"of least times {best:.2f}; {same}"
    )


if __name__ == "__main__":
    main()

"""What the profiler's ranges cost while nobody profiles: the engine as it is against itself without them.

    python benchmarks/profile_overhead.py --tasks 4 --rounds 20 --json OUT

"Without" means compiled without: every ``with ....ranges(...):`` is taken out of the source of the functions that have
one. The same solver runs the same recursive jobs in turns: as it is, without ranges, and as it is once more, as a
control that shows what the machine's noise alone does. Quoted are ratios of the medians over the rounds, of the clock's
time and of the process's CPU time, each with a 95 % bootstrap interval over rounds. Below any such noise: what a range
that is off costs in a loop, times how many of them a step has.
"""

import argparse
import ast
import gc
import inspect
import json
import random
import statistics
import sys
import textwrap
import timeit
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter, process_time
from types import ModuleType
from typing import Any

from rrm_engine import RunConfig, Solver
from rrm_engine.backends import job, local
from rrm_engine.backends.result import Job
from rrm_engine.bench.environment import environment
from rrm_engine.bench.tasks import load_tasks
from rrm_engine.engine import engine, runner
from rrm_engine.engine.ranges import Ranges

MODULES = (engine, runner, job, local)
ARMS = ("as is", "without ranges", "as is again")
CLOCKS: dict[str, Callable[[], float]] = {"wall": perf_counter, "cpu": process_time}
RESAMPLES = 10_000
Seconds = dict[str, list[float]]  # by arm
Method = tuple[type, str, Callable[..., Any], Callable[..., Any]]  # class, name, as it is, without ranges


class RangeRemover(ast.NodeTransformer):
    """Puts the body of a ``with`` over ranges in its place."""

    removed = 0

    def visit_With(self, node: ast.With) -> Any:
        self.generic_visit(node)
        if not all(_is_range(item.context_expr) for item in node.items):
            return node
        self.removed += 1
        return node.body


def _is_range(expression: ast.expr) -> bool:
    """``x.ranges(...)`` or ``x.ranges.step(...)``."""
    if not isinstance(expression, ast.Call):
        return False
    return any(isinstance(n, ast.Attribute) and n.attr == "ranges" for n in ast.walk(expression.func))


def methods_without_ranges(modules: Sequence[ModuleType]) -> list[Method]:
    """Every method that opens a range, with a version that does not. Raises RuntimeError if a range is left."""
    found: list[Method] = []
    removed = 0
    for module in modules:
        for owner in (o for o in vars(module).values() if inspect.isclass(o) and o.__module__ == module.__name__):
            for name, method in list(vars(owner).items()):
                if not inspect.isfunction(method) or inspect.unwrap(method).__code__.co_filename != module.__file__:
                    continue  # not written here, but by dataclass or a base class
                remover = RangeRemover()
                tree = remover.visit(ast.parse(textwrap.dedent(inspect.getsource(method))))
                if remover.removed:
                    removed += remover.removed
                    made: dict[str, Any] = {}
                    code = compile(ast.fix_missing_locations(tree), inspect.getfile(method), "exec")
                    exec(code, vars(module), made)  # the module's own globals, so that nothing else differs
                    found.append((owner, name, method, made[name]))
    whole = RangeRemover()
    for module in modules:
        whole.visit(ast.parse(inspect.getsource(module)))
    if removed != whole.removed or not removed:
        raise RuntimeError(f"{whole.removed} ranges are in the source and {removed} of them in methods")
    return found


class Counting(Ranges):
    """Counts ranges instead of making them."""

    opened = 0

    def __call__(self, name: str, of: Any = ()) -> AbstractContextManager[Any]:
        self.opened += 1
        return nullcontext()

    def forward(self, work: Any) -> AbstractContextManager[Any]:
        return self("forward")

    def step(self, number: int) -> AbstractContextManager[Any]:
        return self("step")


def measure(solver: Solver, jobs: list[Job], rounds: int, methods: list[Method]) -> dict[str, Seconds]:
    """Seconds of each arm in each round, after one round that does not count; who begins changes by rounds."""
    seconds: dict[str, Seconds] = {clock: {arm: [] for arm in ARMS} for clock in CLOCKS}
    for turn in range(rounds + 1):
        for arm in (*ARMS[turn % len(ARMS) :], *ARMS[: turn % len(ARMS)]):
            for owner, name, as_is, without in methods:
                setattr(owner, name, without if arm == "without ranges" else as_is)
            gc.collect()
            began = {name: clock() for name, clock in CLOCKS.items()}
            for _ in solver.run(jobs):
                pass
            for name, clock in CLOCKS.items():
                if turn:
                    seconds[name][arm].append(clock() - began[name])
    for owner, name, as_is, _ in methods:
        setattr(owner, name, as_is)
    return seconds


def ratio(above: list[float], below: list[float]) -> dict[str, Any]:
    """The ratio of medians; the interval resamples whole rounds, for the arms of a round share its weather."""
    generator, rounds, found = random.Random(0), range(len(above)), []
    for _ in range(RESAMPLES):
        chosen = generator.choices(rounds, k=len(above))
        found.append(statistics.median([above[i] for i in chosen]) / statistics.median([below[i] for i in chosen]))
    found.sort()
    interval = [found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES)]]
    return {"ratio_of_medians": statistics.median(above) / statistics.median(below), "interval_95": interval}


def alone(solver: Solver, jobs: list[Job]) -> dict[str, float]:
    """A range that is off, by itself: nanoseconds, how many of them a step has, and seconds of steps without them."""
    counting, before = Counting(), solver.engine.steps
    solver.engine.announce_to(counting)
    for _ in solver.run(jobs):
        pass
    solver.engine.announce_to(Ranges())
    steps, ranges, count = solver.engine.steps - before, Ranges(), 200_000

    def opened() -> None:
        with ranges("decode", ()):
            pass

    cost = min(timeit.repeat(opened, number=count, repeat=5, timer=process_time)) / count
    return {"range_ns": 1e9 * cost, "ranges_per_step": counting.opened / steps, "steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=4, help="tasks of the packaged set in a round")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    tasks = load_tasks("embedded").tasks[: args.tasks]
    solver = Solver.load(RunConfig(), [task.problem for task in tasks])
    jobs = [Job(task.id, task.problem, "rrm") for task in tasks]
    methods = methods_without_ranges(MODULES)
    seconds = measure(solver, jobs, args.rounds, methods)
    ratios = {}
    for clock, arms in seconds.items():
        for name, below in (("off / without", "without ranges"), ("off / off (control)", "as is again")):
            ratios[f"{clock}: {name}"] = found = ratio(arms["as is"], arms[below])
            low, high = found["interval_95"]
            print(f"{clock:<5}{name:<20} {found['ratio_of_medians']:.4f}  (95 % interval {low:.4f}-{high:.4f})")
    single = alone(solver, jobs)
    step_us = 1e6 * statistics.median(seconds["cpu"]["without ranges"]) / single["steps"]
    share = single["range_ns"] * single["ranges_per_step"] / 1e3 / step_us
    print(
        f"one range that is off: {single['range_ns']:.0f} ns; {single['ranges_per_step']:.1f} of them in a step of "
        f"{step_us:.0f} us CPU time: {share:.3%} of it"
    )
    result = {
        "command": " ".join(["python", *sys.argv]),
        **environment(),
        "settings": {k: str(v) for k, v in vars(args).items()},
        "removed_from": [f"{owner.__name__}.{name}" for owner, name, *_ in methods],
        "seconds": seconds,
        "ratios": ratios,
        "alone": {**single, "step_us": step_us, "share_of_step": share},
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What the profiler's ranges cost while nothing is profiled: the engine as it is against itself without them.

    python benchmarks/profile_overhead.py --minutes 2 --json OUT

"Without" means compiled without: every ``with ....ranges(...):`` is taken out of the source of the functions that have
one. Three solvers over one loaded model run the same recursive jobs in lockstep, step by step: one as it is, one
without ranges, and one more as it is, as a control that shows what noise alone does. So step n of one is compared with
step n of another, the same work a millisecond later, in CPU time of the process; which goes first is drawn for every
step, and which solver is which changes by rounds, for their memory differs too. Quoted are the median over the rounds
of each round's median ratio, its 95 % bootstrap interval, and the quartiles of single steps. Below any noise: what a
range that is off costs in a loop, times how many of them a step has.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from types import ModuleType
from typing import Any

from begin import flags_first

from rrm_engine.command_line import Parser
from rrm_engine.legible import plural


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=2, help="tasks of the packaged set in a round")
    parser.add_argument("--minutes", type=float, default=2.0, help="rounds are begun until then, three at least")
    parser.add_argument("--json", type=Path, help="where to write the result")
    return parser


if __name__ == "__main__":
    flags_first(build_parser)

from rrm_engine import RunConfig, Solver
from rrm_engine.backends import engine as backend
from rrm_engine.bench.tasks import load_tasks
from rrm_engine.engine import engine, runner
from rrm_engine.engine.ranges import Ranges
from rrm_engine.runs.environment import environment
from rrm_engine.solver import job, loop, reading
from rrm_engine.solver.result import Job

MODULES = (engine, runner, backend, job, reading)
AS_IS, WITHOUT, AGAIN = ARMS = ("as is", "without ranges", "as is again")
RESAMPLES = 10_000
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
    """``x.ranges(...)`` or ``x.ranges.step(...)``, also by the name ``_ranges``."""
    if not isinstance(expression, ast.Call):
        return False
    return any(isinstance(n, ast.Attribute) and n.attr in ("ranges", "_ranges") for n in ast.walk(expression.func))


def methods_without_ranges(modules: Sequence[ModuleType]) -> list[Method]:
    """Every method that opens a range, with a version that does not. Raises RuntimeError if a range is left."""
    return [
        (owner, name, method, _compiled(owner, method, vars(module), remove=True))
        for module in modules
        for owner, name, method in _ranged(module)
    ]


def _ranged(module: ModuleType) -> Iterator[tuple[type, str, Callable[..., Any]]]:
    """The methods of a module that open a range. Raises RuntimeError if a range is anywhere else."""
    removed = 0
    for owner in [o for o in vars(module).values() if inspect.isclass(o) and o.__module__ == module.__name__]:
        for name, method in list(vars(owner).items()):
            if not inspect.isfunction(method) or inspect.unwrap(method).__code__.co_filename != module.__file__:
                continue  # not written here, but by dataclass or a base class
            remover = RangeRemover()
            remover.visit(_source(method))
            removed += remover.removed
            if remover.removed:
                yield owner, name, method
    whole = RangeRemover()
    whole.visit(ast.parse(inspect.getsource(module)))
    if removed != whole.removed or not removed:
        raise RuntimeError(f"{whole.removed} ranges are in {module.__name__} and {removed} of them in methods")


def _source(method: Callable[..., Any]) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(method)))


def _compiled(owner: type, method: Callable[..., Any], names: dict[str, Any], remove: bool) -> Any:
    """``method`` compiled again with ``names`` as its globals."""
    tree = RangeRemover().visit(_source(method)) if remove else _source(method)
    made: dict[str, Any] = {}
    exec(compile(ast.fix_missing_locations(tree), inspect.getfile(owner), "exec"), names, made)
    return made[method.__name__]


def classes_of(arm: str) -> dict[type, type]:
    """By class with ranges a subclass in which they are as they are, or not there.

    The methods are compiled again in either case, so that nothing but the ranges differs, and make instances of these
    classes only: a class that stays as it is keeps the interpreter's caches, one that is changed in turns does not.
    """
    found: dict[type, type] = {}
    globals_of = [dict(vars(module)) for module in MODULES]
    for module, names in zip(MODULES, globals_of, strict=True):
        methods: dict[type, dict[str, Any]] = {}
        for owner, name, method in _ranged(module):
            methods.setdefault(owner, {})[name] = _compiled(owner, method, names, remove=arm == WITHOUT)
        found |= {owner: type(owner.__name__, (owner,), made) for owner, made in methods.items()}
    for names in globals_of:
        names |= {name: found[value] for name, value in names.items() if inspect.isclass(value) and value in found}
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


class Lockstep:
    """Three solvers, each of which can take any arm's part."""

    def __init__(self, tasks: Sequence[str]) -> None:
        first = Solver.load(RunConfig(), tasks)
        self.solvers = [first, *(Solver(first.model, RunConfig(), tasks) for _ in ARMS[1:])]
        self.classes = {arm: classes_of(arm) for arm in ARMS}
        self._parts = [[solver.backend, one, one.runner] for solver in self.solvers for one in solver.engine.engines]
        self._owners = [type(part) for part in self._parts[0]]

    def cast(self, turn: int) -> dict[str, Solver]:
        """Which engine is which arm in a round."""
        cast = {arm: (turn + i) % len(ARMS) for i, arm in enumerate(ARMS)}
        for arm, index in cast.items():
            for part, owner in zip(self._parts[index], self._owners, strict=True):
                part.__class__ = self.classes[arm].get(owner, owner)
        return {arm: self.solvers[index] for arm, index in cast.items()}

    def run(self, jobs: list[Job], turn: int) -> dict[str, list[float]]:
        """One round; CPU seconds of every step by arm."""
        drives = {arm: solver._drive(jobs, None, 1) for arm, solver in self.cast(turn).items()}
        seconds: dict[str, list[float]] = {arm: [] for arm in ARMS}
        noise = random.Random(turn)
        gc.collect()
        gc.disable()
        try:
            ended = 0
            while not ended:
                for arm in noise.sample(ARMS, len(ARMS)):
                    loop.JobRun, job.Reading = (self.classes[arm][c] for c in (job.JobRun, reading.Reading))  # type: ignore
                    began = process_time()
                    ended += next(drives[arm], self) is self
                    seconds[arm].append(process_time() - began)
        finally:
            gc.enable()
        if ended != len(ARMS):
            raise RuntimeError("the solvers did not take the same steps, so they cannot be compared")
        return seconds

    def opened(self, jobs: list[Job]) -> dict[str, int]:
        """Ranges that each arm opens in a round. Raises RuntimeError if the one without opens some."""
        counting = {arm: Counting() for arm in ARMS}
        for arm, solver in self.cast(0).items():
            solver.engine.engines[0].announce_to(counting[arm])
        self.run(jobs, 0)
        for solver in self.solvers:
            solver.engine.engines[0].announce_to(Ranges())
        opened = {arm: count.opened for arm, count in counting.items()}
        if opened[WITHOUT] or not opened[AS_IS] or opened[AS_IS] != opened[AGAIN]:
            raise RuntimeError(f"ranges opened by the arms: {opened}; the one without has to open none")
        return opened


@dataclass(frozen=True, slots=True)
class Compared:
    """``rounds``: each one's median ratio of two arms' CPU times on the same step; ``quartiles`` of single steps."""

    rounds: list[float]
    quartiles: list[float]

    @property
    def ratio(self) -> float:
        return statistics.median(self.rounds)

    @property
    def interval(self) -> list[float]:
        """Of the median over the rounds, 95 %, by bootstrap."""
        noise = random.Random(0)
        some = (noise.choices(self.rounds, k=len(self.rounds)) for _ in range(RESAMPLES))
        found = sorted(map(statistics.median, some))
        return [found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES)]]


def compare(rounds: Sequence[dict[str, list[float]]], above: str, below: str) -> Compared:
    ratios = [[a / b for a, b in zip(one[above], one[below], strict=True)] for one in rounds]
    first, _, third = statistics.quantiles([ratio for one in ratios for ratio in one], n=4)
    return Compared(list(map(statistics.median, ratios)), [first, third])


def range_ns() -> float:
    """CPU time of a range that is off, by itself."""
    ranges, count = Ranges(), 200_000

    def opened() -> None:
        with ranges("decode", ()):
            pass

    return 1e9 * min(timeit.repeat(opened, number=count, repeat=5, timer=process_time)) / count


def main() -> None:
    args = build_parser().parse_args()
    tasks = load_tasks("embedded").tasks[: args.tasks]
    jobs = [Job(task.id, task.problem, "rrm") for task in tasks]
    lockstep = Lockstep([task.problem for task in tasks])
    opened, rounds, began = lockstep.opened(jobs), list[dict[str, list[float]]](), perf_counter()
    while len(rounds) < 3 or perf_counter() - began < 60 * args.minutes:
        rounds.append(lockstep.run(jobs, len(rounds)))
    pairs = {"off / without": (AS_IS, WITHOUT), "off / off (control)": (AS_IS, AGAIN)}
    found = {name: compare(rounds, *arms) for name, arms in pairs.items()}
    steps = len(rounds[0][AS_IS])
    print(f"CPU time of {plural(len(rounds), 'round')} of {plural(steps, 'step')}:")
    for name, compared in found.items():
        (low, high), (first, third) = compared.interval, compared.quartiles
        print(
            f"{name:<20} {compared.ratio:.4f}  (95 % interval {low:.4f}-{high:.4f}; single steps, quartiles "
            f"{first:.3f}-{third:.3f})"
        )
    step_us = 1e6 * statistics.median(s for one in rounds for s in one[WITHOUT])
    per_step, cost = opened[AS_IS] / steps, range_ns()
    share = cost * per_step / 1e3 / step_us
    print(
        f"one range that is off: {cost:.0f} ns; {per_step:.1f} of them in a step of {step_us:.0f} us CPU time: "
        f"{share:.3%} of it"
    )
    result = {
        "command": " ".join(["python", *sys.argv]),
        **environment(),
        "settings": {k: str(v) for k, v in vars(args).items()},
        "removed_from": [f"{owner.__name__}.{name}" for owner, name, *_ in methods_without_ranges(MODULES)],
        "rounds": len(rounds),
        "steps": steps,
        "compared": {
            name: {"ratio": c.ratio, "interval_95": c.interval, "step_quartiles": c.quartiles, "rounds": c.rounds}
            for name, c in found.items()
        },
        "alone": {"range_ns": cost, "ranges_per_step": per_step, "step_us": step_us, "share_of_step": share},
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

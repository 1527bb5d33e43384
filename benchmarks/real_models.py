"""Does recursion pay on a model that was not trained to plan? Direct solving against plans by copying and by reference.

    benchmarks/real_models.py MODEL --tasks gsm8k_composite.jsonl --split dev --limit 4 --out OUT_DIR

TASKS is a .jsonl file of problems that are made of independent questions: problem, answer, ``parts`` (the answers of
the questions, in order) and ``split``. The arms whose names end in ``-drafted`` have ``--draft auto``, ``serial`` is by
reference with one node at a time. Two things are measured, apart from each other:

accuracy    every arm by itself, --concurrency tasks in one batch; also tokens, critical path, activation
time        one task at a time, every arm on the same task before the next one (--timed N: the first N of each size)

--measures takes one of them alone.

Each arm of each measure is a run directory, OUT_DIR/accuracy/<arm> and OUT_DIR/time/<arm>: show, verify and analyze
take them. Rows are written as they come, and the same command goes on with a run that was stopped. With --samples
above 1 samples are drawn at --temperature, and the control is a majority of as many direct samples as cost the same
tokens. At the end the tables are in OUT_DIR/table.md, by number of questions.
"""

import argparse
import contextlib
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from begin import flags_first

from rrm_engine.command_line import Parser
from rrm_engine.errors import RrmError

ARMS: dict[str, dict[str, Any]] = {
    "direct": {"modes": ("direct",)},
    "copying": {"modes": ("rrm",), "prompt_style": "instruct"},
    "reference": {"modes": ("rrm",), "prompt_style": "by-reference"},
}
DRAFTED = {f"{name}-drafted": {**settings, "draft": "auto"} for name, settings in ARMS.items()}
ARMS = {name: {**settings, "draft": "off"} for name, settings in ARMS.items()} | DRAFTED
ARMS["serial"] = {**ARMS["reference"], "max_concurrency": 1}
MEASURES = ("accuracy", "time")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="as the bench's --model")
    parser.add_argument("--tasks", type=Path, required=True, metavar="FILE")
    parser.add_argument("--split", default="dev", help="of the tasks (default: dev)")
    parser.add_argument("--sizes", default="1,2,3,4,6", help="numbers of questions (default: 1,2,3,4,6)")
    parser.add_argument("--limit", type=int, metavar="N", help="tasks of each size")
    parser.add_argument("--modes", default="direct,reference", help=f"of {', '.join(ARMS)} (default: direct,reference)")
    parser.add_argument("--samples", type=int, default=1, help="of each task and arm; 1 is greedy")
    parser.add_argument("--temperature", type=float, default=0.7, help="of several samples (default: 0.7)")
    parser.add_argument("--concurrency", type=int, default=16, help="tasks in one batch (default: 16)")
    parser.add_argument("--measures", default="accuracy,time", help="what to measure (default: accuracy,time)")
    parser.add_argument(
        "--timed", type=int, default=1, metavar="N", help="tasks of each size that are timed (default: 1)"
    )
    parser.add_argument("--max-tokens", type=int, default=1800, help="of a solve (default: 1800)")
    parser.add_argument("--kv-blocks", type=int, default=4000, help="of each arm's pool (default: 4000)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    return parser


if __name__ == "__main__":
    flags_first(build_parser, "scipy")

from rich.console import Console

from rrm_engine.backends.local import Solver
from rrm_engine.bench.cli import manifest_of
from rrm_engine.bench.grading import grade
from rrm_engine.bench.progress import SilentDisplay
from rrm_engine.bench.run import execute, plan
from rrm_engine.bench.summary import wilson
from rrm_engine.bench.tasks import Task, TaskSet
from rrm_engine.config import RunConfig
from rrm_engine.loading.prepare import LoadedModel, load_model
from rrm_engine.protocol.asked import value_of
from rrm_engine.protocol.style import final_of
from rrm_engine.runs.directory import RunDir
from rrm_engine.runs.events import Cancelled, Concluded
from rrm_engine.runs.reader import RecordedJob, read_jobs
from rrm_engine.solver.result import Job

Figures = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Composite:
    """A problem of several independent questions."""

    task: Task
    parts: tuple[str, ...]

    @property
    def size(self) -> int:
        return len(self.parts)


def load_composites(args: argparse.Namespace) -> list[Composite]:
    """Those asked for, sizes in turn, so that a run that is stopped has some of each."""
    by_size: dict[int, list[Composite]] = defaultdict(list)
    for line in args.tasks.read_text(encoding="utf-8").splitlines():
        data = json.loads(line)
        if data["split"] == args.split:
            parts = tuple(map(str, data["parts"]))
            by_size[len(parts)].append(Composite(Task(data["id"], data["problem"], str(data["answer"])), parts))
    chosen = [by_size[int(size)][: args.limit] for size in args.sizes.split(",")]
    found = [of_size[i] for i in range(max(map(len, chosen))) for of_size in chosen if i < len(of_size)]
    if not found:
        raise RrmError(f"{args.tasks} has no tasks of the split {args.split}: give another --split or --sizes")
    return found


def config_of(arm: str, args: argparse.Namespace) -> RunConfig:
    """The settings of an arm: all arms have the same but for those in ``ARMS``."""
    common: dict[str, Any] = {
        "model": args.model,
        "dtype": args.dtype,
        "device": args.device,
        "seed": args.seed,
        "samples": args.samples,
        "temperature": args.temperature if args.samples > 1 else 0.0,
        "repetition_penalty": 1.0,
        "kv_blocks": args.kv_blocks,
        "direct_max_tokens": args.max_tokens,
        "solver_max_tokens": args.max_tokens,
        "continuation_max_tokens": min(args.max_tokens, 512),
    }
    return RunConfig(**{**common, **ARMS[arm]})


class Measured:
    """One arm of one measure: its solver and its run directory, opened anew or where it was left."""

    def __init__(self, model: LoadedModel, arm: str, folder: Path, tasks: Sequence[Task], args: argparse.Namespace):
        self.arm, self.tasks = arm, tasks
        one_by_one = folder.name == "time"
        config = config_of(arm, args)
        concurrency = 1 if one_by_one else args.concurrency
        config = RunConfig(**{**asdict(config), "task_concurrency": concurrency})
        self.solver = Solver(model, config, [task.problem for task in tasks])
        path = folder / arm
        if (path / "run.json").exists():
            self.directory = RunDir.resume(path)
            _refuse_others(self.directory, config)
        else:
            self.directory = RunDir.create(path)
            file = str(args.tasks.resolve())
            manifest = manifest_of(config, TaskSet(args.tasks.stem, file, tuple(tasks)), self.solver)
            self.directory.write_manifest(replace(manifest, command=shlex.join(["python", *sys.argv])))
        self.jobs = plan(tasks, config, self.directory.rows)

    def run(self, jobs: Sequence[Job]) -> None:
        execute(self.solver, jobs, self.tasks, self.directory, SilentDisplay())

    def close(self) -> None:
        self.directory.close()
        self.solver.close()


def _refuse_others(directory: RunDir, config: RunConfig) -> None:
    """Go on with the same settings or not at all; how many tasks there are may differ."""
    before, now = directory.manifest.settings, asdict(config)
    changed = [name for name in now if json.dumps(before.get(name)) != json.dumps(now[name])]
    if changed:
        raise RrmError(f"{directory.path} was measured with another {', '.join(changed)}: give another --out")


def measure(args: argparse.Namespace, composites: Sequence[Composite], arms: Sequence[str], console: Console) -> None:
    """All rows that are missing, accuracy first."""
    model = load_model(args.model, args.dtype, args.device, "auto")
    if "accuracy" in args.measures:
        measure_accuracy(model, args, [one.task for one in composites], arms, console)
    if "time" in args.measures:
        timed = [task for size in {c.size: 0 for c in composites} for task in _first(composites, size, args.timed)]
        measure_time(model, args, timed, arms, console)


def measure_accuracy(
    model: LoadedModel, args: argparse.Namespace, tasks: Sequence[Task], arms: Sequence[str], console: Console
) -> None:
    """Every arm by itself, many tasks in one batch."""
    for arm in arms:
        with contextlib.closing(Measured(model, arm, args.out / "accuracy", tasks, args)) as measured:
            console.print(f"accuracy, {arm}: {len(measured.jobs)} to run")
            measured.run(measured.jobs)


def measure_time(
    model: LoadedModel, args: argparse.Namespace, timed: Sequence[Task], arms: Sequence[str], console: Console
) -> None:
    """One task at a time, all arms on it before the next; who goes first changes from task to task."""
    with contextlib.ExitStack() as stack:
        closing = (contextlib.closing(Measured(model, arm, args.out / "time", timed, args)) for arm in arms)
        running = [stack.enter_context(one) for one in closing]
        for turn, task in enumerate(timed):
            console.print(f"time, {task.id}")
            for one in running if turn % 2 == 0 else running[::-1]:
                one.run([job for job in one.jobs if job.id == task.id][:1])


def _first(composites: Sequence[Composite], size: int, count: int) -> list[Task]:
    return [one.task for one in composites if one.size == size][:count]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished job. ``found`` counts its problem's parts that it had right: those that a child concluded with, or, of
    one that did not split, whose number stands in the text. ``useless`` nodes failed or were given up.
    """

    job: RecordedJob
    row: dict[str, Any]
    composite: Composite
    found: int
    useless: int


def outcomes(folder: Path, composites: Iterable[Composite]) -> Iterator[Outcome]:
    known = {one.task.id: one for one in composites}
    for job in read_jobs(folder, tokens=False):
        row = job.row
        if row is None or row["id"] not in known:
            continue
        composite = known[row["id"]]
        children = [e for e in job.events if isinstance(e, Concluded | Cancelled) and e.node.startswith("root.")]
        answers = [e.answer for e in children if isinstance(e, Concluded) and e.ok]
        split = row["status"] == "graph"
        texts = answers if split else [e.answer for e in job.events if isinstance(e, Concluded)]
        yield Outcome(job, row, composite, _found(composite.parts, texts, split), len(children) - len(answers))


def _found(parts: Sequence[str], texts: Sequence[str], split: bool) -> int:
    if not split:
        numbers = " ".join(texts).replace(",", "").replace("$", " ")
        words = {word.strip(".,;:()[]{}*\\") for word in numbers.replace("{", " ").replace("}", " ").split()}
        return sum(part in words for part in parts)
    left = list(texts)
    count = 0
    for part in parts:
        match = next((text for text in left if grade(text, part) or grade(value_of(final_of(text)), part)), None)
        if match is not None:
            left.remove(match)
            count += 1
    return count


def figures(found: Sequence[Outcome]) -> Figures:
    """Of one arm and size."""
    rows = [one.row for one in found]
    right = sum(bool(row["correct"]) for row in rows)
    all_parts = [one for one in found if one.found == one.composite.size]
    return {
        "n": len(rows),
        "right": right,
        "accuracy_ci95": wilson(right, len(rows)),
        "parts": [sum(one.found for one in found), sum(one.composite.size for one in found)],
        "sums": [sum(bool(one.row["correct"]) for one in all_parts), len(all_parts)],
        "critical_path_tokens": median(row["critical_path_tokens"] for row in rows),
        "critical_path_steps": median(row["critical_path_steps"] for row in rows),
        "total_tokens": mean(row["total_tokens"] for row in rows),
        "latency_s": median(row["latency_s"] for row in rows),
        "activated": sum(row["status"] == "graph" for row in rows),
        "nodes": mean(row["nodes"] for row in rows),
        "useless_nodes": sum(one.useless for one in found),
    }


def tables(args: argparse.Namespace, composites: Sequence[Composite], arms: Sequence[str]) -> tuple[str, Figures]:
    """As markdown, and the figures in it."""
    found: Figures = {}
    lines = []
    for name, rows_of in zip(MEASURES, (_accuracy_row, _time_row), strict=True):
        result = {arm: list(outcomes(args.out / name / arm, composites)) for arm in arms if _is_run(args, name, arm)}
        if not result:
            continue
        by_size = {
            size: {arm: figures(own) for arm, all_ in result.items() if (own := _of_size(all_, size))}
            for size in sorted({one.size for one in composites})
        }
        found[name] = by_size
        lines += _table(name, by_size, rows_of)
    return "\n".join(lines), found


def _is_run(args: argparse.Namespace, measure: str, arm: str) -> bool:
    return (args.out / measure / arm / "run.json").exists()


def _of_size(found: Sequence[Outcome], size: int) -> list[Outcome]:
    return [one for one in found if one.composite.size == size]


ACCURACY = (
    "questions",
    "arm",
    "right",
    "95 %",
    "parts right",
    "sums right",
    "critical path",
    "in steps",
    "tokens",
    "split",
    "useless",
)
TIME = ("questions", "arm", "tasks", "time to answer", "against direct", "critical path", "against direct")


def _table(name: str, by_size: dict[int, Figures], row: Any) -> list[str]:
    head = ACCURACY if name == "accuracy" else TIME
    lines = [f"## {name.capitalize()}", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for size, by_arm in by_size.items():
        lines += [f"| {size} | {arm} | {' | '.join(row(own, by_arm.get('direct')))} |" for arm, own in by_arm.items()]
    return [*lines, ""]


def _accuracy_row(own: Figures, direct: Figures | None) -> list[str]:
    low, high = own["accuracy_ci95"]
    return [
        f"{own['right']}/{own['n']}",
        f"{low:.0%}-{high:.0%}",
        f"{own['parts'][0]}/{own['parts'][1]}",
        f"{own['sums'][0]}/{own['sums'][1]}",
        f"{own['critical_path_tokens']:.0f}",
        f"{own['critical_path_steps']:.0f}",
        f"{own['total_tokens']:.0f}",
        f"{own['activated']}/{own['n']}",
        str(own["useless_nodes"]),
    ]


def _time_row(own: Figures, direct: Figures | None) -> list[str]:
    def against(name: str) -> str:
        return f"{direct[name] / own[name]:.2f}x" if direct and own[name] else "-"

    time, path = f"{own['latency_s']:.1f} s", f"{own['critical_path_tokens']:.0f}"
    return [str(own["n"]), time, against("latency_s"), path, against("critical_path_tokens")]


def majority(args: argparse.Namespace, arm: str) -> str:
    """A sentence on direct samples that cost as much as those of ``arm``, of which the majority counts."""
    from rrm_engine.analyze.controls import controls
    from rrm_engine.runs.arms import Arm, read_runs

    found = controls(Arm(read_runs([args.out / "accuracy" / name for name in ("direct", arm)])))
    if found is None:
        return ""
    same = found["matched_tokens"]
    return (
        f"Majority of direct samples at the tokens of {arm}: {same['accuracy']:.0%} right, {arm} "
        f"{same['recursive_same_problems']:.0%} on the same tasks.\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    arms = [arm.strip() for arm in args.modes.split(",")]
    if unknown := [arm for arm in arms if arm not in ARMS]:
        parser.error(f"--modes: there is no {', '.join(unknown)}, only {', '.join(ARMS)}")
    args.measures = [measure.strip() for measure in args.measures.split(",")]
    if unknown := [name for name in args.measures if name not in MEASURES]:
        parser.error(f"--measures: there is no {', '.join(unknown)}, only {', '.join(MEASURES)}")
    console = Console()
    try:
        composites = load_composites(args)
        measure(args, composites, arms, console)
        text, found = tables(args, composites, arms)
        if args.samples > 1 and "direct" in arms:
            text += "\n".join(majority(args, arm) for arm in arms if arm != "direct")
    except (RrmError, OSError, KeyError, ValueError) as error:
        parser.error(f"{error.args[0] if isinstance(error, RrmError) else repr(error)}")
    (args.out / "table.md").write_text(text + "\n", encoding="utf-8")
    (args.out / "result.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console.print(text, markup=False)


if __name__ == "__main__":
    main()

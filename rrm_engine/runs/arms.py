"""Runs as arms: what was run under one set of settings is taken together, whatever directories it lies in.

Two runs are one arm if they have the same tasks and the same settings but for seed, share of the tasks and modes, and
no row in common. So the shards of one task set become one arm, runs of other seeds are further samples of it, and a run
that was made twice is two arms that can be compared.

Recursive rows are compared with direct ones of the same problems: their own arm's, or, where it has none, those of the
arm that is most like it. What that one was run with otherwise is said wherever the comparison is.
"""

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from rrm_engine.command import say
from rrm_engine.errors import RrmError
from rrm_engine.legible import legible, spelled
from rrm_engine.runs.manifest import Manifest, read_manifest
from rrm_engine.runs.reader import RunTrace, chosen_jobs, read_rows, read_run
from rrm_engine.runs.rows import Row, row_key
from rrm_engine.runs.trust import DIRECT, RECURSIVE, Trust, trust

MAY_DIFFER = ("seed", "limit", "shard", "modes")  # within an arm
NAMED = 3  # settings in an arm's name
TELLING = ("model", "dtype", "device", "backend")  # where these differ, times and answers say nothing of recursion

Problem = tuple[str, str]  # id and task: two task sets may use one id for different ones
Draw = tuple[int, int]  # the run's seed and the sample
Difference = tuple[Any, Any]  # of a setting: what one arm has, what the other


@dataclass(frozen=True)
class Run:
    """A run's directory as it was recorded; of its jobs those named in ``jobs`` (none: all).

    ``tokens``: its trace has the ids of the tokens.
    """

    path: Path
    manifest: Manifest
    rows: tuple[Row, ...] = ()
    jobs: tuple[str, ...] = ()
    tokens: bool = False

    @cached_property
    def trace(self) -> RunTrace:
        """The events of its jobs, read when they are first asked for. Raises RunError."""
        return read_run(self.path, self.jobs, tokens=self.tokens)

    @property
    def seed(self) -> int:
        return self.manifest.seed

    @property
    def settings(self) -> dict[str, Any]:
        """As asked for, with the model, dtype and device that came of it."""
        used = self.manifest.resolved
        asked = {name: value for name, value in self.manifest.settings.items() if name not in MAY_DIFFER}
        return {**asked, **{name: used.get(name) for name in ("model", "dtype", "device", "prompt_style")}}

    @property
    def tasks(self) -> str:
        """The hash of its task set."""
        return self.manifest.tasks.sha256

    @property
    def origin(self) -> dict[str, Any]:
        """What it ran on and with, as far as times depend on it."""
        hardware, versions, git = self.manifest.hardware, self.manifest.versions, self.manifest.git or {}
        return {
            "cpu": hardware.get("cpu"),
            "cores": hardware.get("cores"),
            "gpus": gpus_of(hardware),
            "torch": versions.get("torch"),
            "commit": git.get("commit"),
        }


@dataclass(frozen=True, slots=True)
class Sample:
    """A row in its arm."""

    row: Row
    run: Run

    @property
    def task(self) -> str:
        """What was asked; old rows have only its beginning."""
        return str(self.row.get("task", self.row["prompt_preview"]))

    @property
    def problem(self) -> Problem:
        return self.row["id"], self.task

    @property
    def mode(self) -> str:
        return str(self.row["mode"])

    @property
    def draw(self) -> Draw:
        return self.run.seed, self.row["sample"]


@dataclass(slots=True)
class Arm:
    """The samples of one set of settings. ``settings`` are those by which it differs from the other arms.

    ``lender`` is the arm whose direct samples its recursive ones are compared with, if not its own.
    """

    runs: list[Run]
    name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    lender: "Arm | None" = None

    @property
    def samples(self) -> list[Sample]:
        return [Sample(row, run) for run in self.runs for row in run.rows]

    def of_mode(self, mode: str) -> list[Sample]:
        return [sample for sample in self.samples if sample.mode == mode]

    @property
    def modes(self) -> list[str]:
        there = {sample.mode for sample in self.samples}
        return [mode for mode in (DIRECT, RECURSIVE) if mode in there]

    @property
    def direct(self) -> list[Sample]:
        """The direct samples that its recursive ones are compared with."""
        return (self.lender or self).of_mode(DIRECT)

    @property
    def paired(self) -> list[tuple[Sample, Sample]]:
        """Direct and recursive samples of the same problem: see `matched`."""
        return matched(self.direct, self.of_mode(RECURSIVE))

    @property
    def trusted(self) -> list[tuple[Sample, Trust]]:
        """Every sample with its label."""
        direct, unlike = {id(second.row): first.row for first, second in self.paired}, self.unlike
        return [(s, trust(s.row, direct.get(id(s.row)), unlike)) for s in self.samples]

    @property
    def differences(self) -> dict[str, Difference]:
        """What the direct samples were run with, and what the recursive ones, where these are not the same."""
        found = differences(self.lender, self) if self.lender else {}
        seeds = [(first.run.seed, second.run.seed) for first, second in self.paired]
        other = next((both for both in seeds if both[0] != both[1]), None)
        return found | ({"seed": other} if other else {})

    @property
    def unlike(self) -> list[str]:
        """Of the differences those that keep its pairs from showing what recursion gains."""
        return [name for name in self.differences if name in TELLING]

    @property
    def compared_with(self) -> str | None:
        """What its recursive samples are compared with, in words; None if that goes without saying."""
        found = self.differences
        if self.lender is None and not found:
            return None
        told = [legible(f"{name.replace('_', '-')} {one} (here {own})") for name, (one, own) in found.items()]
        whose = f"the direct rows of {self.lender.name}" if self.lender else "direct rows of another draw"
        return f"compared with {whose}: {', '.join(told) or 'the same settings'}"

    @property
    def cautions(self) -> list[str]:
        """What should be the same in its runs and is not."""
        found = []
        for name in self.runs[0].origin:
            values = {json.dumps(run.origin[name]) for run in self.runs}
            if len(values) > 1:
                found.append(f"its runs differ in {name}: {', '.join(sorted(values))}")
        return found


def gpus_of(hardware: dict[str, Any]) -> list[Any]:
    """The names of the GPUs that a manifest tells of."""
    told = hardware.get("gpus")
    return [gpu.get("name") for gpu in told if isinstance(gpu, dict)] if isinstance(told, list) else []


def read_runs(paths: Iterable[Path], jobs: Collection[str] = (), *, tokens: bool = False) -> list[Run]:
    """As `runs_in`, but for those that have no row yet, of which the user is told. Raises RrmError where none has."""
    runs = runs_in(paths, jobs, tokens=tokens)
    found = [run for run in runs if run.rows]
    if not found:
        raise RrmError(f"{runs[0].path} has no finished row to analyse yet")
    for run in runs:
        if not run.rows:
            say(f"{spelled(str(run.path))} has no finished row yet and is left out.")
    return found


def runs_in(paths: Iterable[Path], jobs: Collection[str] = (), *, tokens: bool = False) -> list[Run]:
    """The runs in the directories, each once; also those that have no row yet. Raises RunError where there is none.

    Of the jobs named, if any are (``id/mode/sample``, ``id/mode`` or ``id``), those runs that have a row of one.
    """
    once = {path.resolve(): path for path in paths}
    runs = [Run(path, read_manifest(path), tuple(read_rows(path)), tokens=tokens) for path in once.values()]
    if not jobs:
        return runs
    chosen = chosen_jobs((row_key(row) for run in runs for row in run.rows), jobs)
    chosen_of = [replace(run, rows=tuple(row for row in run.rows if row_key(row) in chosen)) for run in runs]
    return [replace(run, jobs=tuple(map(row_key, run.rows))) for run in chosen_of if run.rows]


def arms(runs: Sequence[Run]) -> list[Arm]:
    """The arms that the runs make, named by what tells them apart, in the order of the runs."""
    found: list[Arm] = []
    for run in runs:
        arm = next((arm for arm in found if _belongs(run, arm)), None)
        if arm is None:
            found.append(Arm([run]))
        else:
            arm.runs.append(run)
    _name(found)
    for arm in found:
        if arm.of_mode(RECURSIVE) and not arm.paired:
            arm.lender = _lender(arm, found)
    return found


def matched(first: Sequence[Sample], second: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Samples of the same problems: those of the same seed and number, else, if none is, in the order of these."""
    one, other = _by_problem(first), _by_problem(second)
    same_draws = any(set(one[problem]) & set(other[problem]) for problem in one.keys() & other.keys())
    pairs: list[tuple[Sample, Sample]] = []
    for problem in one:
        left, right = one[problem], other.get(problem, {})
        if same_draws:
            pairs += [(left[draw], right[draw]) for draw in left if draw in right]
        else:
            pairs += zip((left[d] for d in sorted(left)), (right[d] for d in sorted(right)), strict=False)
    return pairs


def differences(one: Arm, other: Arm) -> dict[str, Difference]:
    """Settings, and the task set's name, by which two arms differ."""
    first, second = _settings(one), _settings(other)
    names = dict.fromkeys((*first, *second))
    return {name: (first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)}


def _by_problem(samples: Iterable[Sample]) -> dict[Problem, dict[Draw, Sample]]:
    found: dict[Problem, dict[Draw, Sample]] = defaultdict(dict)
    for sample in samples:
        found[sample.problem][sample.draw] = sample
    return found


def _lender(arm: Arm, others: Iterable[Arm]) -> Arm | None:
    """The arm that has direct samples of its problems and is most like it; of equals the one with most of them."""
    recursive = arm.of_mode(RECURSIVE)

    def unlikeness(other: Arm) -> tuple[int, int, int]:
        differing = differences(other, arm)
        telling = sum(name in differing for name in TELLING)
        return telling, -len(matched(other.of_mode(DIRECT), recursive)), len(differing)

    fit = [other for other in others if other is not arm and matched(other.of_mode(DIRECT), recursive)]
    return min(fit, key=unlikeness, default=None)


def _settings(arm: Arm) -> dict[str, Any]:
    return {"tasks": arm.runs[0].manifest.tasks.name, **arm.runs[0].settings}


def _belongs(run: Run, arm: Arm) -> bool:
    first = arm.runs[0]
    if run.tasks != first.tasks or run.settings != first.settings:
        return False
    return not _keys(run) & {key for other in arm.runs for key in _keys(other)}


def _keys(run: Run) -> set[tuple[Any, ...]]:
    return {(row["id"], row["mode"], run.seed, row["sample"]) for row in run.rows}


def _name(found: list[Arm]) -> None:
    """By the settings that differ; by the directory where those are many, or none."""
    settings = list(map(_settings, found))
    names = dict.fromkeys(name for one in settings for name in one)
    models = {str(one["model"]) for one in settings}
    short = len({Path(model).name for model in models}) == len(models)
    differing = [name for name in names if len({json.dumps(one.get(name)) for one in settings}) > 1]
    for arm, one in zip(found, settings, strict=True):
        arm.settings = {name: one.get(name) for name in differing}
        said = ", ".join(legible(_said(name, one.get(name), short)) for name in differing)
        arm.name = said if 0 < len(differing) <= NAMED else legible(arm.runs[0].path.name)
    if len(found) == 1:
        found[0].name = legible(Path(str(settings[0]["model"])).name)
    for places in (lambda path: path.name, str):
        if len({arm.name for arm in found}) < len(found):
            for arm in found:
                arm.name = legible(places(arm.runs[0].path))


def _said(name: str, value: Any, short: bool) -> str:
    """A setting in an arm's name; ``short``: the models' last names tell them apart."""
    if name == "model":
        return Path(str(value)).name if short else str(value)
    if name == "tasks":
        return str(value)
    return f"{name.replace('_', '-')} {value}"

"""Runs as arms: what was run under one set of settings is taken together, whatever directories it lies in.

Two runs are one arm if they have the same tasks and the same settings but for seed, share of the tasks and modes, and
no row in common. So the shards of one task set become one arm, runs of other seeds are further samples of it, and a run
that was made twice is two arms that can be compared.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rrm_engine.errors import RrmError
from rrm_engine.legible import legible
from rrm_engine.runs.manifest import Manifest, read_manifest
from rrm_engine.runs.reader import read_rows
from rrm_engine.runs.rows import Row
from rrm_engine.runs.trust import DIRECT, RECURSIVE, Trust, trust

MAY_DIFFER = ("seed", "limit", "shard", "modes")  # within an arm
NAMED = 3  # settings in an arm's name

Problem = tuple[str, str]  # id and task: two task sets may use one id for different ones
Draw = tuple[int, int]  # the run's seed and the sample


@dataclass(frozen=True, slots=True)
class Run:
    """A run's directory as it was recorded."""

    path: Path
    manifest: Manifest
    rows: tuple[Row, ...] = ()

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
            "gpus": [gpu.get("name") for gpu in hardware.get("gpus") or ()],
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
    """The samples of one set of settings. ``settings`` are those by which it differs from the other arms."""

    runs: list[Run]
    name: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

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
    def paired(self) -> list[tuple[Sample, Sample]]:
        """Direct and recursive samples of the same problem, seed and sample number."""
        direct = {(s.problem, s.draw): s for s in self.of_mode(DIRECT)}
        return [(direct[key], s) for s in self.of_mode(RECURSIVE) if (key := (s.problem, s.draw)) in direct]

    @property
    def trusted(self) -> list[tuple[Sample, Trust]]:
        """Every sample with its label."""
        direct = {(s.problem, s.draw): s.row for s in self.of_mode(DIRECT)}
        return [(s, trust(s.row, direct.get((s.problem, s.draw)))) for s in self.samples]

    @property
    def cautions(self) -> list[str]:
        """What should be the same in its runs and is not."""
        found = []
        for name in self.runs[0].origin:
            values = {json.dumps(run.origin[name]) for run in self.runs}
            if len(values) > 1:
                found.append(f"its runs differ in {name}: {', '.join(sorted(values))}")
        return found


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """As `runs_in`. Raises RrmError for a run without a row."""
    runs = runs_in(paths)
    for run in runs:
        if not run.rows:
            raise RrmError(f"{run.path} has no finished row to analyse yet")
    return runs


def runs_in(paths: Iterable[Path]) -> list[Run]:
    """The runs in the directories, each once; also those that have no row yet. Raises RunError where there is none."""
    once = {path.resolve(): path for path in paths}
    return [Run(path, read_manifest(path), tuple(read_rows(path))) for path in once.values()]


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
    return found


def _belongs(run: Run, arm: Arm) -> bool:
    first = arm.runs[0]
    if run.tasks != first.tasks or run.settings != first.settings:
        return False
    return not _keys(run) & {key for other in arm.runs for key in _keys(other)}


def _keys(run: Run) -> set[tuple[Any, ...]]:
    return {(row["id"], row["mode"], run.seed, row["sample"]) for row in run.rows}


def _name(found: list[Arm]) -> None:
    """By the settings that differ; by the directory where those are many, or none."""
    settings = [{"tasks": arm.runs[0].manifest.tasks.name, **arm.runs[0].settings} for arm in found]
    names = dict.fromkeys(name for one in settings for name in one)
    differing = [name for name in names if len({json.dumps(one.get(name)) for one in settings}) > 1]
    for arm, one in zip(found, settings, strict=True):
        arm.settings = {name: one.get(name) for name in differing}
        said = ", ".join(legible(_said(name, one.get(name))) for name in differing)
        arm.name = said if 0 < len(differing) <= NAMED else legible(arm.runs[0].path.name)
    if len(found) == 1:
        found[0].name = legible(Path(str(settings[0]["model"])).name)
    for places in (lambda path: path.name, str):
        if len({arm.name for arm in found}) < len(found):
            for arm in found:
                arm.name = legible(places(arm.runs[0].path))


def _said(name: str, value: Any) -> str:
    if name == "model":
        return Path(str(value)).name
    if name == "tasks":
        return str(value)
    return f"{name.replace('_', '-')} {value}"

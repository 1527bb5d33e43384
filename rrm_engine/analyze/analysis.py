"""The whole analysis as one plain document: what analysis.json holds."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from math import isfinite
from typing import Any

from rrm_engine.analyze import batch, contrast, controls, figures
from rrm_engine.bench.summary import kv_figures
from rrm_engine.runs.arms import Arm, Run, Sample, matched
from rrm_engine.runs.trust import RECURSIVE, Trust

FORMAT = 1
OF_ROWS = (  # what rows.csv says of a row besides its names and its label
    "correct",
    "status",
    "latency_s",
    "ttft_s",
    "critical_path_tokens",
    "critical_path_steps",
    "total_tokens",
    "nodes",
    "max_depth",
    "max_sibling_width",
    "overlap_s",
    "parallel_s",
    "resumes",
    "preemptions",
    "spliced_tokens",
    "error",
)


def analyse(arms: Sequence[Arm]) -> dict[str, Any]:
    """Everything that is said of the arms, each alone and each two of them."""
    return {
        "format": FORMAT,
        "arms": [arm_figures(arm) for arm in arms],
        "comparisons": [comparison(one, other) for one, other in combinations(arms, 2)],
        "rows": [row for arm in arms for row in labelled(arm)],
        "formulas": {**figures.FORMULAS, **contrast.FORMULAS, **controls.FORMULAS, **batch.FORMULAS},
    }


def arm_figures(arm: Arm) -> dict[str, Any]:
    """One arm."""
    trusted = arm.trusted
    return {
        "name": arm.name,
        "settings": arm.settings,
        "runs": [about_run(run) for run in arm.runs],
        "cautions": arm.cautions,
        "drafted": drafted(arm),
        "modes": {mode: figures.mode_figures(arm.of_mode(mode)) for mode in arm.modes},
        "direct_of": arm.lender.name if arm.lender else None,
        "compared_with": arm.compared_with,
        "direct_and_recursive": contrast.direct_and_recursive(arm),
        "shape": figures.shape(arm.of_mode(RECURSIVE)),
        "controls": controls.controls(arm),
        "labels": {mode: _labels(trusted, mode) for mode in arm.modes},
        "marks": {mode: _marks(trusted, mode) for mode in arm.modes},
        "batch": batch.batch_figures(arm),
        "servers": figures.servers(arm.samples),
        "kv": kv_figures([sample.row for sample in arm.samples]),
    }


def drafted(arm: Arm) -> bool:
    """Whether steps gave several tokens; else the critical path in steps is the one in tokens."""
    return any(row.get("accepted") for row in (sample.row for sample in arm.samples))


def about_run(run: Run) -> dict[str, Any]:
    """Where a run's figures come from."""
    solver = run.manifest.solver
    return {
        "path": str(run.path),
        "rows": len(run.rows),
        "model": run.settings["model"],
        "parameters": solver.get("parameters"),
        "dtype": run.settings["dtype"],
        "device": run.settings["device"],
        "seed": run.seed,
        "tasks": run.manifest.tasks.name,
        "started": run.manifest.started,
        "command": run.manifest.command,
        **run.origin,
    }


def comparison(one: Arm, other: Arm) -> dict[str, Any]:
    """Two arms on the same problems, by mode: first is ``one``, second is ``other``. ``lent``: the direct rows of one
    are also those that the other's recursive ones are compared with."""
    both = [mode for mode in one.modes if mode in other.modes]
    pairs = {mode: matched(one.of_mode(mode), other.of_mode(mode)) for mode in both}
    return {
        "first": one.name,
        "second": other.name,
        "lent": one.lender is other or other.lender is one,
        "drafted": drafted(one) or drafted(other),
        "modes": {mode: contrast.contrast(found) for mode, found in pairs.items()},
    }


def labelled(arm: Arm) -> list[dict[str, Any]]:
    """Every row with its label and the reason for it."""
    return [
        {
            "arm": arm.name,
            "run": str(sample.run.path),
            "id": sample.row["id"],
            "mode": sample.mode,
            "seed": sample.run.seed,
            "sample": sample.row["sample"],
            "label": str(found.label),
            "marks": list(map(str, found.marks)),
            "reason": found.reason,
            **{name: _finite(sample.row.get(name)) for name in OF_ROWS},
        }
        for sample, found in arm.trusted
    ]


def _finite(value: Any) -> Any:
    """``value``; None for a number that JSON lacks."""
    return None if isinstance(value, float) and not isfinite(value) else value


def _labels(trusted: Sequence[tuple[Sample, Trust]], mode: str) -> dict[str, int]:
    return dict(Counter(str(found.label) for sample, found in trusted if sample.mode == mode).most_common())


def _marks(trusted: Sequence[tuple[Sample, Trust]], mode: str) -> dict[str, int]:
    marks = Counter(str(mark) for sample, found in trusted if sample.mode == mode for mark in found.marks)
    return dict(marks.most_common())

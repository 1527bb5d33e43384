"""Two sides on the same problems: which is right where, and how their times and tokens compare.

The sides are direct and recursive rows of one arm, or the rows of two arms.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from math import fsum
from typing import Any

from rrm_engine.analyze.statistics import (
    geometric_mean_of_samples,
    interval,
    mcnemar,
    mean_of_problems,
    median_of_samples,
    ratio_of_sums,
    table,
)
from rrm_engine.legible import plural
from rrm_engine.runs.arms import Arm, Sample
from rrm_engine.runs.rows import Row
from rrm_engine.runs.trust import has_time, is_headline

Pair = tuple[Sample, Sample]

QUANTITIES = {  # of a row, and what their ratio is called
    "latency_s": "time to answer",
    "critical_path_tokens": "critical path, tokens",
    "critical_path_steps": "critical path, steps",
    "total_tokens": "total tokens",
}
FORMULAS = {
    "median": "median over pairs of first / second",
    "geometric_mean": "exp(mean over pairs of log(first / second))",
    "of_sums": "sum of first / sum of second",
    "tokens_per_s_ratio": "(sum of second's total_tokens / sum of its latency_s) / (the same of first)",
    "accuracy_difference": "mean over problems of (share right in second - share right in first)",
    "mcnemar_p": "exact two-sided McNemar test over pairs, both graded",
    "ci95": "percentile bootstrap, 2000 draws of whole problems",
}


def direct_and_recursive(arm: Arm) -> dict[str, Any]:
    """An arm's recursive rows against its direct ones: first is direct, second is recursive."""
    pairs, unlike = arm.paired, arm.unlike
    return {
        "all": contrast(pairs),
        "headline": contrast([pair for pair in pairs if is_headline(pair[0].row, pair[1].row, unlike)]),
        "atomic": contrast([pair for pair in pairs if pair[1].row["status"] == "atomic"]),
    }


def contrast(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Verdicts, times and tokens of pairs. Ratios are over pairs of whole runs with a time (``timed``)."""
    pairs = sorted(pairs, key=lambda pair: (pair[0].problem, pair[0].draw, pair[1].draw))
    timed = [pair for pair in pairs if has_time(pair[0].row) and has_time(pair[1].row)]
    return {
        "n": len(pairs),
        "problems": len({first.problem for first, _ in pairs}),
        **agreement(pairs),
        "timed": len(timed),
        **{name: ratio(timed, name) for name in QUANTITIES},
        "tokens_per_s": throughput(timed),
    }


def agreement(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Which side is right where, and how likely so lopsided a split is by chance."""
    graded = [pair for pair in pairs if all(sample.row["correct"] is not None for sample in pair)]
    verdicts = Counter((bool(a.row["correct"]), bool(b.row["correct"])) for a, b in graded)
    differences = by_problem((pair, float(pair[1].row["correct"]) - float(pair[0].row["correct"])) for pair in graded)
    data = table(differences)
    return {
        "graded": len(graded),
        "both_right": verdicts[True, True],
        "only_first_right": verdicts[True, False],
        "only_second_right": verdicts[False, True],
        "neither_right": verdicts[False, False],
        "mcnemar_p": mcnemar(verdicts[True, False], verdicts[False, True]),
        "accuracy_difference": float(mean_of_problems(data)) if len(data) else None,
        "accuracy_difference_ci95": interval(data, mean_of_problems),
    }


def ratio(pairs: Sequence[Pair], name: str) -> dict[str, Any] | None:
    """First over second of a row's quantity, three ways; None where no pair has it."""
    known = [pair for pair in pairs if all(_positive(sample.row, name) for sample in pair)]
    if not known:
        return None
    data = table(by_problem((pair, pair[0].row[name] / pair[1].row[name]) for pair in known))
    sums = [fsum(pair[side].row[name] for pair in known) for side in (0, 1)]
    return {
        "n": len(known),
        "median": float(median_of_samples(data)),
        "median_ci95": interval(data, median_of_samples),
        "geometric_mean": float(geometric_mean_of_samples(data)),
        "geometric_mean_ci95": interval(data, geometric_mean_of_samples),
        "of_sums": sums[0] / sums[1],
        "of_sums_ci95": interval(_both(known, name, name), ratio_of_sums),
        "first_sum": sums[0],
        "second_sum": sums[1],
    }


def throughput(pairs: Sequence[Pair]) -> dict[str, Any] | None:
    """Tokens per second of a row while it ran, all rows together: of second over first."""
    if not pairs:
        return None
    rates = [sum(p[i].row["total_tokens"] for p in pairs) / fsum(p[i].row["latency_s"] for p in pairs) for i in (0, 1)]
    return {"first": rates[0], "second": rates[1], "ratio": rates[1] / rates[0] if rates[0] > 0 else None}


def by_problem(values: Iterable[tuple[Pair, float]]) -> list[list[float]]:
    """The values of pairs, those of one problem together, in the order of the problems' names."""
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for (first, _), value in values:
        groups[first.problem].append(value)
    return [groups[problem] for problem in sorted(groups)]


def sentence(figures: dict[str, Any], first: str, second: str) -> str:
    """Verdicts in words."""
    if not figures["graded"]:
        return f"{plural(figures['n'], 'pair')}, none graded on both sides."
    p = figures["mcnemar_p"]
    return (
        f"Of {plural(figures['graded'], 'graded pair')} {figures['both_right']:,} right on both sides, "
        f"{figures['only_first_right']:,} only {first}, {figures['only_second_right']:,} only {second}, "
        f"{figures['neither_right']:,} neither; exact McNemar "
        + ("has no discordant pair." if p is None else f"p = {p:.2g}.")
    )


def _both(pairs: Sequence[Pair], first: str, second: str) -> Any:
    """Both sides' quantities as ``[problems, samples, 2]``."""
    import numpy as np

    sides = [
        table(by_problem((pair, float(pair[side].row[name])) for pair in pairs))
        for side, name in ((0, first), (1, second))
    ]
    return np.stack(sides, axis=-1)


def _positive(row: Row, name: str) -> bool:
    value = row.get(name)
    return value is not None and value > 0

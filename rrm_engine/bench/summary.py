"""Figures of a run from its rows: pure functions, so that any rows.jsonl can be summarised again.

A *pair* is a task's direct and recursive row of the same sample. A speed-up is direct divided by recursive: above 1
the recursive run is the shorter one. A *headline* pair is one where recursive solving did what it is for: the root's
own graph led to the answer without fallback, a child decoded while its ancestor still did (``overlap_s``), both modes
are right, and both latencies are real.
"""

import math
import random
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from rrm_engine.runs.rows import Row
from rrm_engine.runs.trust import DIRECT, RECURSIVE, has_time, is_headline, ran_to_end

Z95 = 1.959964
RESAMPLES = 2000
MIN_TASKS = 5  # below, the interval of a median says nothing

Pair = tuple[Row, Row]  # direct, recursive


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that summary.json holds."""
    modes = {mode: [row for row in rows if row["mode"] == mode] for mode in (DIRECT, RECURSIVE)}
    paired = pairs(rows)
    return {
        "rows": len(rows),
        "errors": sum(row["error"] is not None for row in rows),
        "modes": {mode: mode_figures(chosen) for mode, chosen in modes.items() if chosen},
        "headline": speedups([pair for pair in paired if is_headline(*pair)]),
        "all_pairs": {**speedups([pair for pair in paired if is_timed(*pair)]), **agreement(paired)},
        "atomic_controls": atomic_controls(paired, modes[RECURSIVE]),
        "kv": kv_figures(rows),
    }


def mode_figures(rows: Sequence[Row]) -> dict[str, Any]:
    """One mode's rows. Accuracy is over graded rows, an error counting as wrong; times are of whole runs.

    ``cut`` counts the rows in which a limit ended or refused something, ``cut_by`` those of each setting.
    """
    graded = [row["correct"] for row in rows if row["correct"] is not None]
    timed = [row for row in rows if ran_to_end(row)]
    latencies = [row["latency_s"] for row in timed]
    seconds = math.fsum(latencies)  # exact, so that the order of the rows does not show
    return {
        "n": len(rows),
        "graded": len(graded),
        "correct": sum(graded),
        "accuracy": sum(graded) / len(graded) if graded else None,
        "accuracy_ci95": wilson(sum(graded), len(graded)),
        "latency_median": median(latencies),
        "latency_mean": seconds / len(latencies) if latencies else None,
        "ttft_median": median(row["ttft_s"] for row in timed if row["ttft_s"] is not None),
        "tokens_total": sum(row["total_tokens"] for row in rows),
        "tokens_median": median(row["total_tokens"] for row in timed),
        "critical_path_tokens_median": median(row["critical_path_tokens"] for row in timed),
        "tokens_per_s": sum(row["total_tokens"] for row in timed) / seconds if seconds > 0 else None,
        "parallel_s_median": median(row["parallel_s"] for row in timed),
        "overlap_s_median": median(row["overlap_s"] for row in timed),
        "errors": sum(row["error"] is not None for row in rows),
        "grading_errors": sum(row.get("grading_error") is not None for row in rows),
        "cut": sum(bool(row.get("cut")) for row in rows),
        "cut_by": dict(sorted(Counter(setting for row in rows for setting in row.get("cut", ())).items())),
        "status": dict(sorted(Counter(str(row["status"]) for row in rows).items())),
        "kv": kv_figures(rows),
    }


def kv_figures(rows: Sequence[Row]) -> dict[str, Any]:
    """What became of the KV cache: sums over rows, and the highest peak."""

    def total(name: str) -> int:
        return sum(row[name] for row in rows)

    return {
        "prefilled": total("forward_prefilled"),
        "decoded": total("forward_decoded"),
        "reused": total("reused"),
        "forked_blocks": total("forked_blocks"),
        "copied_blocks": total("copied_blocks"),
        "peak_blocks": max((row["peak_kv_blocks"] for row in rows), default=0),
        "preemptions": total("preemptions"),
        "offloaded_blocks": total("offloaded_blocks"),
        "restored_blocks": total("restored_blocks"),
        "resumes": total("resumes"),
        "resume_latency_median": median(seconds for row in rows for seconds in row["resume_latency_s"]),
        **splice_figures(rows),
    }


def splice_figures(rows: Sequence[Row]) -> dict[str, Any]:
    """KV that was attached instead of computed, and how far what followed was from the same after the text.

    ``splice_first_difference_median`` is over the resumes after which a likeliest token differed at all.
    """
    reports = [report for row in rows for report in row.get("splice_report", ())]
    differences = [r["first_difference"] for r in reports if r["first_difference"] is not None]
    tokens = sum(report["tokens"] for report in reports)

    def mean(name: str) -> float | None:
        """Over tokens."""
        return sum(r[name] * r["tokens"] for r in reports) / tokens if tokens else None

    return {
        "spliced_rows": sum(row.get("spliced_tokens", 0) > 0 for row in rows),
        "spliced_tokens": sum(row.get("spliced_tokens", 0) for row in rows),
        "splice_compared_resumes": len(reports),
        "splice_compared_tokens": tokens,
        "splice_kl_mean": mean("kl_mean"),
        "splice_kl_max": max((report["kl_max"] for report in reports), default=None),
        "splice_top1_agreement": mean("top1"),
        "splice_differing_resumes": len(differences),
        "splice_first_difference_median": median(differences),
    }


def pairs(rows: Iterable[Row]) -> list[Pair]:
    """Direct and recursive rows of the same task and sample, in the order of the rows."""
    found: dict[tuple[str, int], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row["id"], row["sample"]][row["mode"]] = row
    return [(both[DIRECT], both[RECURSIVE]) for both in found.values() if len(both) == 2]


def is_timed(direct: Row, recursive: Row) -> bool:
    """Both are whole runs that took measurable, finite time."""
    return has_time(direct) and has_time(recursive)


def speedups(chosen: Sequence[Pair]) -> dict[str, Any]:
    """Median speed-ups of pairs, with intervals that hold samples of one task together."""
    latency = _ratios(chosen, "latency_s")
    critical = _ratios(chosen, "critical_path_tokens")
    tokens = _ratios(chosen, "total_tokens")
    return {
        "n": len(chosen),
        "tasks": len({direct["id"] for direct, _ in chosen}),
        "latency_speedup_median": median(_flat(latency)),
        "latency_speedup_ci95": median_interval(latency),
        "critical_path_speedup_median": median(_flat(critical)),
        "critical_path_speedup_ci95": median_interval(critical),
        "tokens_direct_over_recursive_median": median(_flat(tokens)),
    }


def agreement(chosen: Sequence[Pair]) -> dict[str, Any]:
    """Which mode is right where, and how likely so lopsided a split is by chance (exact McNemar test)."""
    graded = [pair for pair in chosen if all(row["correct"] is not None for row in pair)]
    verdicts = Counter((bool(direct["correct"]), bool(recursive["correct"])) for direct, recursive in graded)
    only_direct, only_recursive = verdicts[True, False], verdicts[False, True]
    return {
        "both_correct": verdicts[True, True],
        "only_direct_correct": only_direct,
        "only_recursive_correct": only_recursive,
        "neither_correct": verdicts[False, False],
        "mcnemar_p": mcnemar(only_direct, only_recursive),
    }


def atomic_controls(chosen: Sequence[Pair], recursive: Sequence[Row]) -> dict[str, Any]:
    """Recursive rows whose root did not split: direct solving under another prompt, hence a control."""
    rows = [row for row in recursive if row["status"] == "atomic"]
    partners = [pair for pair in chosen if pair[1]["status"] == "atomic"]
    figures = speedups([pair for pair in partners if is_timed(*pair)])
    graded = [row["correct"] for row in rows if row["correct"] is not None]
    direct = [pair[0]["correct"] for pair in partners if pair[0]["correct"] is not None]
    return {
        "n": len(rows),
        "accuracy": sum(graded) / len(graded) if graded else None,
        "accuracy_ci95": wilson(sum(graded), len(graded)),
        "direct_accuracy_same_tasks": sum(direct) / len(direct) if direct else None,
        "latency_speedup_median": figures["latency_speedup_median"],
        "critical_path_speedup_median": figures["critical_path_speedup_median"],
    }


def wilson(hits: int, n: int) -> list[float] | None:
    """The Wilson score interval of a proportion, 95 %."""
    if n == 0:
        return None
    share, z2 = hits / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def mcnemar(a: int, b: int) -> float | None:
    """Two-sided exact p-value of ``a`` against ``b`` discordant pairs."""
    n = a + b
    if n == 0:
        return None
    tail = sum(math.comb(n, k) for k in range(min(a, b) + 1)) / 2**n
    return min(1.0, 2 * tail)


def median(values: Iterable[float]) -> float | None:
    """The median, None of nothing."""
    known = list(values)
    return statistics.median(known) if known else None


def median_interval(groups: dict[str, list[float]]) -> list[float] | None:
    """A 95 % bootstrap interval of the median that draws whole tasks, for samples of a task resemble each other."""
    names = sorted(groups)
    if len(names) < MIN_TASKS:
        return None
    noise = random.Random(0)  # the same rows give the same summary
    medians = sorted(
        statistics.median([value for name in noise.choices(names, k=len(names)) for value in groups[name]])
        for _ in range(RESAMPLES)
    )
    return [medians[round(0.025 * (RESAMPLES - 1))], medians[round(0.975 * (RESAMPLES - 1))]]


def _ratios(chosen: Sequence[Pair], name: str) -> dict[str, list[float]]:
    """Direct over recursive per task, where both are positive."""
    found: dict[str, list[float]] = defaultdict(list)
    for direct, recursive in chosen:
        if direct[name] > 0 and recursive[name] > 0:
            found[direct["id"]].append(direct[name] / recursive[name])
    return found


def _flat(groups: dict[str, list[float]]) -> list[float]:
    return [value for values in groups.values() for value in values]

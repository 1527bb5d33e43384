"""An arm's own figures: accuracy over samples and problems, times, tokens, the shape of its graphs."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from math import fsum
from typing import Any

from rrm_engine.analyze.statistics import mean, median, pass_at_k, share, share_interval, wilson
from rrm_engine.runs.arms import Sample
from rrm_engine.runs.trust import has_time, ran_to_end

FORMULAS = {
    "accuracy": "rows right / rows graded; Wilson interval, as if all rows were independent",
    "avg_at_k": "mean over problems of (samples right / samples); interval: bootstrap of whole problems",
    "pass_at_k": "mean over problems of 1 - C(n - c, k) / C(n, k): c of n samples are right; k is the fewest samples "
    "of any problem",
    "tokens_per_s": "sum of total_tokens / sum of latency_s, over whole runs",
    "activation": "recursive rows whose root started a child / recursive rows that ran to their end",
    "parallelism_tokens": "total_tokens / critical_path_tokens, mean over rows that split",
    "imbalance": "nodes of the replica that had most / mean over replicas",
    "overlap": "overlap_s / latency_s, mean over rows that split: a node beside one of its descendants",
    "parallel": "parallel_s / latency_s, mean over rows that split: any two nodes",
}


def mode_figures(samples: Sequence[Sample]) -> dict[str, Any]:
    """One mode of an arm. An error counts as wrong; times are of whole runs."""
    rows = [sample.row for sample in samples]
    timed = [row for row in rows if has_time(row)]
    seconds = fsum(row["latency_s"] for row in timed)
    steps = [row["critical_path_steps"] for row in timed if row.get("critical_path_steps")]
    return {
        "n": len(rows),
        "problems": len({sample.problem for sample in samples}),
        **accuracy(samples),
        "latency_s_median": median(row["latency_s"] for row in timed),
        "latency_s_mean": mean(row["latency_s"] for row in timed),
        "ttft_s_median": median(row["ttft_s"] for row in timed if row["ttft_s"] is not None),
        "critical_path_tokens_median": median(row["critical_path_tokens"] for row in timed),
        "critical_path_steps_median": median(steps),
        "total_tokens_median": median(row["total_tokens"] for row in timed),
        "total_tokens": sum(row["total_tokens"] for row in rows),
        "tokens_per_s": sum(row["total_tokens"] for row in timed) / seconds if seconds else None,
        "errors": sum(row["error"] is not None for row in rows),
        "grading_errors": sum(row.get("grading_error") is not None for row in rows),
        "cut": sum(bool(row.get("cut")) for row in rows),
        "status": dict(Counter(str(row["status"]) for row in rows).most_common()),
    }


def accuracy(samples: Sequence[Sample]) -> dict[str, Any]:
    """Over rows, over problems, and the chance that one of k samples is right."""
    groups: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for sample in samples:
        if sample.row["correct"] is not None:
            groups[sample.problem].append(bool(sample.row["correct"]))
    verdicts = [groups[problem] for problem in sorted(groups)]
    n, right = sum(map(len, verdicts)), sum(map(sum, verdicts))
    k = min(map(len, verdicts), default=0)
    passed = [[pass_at_k(len(problem), sum(problem), k)] for problem in verdicts]
    return {
        "graded": n,
        "right": right,
        "accuracy": right / n if n else None,
        "accuracy_ci95": wilson(right, n),
        "k": k,
        "avg_at_k": share(verdicts),
        "avg_at_k_ci95": share_interval(verdicts),
        "pass_at_k": share(passed),
        "pass_at_k_ci95": share_interval(passed),
    }


def shape(samples: Sequence[Sample]) -> dict[str, Any]:
    """How far recursive rows split, and how wide and deep."""
    rows = [sample.row for sample in samples if ran_to_end(sample.row)]
    split = [row for row in rows if row["nodes"] > 1 and row["max_depth"] > 0]
    timed = [row for row in split if has_time(row)]
    repairs: Counter[str] = Counter()
    for row in rows:
        repairs.update(row.get("repairs") or {})
    on_path = [row for row in split if row["critical_path_tokens"] > 0]
    return {
        "n": len(rows),
        "split": len(split),
        "activation": len(split) / len(rows) if rows else None,
        "activation_ci95": wilson(len(split), len(rows)),
        "nodes_mean": mean(row["nodes"] for row in split),
        "width_mean": mean(row["max_sibling_width"] for row in split),
        "width_max": max((row["max_sibling_width"] for row in split), default=None),
        "depth_mean": mean(row["max_depth"] for row in split),
        "depth_max": max((row["max_depth"] for row in split), default=None),
        "parallelism_tokens": mean(row["total_tokens"] / row["critical_path_tokens"] for row in on_path),
        "overlap": mean(row["overlap_s"] / row["latency_s"] for row in timed),
        "parallel": mean(row["parallel_s"] / row["latency_s"] for row in timed),
        "repairs": dict(repairs.most_common()),
    }


def servers(samples: Sequence[Sample]) -> dict[str, Any] | None:
    """How replicas shared the nodes, and what waited or was tried again; None where nothing ran on replicas.

    A node that was started again elsewhere counts for each replica that had it.
    """
    told = [found for sample in samples if (found := sample.row.get("servers"))]
    if not told:
        return None
    nodes: Counter[str] = Counter()
    for found in told:
        for names in found.get("replicas", {}).values():
            nodes.update(names)
    cached = [found["cached_tokens"] for found in told if found.get("cached_tokens") is not None]
    return {
        "nodes": dict(sorted(nodes.items())),
        "imbalance": max(nodes.values()) * len(nodes) / nodes.total() if nodes else None,
        "queued_s": fsum(found.get("queued_s", 0.0) for found in told),
        "attempts": sum(found.get("attempts", 0) for found in told),
        "restarts": sum(found.get("restarts", 0) for found in told),
        "cached_tokens": sum(cached) if cached else None,
        "cached_untold": sum(found.get("cached_untold", 0) for found in told),
    }

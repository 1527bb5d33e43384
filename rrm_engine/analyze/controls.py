"""Direct solving with what recursion was allowed: as many tokens in all, or as many one after another.

A recursive run spends tokens beside each other that a direct one does not. Both could be spent otherwise: the same
total on several direct samples of which the majority counts (self-consistency, Wang et al. 2022, arXiv 2203.11171), the
same critical path on one direct solve that is stopped there.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from math import comb
from typing import Any

from rrm_engine.analyze.statistics import median, share, share_interval
from rrm_engine.bench.grading import stated
from rrm_engine.runs.arms import Arm, Problem, Sample
from rrm_engine.runs.trust import RECURSIVE, ran_to_end

MOST_SUBSETS = 1000  # that are all counted; of more, as many are drawn
FORMULAS = {
    "matched_tokens": "N direct samples, N = max(1, floor(mean recursive total_tokens / mean direct total_tokens)) by "
    "problem; the answer most of them give counts, ties share; mean over all choices of N of the recorded samples",
    "one_at_a_time": "median over pairs of the recursive row's total_tokens: its path if no two nodes ran at once",
    "matched_path": "a direct row counts as right if it was right within its recursive row's critical_path_tokens",
}


def controls(arm: Arm) -> dict[str, Any] | None:
    """Both controls of an arm that has graded rows of both modes; None of others."""
    direct, recursive = _by_problem(arm.direct), _by_problem(arm.of_mode(RECURSIVE))
    both = sorted(direct.keys() & recursive.keys())
    if not both:
        return None
    return {
        "problems": len(both),
        "recursive": _accuracy([[bool(s.row["correct"]) for s in recursive[p]] for p in both]),
        "direct": _accuracy([[bool(s.row["correct"]) for s in direct[p]] for p in both]),
        "matched_tokens": _matched_tokens(both, direct, recursive),
        "matched_path": _matched_path(arm),
        "one_at_a_time": _one_at_a_time(arm),
    }


def _matched_tokens(
    problems: Sequence[Problem], direct: dict[Problem, list[Sample]], recursive: dict[Problem, list[Sample]]
) -> dict[str, Any]:
    """Majorities of as many direct samples as the recursive tokens pay for, of the problems that have so many."""
    wanted = {p: max(1, int(_tokens(recursive[p]) // max(1.0, _tokens(direct[p])))) for p in problems}
    enough = [p for p in problems if len(direct[p]) >= wanted[p]]
    found = _accuracy([[majority(direct[p], wanted[p])] for p in enough])
    same = _accuracy([[bool(s.row["correct"]) for s in recursive[p]] for p in enough])
    return {
        **found,
        "recursive_same_problems": same["accuracy"],
        "samples_wanted": max(wanted.values()),
        "samples_mean": sum(wanted[p] for p in enough) / len(enough) if enough else None,
        "problems_with_too_few": len(problems) - len(enough),
    }


def majority(samples: Sequence[Sample], n: int) -> float:
    """The chance that of ``n`` of the samples, drawn without replacement, most give the right answer.

    Right answers are one answer, however they are written; wrong ones are told apart by what they state. A sample that
    states nothing has no vote.
    """
    votes = [_vote(sample) for sample in samples]
    outcomes = [_outcome([votes[i] for i in chosen]) for chosen in _subsets(len(votes), n)]
    return sum(outcomes) / len(outcomes)


def _outcome(votes: Sequence[str | bool]) -> float:
    counts = Counter(vote for vote in votes if vote != "")
    most = max(counts.values(), default=0)
    first = [vote for vote, count in counts.items() if count == most]
    return (True in first) / len(first) if first else 0.0


def _vote(sample: Sample) -> str | bool:
    return True if sample.row["correct"] else stated(sample.row["answer"])


def _subsets(n: int, k: int) -> Iterator[tuple[int, ...]]:
    if comb(n, k) <= MOST_SUBSETS:
        yield from combinations(range(n), k)
        return
    noise = random.Random(0)
    for _ in range(MOST_SUBSETS):
        yield tuple(noise.sample(range(n), k))


def _matched_path(arm: Arm) -> dict[str, Any]:
    """Direct rows stopped where their recursive row's critical path ends."""
    groups: dict[Problem, list[bool]] = defaultdict(list)
    late = 0
    for direct, recursive in arm.paired:
        if direct.row["correct"] is None or not ran_to_end(recursive.row):
            continue
        in_time = direct.row["critical_path_tokens"] <= recursive.row["critical_path_tokens"]
        late += bool(direct.row["correct"]) and not in_time
        groups[direct.problem].append(bool(direct.row["correct"]) and in_time)
    return {**_accuracy([groups[p] for p in sorted(groups)]), "right_too_late": late}


def _accuracy(groups: Sequence[Sequence[float]]) -> dict[str, Any]:
    return {"problems": len(groups), "accuracy": share(groups), "accuracy_ci95": share_interval(groups)}


def _one_at_a_time(arm: Arm) -> dict[str, Any]:
    """Paths in tokens, of direct rows, recursive ones, and these without parallelism."""
    pairs = [(d.row, r.row) for d, r in arm.paired if ran_to_end(d.row) and ran_to_end(r.row)]
    return {
        "direct": median(d["critical_path_tokens"] for d, _ in pairs),
        "recursive": median(r["critical_path_tokens"] for _, r in pairs),
        "one_at_a_time": median(r["total_tokens"] for _, r in pairs),
    }


def _by_problem(samples: Sequence[Sample]) -> dict[Problem, list[Sample]]:
    found: dict[Problem, list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.row["correct"] is not None:
            found[sample.problem].append(sample)
    return found


def _tokens(samples: Sequence[Sample]) -> float:
    return sum(sample.row["total_tokens"] for sample in samples) / len(samples)

"""Intervals, tests and estimates against published values, other libraries' and counting by hand."""

import math
from itertools import combinations, product

import pytest

np = pytest.importorskip("numpy")
pytest.importorskip("scipy")

from rrm_engine.analyze.statistics import (  # noqa: E402
    MIN_PROBLEMS,
    geometric_mean_of_samples,
    interval,
    mcnemar,
    mean_of_problems,
    median_of_samples,
    pass_at_k,
    ratio_of_sums,
    share,
    share_interval,
    table,
    wilson,
)
from rrm_engine.bench import summary  # noqa: E402


def test_wilson_against_published_values() -> None:
    assert wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)  # Newcombe 1998, table I
    assert wilson(15, 148) == pytest.approx([0.0624, 0.1605], abs=1e-4)
    assert wilson(0, 20) == pytest.approx([0.0, 0.1611], abs=1e-4)
    assert wilson(0, 0) is None


def test_the_closing_table_computes_the_same() -> None:
    for hits, n in ((0, 7), (3, 7), (7, 7), (30, 62)):
        assert wilson(hits, n) == pytest.approx(summary.wilson(hits, n), abs=1e-6)
    for one, other in ((0, 0), (3, 3), (0, 6), (9, 1), (40, 61)):
        assert mcnemar(one, other) == pytest.approx(summary.mcnemar(one, other))


def test_mcnemar_against_all_ways_the_pairs_could_have_split() -> None:
    for n in range(1, 9):
        splits = [sum(way) for way in product((0, 1), repeat=n)]
        for only_first in range(n + 1):
            far = [s for s in splits if abs(2 * s - n) >= abs(2 * only_first - n)]
            assert mcnemar(only_first, n - only_first) == pytest.approx(len(far) / len(splits))


def test_pass_at_k_against_all_choices() -> None:
    for n in range(1, 7):
        for right in range(n + 1):
            verdicts = [True] * right + [False] * (n - right)
            for k in range(1, n + 1):
                chosen = list(combinations(verdicts, k))
                assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))


def test_a_bootstrap_over_problems_against_all_its_draws() -> None:
    """With five problems there are 3125 equally likely draws: their percentiles are what sampling comes near."""
    groups = [[1.0, 2.0], [3.0], [0.5, 0.5], [2.0, 4.0], [1.5]]
    data = table(groups)
    means = [math.fsum(group) / len(group) for group in groups]
    all_draws = sorted(sum(draw) / 5 for draw in product(means, repeat=5))
    found = interval(data, mean_of_problems)
    assert found == pytest.approx(np.quantile(all_draws, [0.025, 0.975]).tolist(), abs=0.08)
    assert found == interval(data, mean_of_problems)  # the same rows give the same interval
    assert interval(data[: MIN_PROBLEMS - 1], mean_of_problems) is None


def test_samples_of_one_problem_are_drawn_together() -> None:
    """Fifty copies of a sample know no more than one."""
    once = [[float(i % 2)] for i in range(9)]
    often = [group * 50 for group in once]
    assert interval(table(once), median_of_samples) == interval(table(often), median_of_samples)
    assert interval(table(once), mean_of_problems) == interval(table(often), mean_of_problems)


def test_statistics_over_uneven_problems() -> None:
    data = table([[1.0, 4.0], [9.0]])
    assert median_of_samples(data) == 4.0
    assert mean_of_problems(data) == pytest.approx((2.5 + 9) / 2)
    assert geometric_mean_of_samples(data) == pytest.approx(36 ** (1 / 3))
    assert ratio_of_sums(np.stack([data, data * 2], axis=-1)) == pytest.approx(0.5)
    drawn = data[np.array([[0, 0], [1, 1], [0, 1]])]
    assert median_of_samples(drawn).tolist() == [2.5, 9.0, 4.0]
    assert mean_of_problems(drawn).tolist() == [2.5, 9.0, 5.75]


def test_shares() -> None:
    assert share([[1, 0], [1]]) == 0.75
    assert share([]) is None and share_interval([]) is None
    assert share_interval([[1], [0], [1]]) == wilson(2, 3)
    assert share_interval([[1, 1]] * 8) == wilson(8, 8)  # not an interval of no width
    mixed = [[1, 0], [1, 1], [0, 0], [1, 0], [1, 1], [0, 1]]
    assert share_interval(mixed) == interval(table([[float(v) for v in g] for g in mixed]), mean_of_problems)

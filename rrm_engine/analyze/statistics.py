"""Intervals and tests, from scipy. Problems are drawn as wholes, for samples of one problem resemble each other.

Arrays of samples have shape ``[problems, samples]`` in float64, NaN where a problem has fewer samples than others.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rrm_engine.errors import RrmError

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

CONFIDENCE = 0.95
RESAMPLES = 2000
SEED = 0  # the same rows give the same intervals
MIN_PROBLEMS = 5  # below, a bootstrap interval says nothing


def scipy_stats() -> ModuleType:
    """``scipy.stats``, which takes a second to import. Raises RrmError where it is not installed."""
    try:
        import scipy.stats
    except ImportError:
        raise RrmError("intervals and tests need one more package: pip install 'rrm-engine[analysis]'") from None
    return scipy.stats


def wilson(hits: int, n: int) -> list[float] | None:
    """The Wilson score interval of a proportion; None of nothing."""
    if n == 0:
        return None
    found = scipy_stats().binomtest(hits, n).proportion_ci(CONFIDENCE, method="wilson")
    return [float(found.low), float(found.high)]


def mcnemar(only_first: int, only_second: int) -> float | None:
    """The exact two-sided p-value of McNemar's test; None without discordant pairs."""
    if only_first + only_second == 0:
        return None
    return float(scipy_stats().binomtest(only_first, only_first + only_second, 0.5).pvalue)


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that of ``k`` of ``n`` samples, drawn without replacement, at least one is among the ``right`` ones:
    the unbiased estimate of pass@k of Chen et al. 2021 (arXiv 2107.03374)."""
    return float(scipy_stats().hypergeom.sf(0, n, right, k))


def mean(values: Iterable[float]) -> float | None:
    """The mean, None of nothing."""
    known = list(values)
    return math.fsum(known) / len(known) if known else None


def median(values: Iterable[float]) -> float | None:
    """The median, None of nothing."""
    known = list(values)
    return statistics.median(known) if known else None


def interval(data: "Array", statistic: "Callable[[Array], Any]") -> list[float] | None:
    """The percentile bootstrap interval of a statistic when problems are drawn with replacement.

    ``data`` has shape ``[problems, ...]``; ``statistic`` takes ``[draws, problems, ...]`` and returns ``[draws]``, or
    one draw without the first axis and returns a number. None with fewer than MIN_PROBLEMS problems.
    """
    import numpy as np

    if len(data) < MIN_PROBLEMS:
        return None
    found = scipy_stats().bootstrap(
        (np.arange(len(data)),),
        lambda drawn, axis: statistic(data[drawn]),
        n_resamples=RESAMPLES,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(SEED),
    )
    low, high = float(found.confidence_interval.low), float(found.confidence_interval.high)
    return [low, high] if np.isfinite([low, high]).all() else None


def share(groups: Sequence[Sequence[float]]) -> float | None:
    """The mean over problems of the mean over each one's samples; None of nothing."""
    return mean(statistics.fmean(group) for group in groups)


def share_interval(groups: Sequence[Sequence[float]]) -> list[float] | None:
    """The interval of ``share`` for values from 0 to 1: Wilson's where each problem is a hit or a miss as a whole (a
    bootstrap of hits alone would have no width), else the bootstrap's."""
    shares = [statistics.fmean(group) for group in groups]
    if set(shares) <= {0.0, 1.0}:
        return wilson(round(sum(shares)), len(shares))
    return interval(table(groups), mean_of_problems)


def table(groups: Iterable[Sequence[float]]) -> "Array":
    """Samples by problem as an array ``[problems, samples]``."""
    import numpy as np

    rows = [list(group) for group in groups]
    made = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    for filled, values in zip(made, rows, strict=True):
        filled[: len(values)] = values
    return made


def median_of_samples(data: "Array") -> Any:
    """The median over all samples of ``[..., problems, samples]``."""
    import numpy as np

    return np.nanmedian(data.reshape(*data.shape[:-2], -1), axis=-1)


def mean_of_problems(data: "Array") -> Any:
    """The mean over problems of the mean over each one's samples, of ``[..., problems, samples]``."""
    import numpy as np

    return np.nanmean(data, axis=-1).mean(axis=-1)


def geometric_mean_of_samples(data: "Array") -> Any:
    """The geometric mean over all samples of ``[..., problems, samples]``."""
    return scipy_stats().gmean(data.reshape(*data.shape[:-2], -1), axis=-1, nan_policy="omit")


def ratio_of_sums(data: "Array") -> Any:
    """Of ``[..., problems, samples, 2]`` the sum of the first values over that of the second."""
    import numpy as np

    sums = np.nansum(data, axis=(-3, -2))
    return sums[..., 0] / sums[..., 1]

"""Statistics for the verdict, with sources: intervals for proportions, paired proportions and means, and McNemar's
exact test. All intervals are 95%.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # 97.5% quantile of the standard normal distribution


@dataclass(frozen=True)
class Interval:
    """A point estimate and its 95% interval, all in the same unit."""

    value: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """Convert to another unit; `factor` must be positive."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)


def wilson(successes: int, trials: int) -> Interval:
    """Score interval of a proportion, as shares of 1.

    E. B. Wilson (1927), "Probable inference, the law of succession, and statistical inference", JASA 22:209-212.
    It stays inside [0, 1] and keeps its coverage near 0 and 1, where agreement rates often are.
    """
    if trials < 1:
        raise ValueError("an interval needs at least one trial")
    share, z2 = successes / trials, Z95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    # With no successes, or only successes, one end equals the point estimate: keep rounding from moving it past.
    return Interval(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def paired_difference(only_first: int, only_second: int, trials: int) -> Interval:
    """Difference of two proportions measured on the same trials (second minus first), as shares of 1.

    Agresti-Min adjusted Wald interval: a Wald interval after adding 1/2 to each of the four cells of the paired
    table. A. Agresti and Y. Min (2005), "Simple improved confidence intervals for comparing matched proportions",
    Statistics in Medicine 24:729-740. The point estimate is not adjusted.

    Args:
        only_first: Trials that only the first got right.
        only_second: Trials that only the second got right.
        trials: All trials.
    """
    if trials < 1:
        raise ValueError("an interval needs at least one trial")
    first, second, total = only_first + 0.5, only_second + 0.5, trials + 2
    centre = (second - first) / total
    half = Z95 * math.sqrt(first + second - (second - first) ** 2 / total) / total
    value = (only_second - only_first) / trials
    return Interval(value, max(-1.0, min(value, centre - half)), min(1.0, max(value, centre + half)))


def mcnemar_exact(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test: a binomial test of the trials on which the two differ.

    Q. McNemar (1947), Psychometrika 12:153-157, in its exact form. 1.0 if they never differ.
    """
    differing = only_first + only_second
    tail, term = 0, 1  # `term` is C(differing, k) as an exact integer, which cannot underflow
    for k in range(min(only_first, only_second) + 1):
        tail += term
        term = term * (differing - k) // (k + 1)
    return min(1.0, 2 * tail / 2**differing)


def bootstrap_mean(values: np.ndarray, *, seed: int = 0, resamples: int = 1000) -> Interval:
    """Mean with a percentile bootstrap interval (B. Efron, 1979), for skewed values such as a per-image KL.

    Args:
        values: float [n], n >= 1.
    """
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):  # one at a time, to limit memory: 50,000 images would need 50,000 x 1,000 numbers
        means[i] = values[rng.integers(0, len(values), len(values))].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap_ratio_of_medians(
    above: np.ndarray, below: np.ndarray, *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """median(above) / median(below) with a percentile bootstrap interval over paired rounds.

    Resamples circular blocks of consecutive rounds (length n^(1/3), H. R. Kuensch 1989), because consecutive timings
    are correlated, and drawing single rounds would make the interval too narrow.

    Args:
        above, below: float [n], n >= 1, positive; index i is round i of both.
    """
    rng, count = np.random.default_rng(seed), len(above)
    block = max(1, round(count ** (1 / 3)))
    blocks = math.ceil(count / block)
    ratios: list[np.ndarray] = []
    for _ in range(0, resamples, 100):  # a hundred at a time: fast, with only megabytes at 5,000 rounds
        starts = rng.integers(0, count, (min(100, resamples - 100 * len(ratios)), blocks, 1))
        index = ((starts + np.arange(block)) % count).reshape(len(starts), -1)[:, :count]
        ratios.append(np.median(above[index], axis=1) / np.median(below[index], axis=1))
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return Interval(float(np.median(above) / np.median(below)), float(low), float(high))

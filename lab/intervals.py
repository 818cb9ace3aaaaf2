"""Uncertainty of an evaluation: intervals of a share, and of the difference of two on the same problems."""

import math

import numpy as np

RESAMPLES = 10_000


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927); it lies in [0, 1] and is not empty at 0 or 1."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    margin = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def bootstrap_interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values`, by resampling with replacement (Efron, 1979).

    With the differences of two models on each problem, it is the interval of a paired comparison.
    """
    drawn = np.asarray(values)
    rng = np.random.default_rng(seed)
    means = [rng.choice(drawn, len(drawn)).mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test (1947), from the problems that only one of the two solves."""
    trials = only_first + only_second
    tail = sum(math.comb(trials, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**trials)

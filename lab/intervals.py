"""How sure an evaluation may be: intervals for a share, and for the difference of two on the same problems."""

import math

import numpy as np

RESAMPLES = 10_000


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927): within [0, 1], and of use at 0 and at `trials` successes too."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    margin = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def bootstrap_interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of a mean: the middle of the means of `values` drawn again with replacement (Efron, 1979).

    Of differences between two models problem by problem, it is the interval of a paired comparison: how hard each
    problem is drops out.
    """
    drawn, rng = np.asarray(values), np.random.default_rng(seed)
    means = [rng.choice(drawn, len(drawn)).mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test (1947) from how many problems only one of the two solves: were they equally
    good, how often would they differ so much?"""
    trials = only_first + only_second
    tail = sum(math.comb(trials, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**trials)

"""Intervals of shares and of differences, and the p-value of McNemar's test."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.intervals import bootstrap_interval, mcnemar_p, wilson_interval


@pytest.mark.parametrize(
    "successes, trials, low, high",
    [
        (8, 10, 0.490162, 0.943318),  # the textbook example
        (0, 10, 0.0, 0.277533),
        (10, 10, 0.722467, 1.0),
        (1, 2, 0.094531, 0.905469),
        (50, 100, 0.403832, 0.596168),
    ],
)
def test_wilson_interval_of_known_cases(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=1e-6)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 5000).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
def test_wilson_interval_lies_in_0_to_1_around_the_share_and_solves_its_equation(case):
    """Its ends are the proportions p from which the share lies 1.96 standard errors, sqrt(p (1 - p) / n), away."""
    successes, trials = case
    low, high = wilson_interval(successes, trials)
    share = successes / trials
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / trials), rel=1e-6)
    mirrored = wilson_interval(trials - successes, trials)
    assert (low, high) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]), abs=1e-12)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 500))
def test_no_and_only_successes_stay_inside_and_say_something(trials):
    low, high = wilson_interval(0, trials)
    assert low == pytest.approx(0, abs=1e-12) and 0 < high < 1
    low, high = wilson_interval(trials, trials)
    assert 0 < low < 1 and high == pytest.approx(1, abs=1e-12)


def test_a_bootstrap_of_two_values_has_the_quantiles_of_its_three_means():
    """Means 0, 1/2 and 1 come up in a quarter, a half and a quarter of the draws."""
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)


def test_a_bootstrap_of_many_values_is_the_normal_interval():
    values = [1.0] * 300 + [0.0] * 500 + [-1.0] * 224
    mean = sum(values) / 1024
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / 1024 / 1024)
    assert bootstrap_interval(values) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.1 * error)
    assert bootstrap_interval(values) == bootstrap_interval(values) != bootstrap_interval(values, seed=1)


@pytest.mark.parametrize("gained, lost", [(0, 0), (1, 0), (5, 5), (1, 5), (15, 3), (200, 260)])
def test_mcnemar_is_the_exact_two_sided_binomial_test(gained, lost):
    """Of n coins, how often do heads and tails differ at least as much?"""
    n = gained + lost
    as_uneven = (k for k in range(n + 1) if abs(2 * k - n) >= abs(gained - lost))
    assert mcnemar_p(gained, lost) == pytest.approx(float(Fraction(sum(math.comb(n, k) for k in as_uneven), 2**n)))
    assert mcnemar_p(gained, lost) == mcnemar_p(lost, gained)

"""eval.py's numbers and table, and the statistics behind them: Wilson, bootstrap."""

import json
import math

import pytest
from helpers import GROUPS, answered
from rich.console import Console

from data import Problem
from lab.comparison import Candidate, comparison_table, difference, measures
from lab.evaluate import Evaluation, bootstrap_interval, wilson_interval
from lab.recipe import Recipe

WORSE = [answered(group[0].problem, *["7-1-2"] * 4) for group in GROUPS[:2]] + GROUPS[2:]


def candidate(groups, name="a") -> Candidate:
    """A model with these completions; the greedy ones are the first of each problem."""
    greedy = [group[:1] for group in groups]
    return Candidate(name, Recipe(), Evaluation.of(groups), Evaluation.of(greedy))


def test_measures_by_hand():
    found = json.loads(json.dumps(measures(candidate(GROUPS))))  # as --json writes them
    assert found["accuracy"]["mean"] == 0.5
    assert found["accuracy"]["low"] == pytest.approx(0.1500, abs=1e-4)  # Wilson of 2 in 4
    assert found["greedy"]["mean"] == 0.75  # correct, correct, correct, malformed
    # 3, 1, 4 and 0 of four are correct; of two draws both miss with chance 0, 3/6, 0 and 1, of three 0, 1/4,
    # 0 and 1.
    assert found["pass_at"] == pytest.approx({"1": 0.5, "2": 0.625, "3": 0.6875, "4": 0.75})
    assert found["outcomes"] == {"correct": 8 / 16, "near": 1 / 16, "wrong": 1 / 16, "malformed": 6 / 16}
    kinds = {kind: (row["mean"], row["problems"]) for kind, row in found["by_difficulty"].items()}
    assert kinds == {
        "3 numbers, + and - suffice": (0.875, 2),
        "3 numbers, needs * or /": (0.25, 1),
        "4 numbers, needs * or /": (0.0, 1),
    }
    assert found["completion_length"] == 1
    assert found["truncated_fraction"] == 0


def test_a_difference_is_taken_problem_by_problem():
    found = difference(candidate(WORSE, "before"), candidate(GROUPS, "after"))
    assert (found["from"], found["to"]) == ("before", "after")
    assert found["accuracy"]["mean"] == pytest.approx((0.75 + 0.25) / 4)
    assert found["accuracy"]["low"] == 0
    assert found["accuracy"]["high"] == pytest.approx(0.5625, abs=0.07)
    assert found["greedy"] == {"mean": 0.5, "low": 0.0, "high": 1.0}  # two of four are gained


def test_the_table_has_a_column_per_model_and_differences():
    worse, better = candidate(WORSE), candidate(GROUPS)
    numbers = [measures(worse), measures(better)]
    console = Console(width=160)
    with console.capture() as capture:
        console.print(comparison_table("title", numbers, [difference(worse, better)]))
    cells = [line.split("│") for line in capture.get().splitlines() if line.count("│") > 2]
    rows = {name.strip(): "|".join(texts) for _, name, *texts in cells}
    for name, words in {
        "accuracy, sampled": "25.0 %",
        "sampled, against the first": "+25.0 points",
        "greedy, against the first": "+50.0 points",
        "3 numbers, + and - suffice (2)": "87.5 %",
        "pass@4": "75.0 %",
    }.items():
        assert words in rows[name]
    assert "50.0 % (15.0 to 85.0)" in rows["accuracy, sampled"]
    assert "pass@8" not in rows


def test_problems_count_alike_whatever_their_samples():
    """k goes up to the samples that all problems have."""
    uneven = [GROUPS[0], answered(Problem((2, 5, 10), 100), "2*5*10", "")]
    found = measures(candidate(uneven))
    assert found["pass_at"] == pytest.approx({1: (0.75 + 0.5) / 2, 2: (1 + 1) / 2})
    assert found["accuracy"]["mean"] == pytest.approx((0.75 + 0.5) / 2)


def test_the_wilson_interval_is_not_empty_at_its_ends():
    high = 1.959964**2 / (10 + 1.959964**2)  # where 0 lies 1.96 standard errors below it
    assert wilson_interval(0, 10) == pytest.approx((0, high))
    assert wilson_interval(10, 10) == pytest.approx((1 - high, 1))


def test_the_bootstrap_gives_quantiles_or_the_normal_interval():
    """Few values give their quantiles, many the normal interval."""
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)  # means of a quarter of the draws each
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)
    values = [1.0] * 300 + [0.0] * 500 + [-1.0] * 224
    mean = 76 / 1024
    error = math.sqrt((524 / 1024 - mean**2) / 1024)
    normal = (mean - 1.96 * error, mean + 1.96 * error)
    assert bootstrap_interval(values) == pytest.approx(normal, abs=0.1 * error)

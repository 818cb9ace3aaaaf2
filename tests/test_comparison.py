"""eval.py's numbers and table, and the statistics behind them: Wilson, bootstrap."""

import json
import math

import pytest
from helpers import GROUPS, answered
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from data import Problem
from lab.comparison import Candidate, comparison_table, difference, measures
from lab.evaluate import Evaluation, bootstrap_interval, wilson_interval
from lab.recipe import Recipe
from rl.rollout import SamplingSettings

FIRST_ONLY = [group[:1] for group in GROUPS]  # correct, correct, correct, malformed
WORSE = [answered(group[0].problem, *["7-1-2"] * 4) for group in GROUPS[:2]] + GROUPS[2:]


def candidate(groups, greedy=FIRST_ONLY, name="a", limit=256) -> Candidate:
    recipe = Recipe(sampling=SamplingSettings(max_new_tokens=limit))
    return Candidate(name, recipe, Evaluation.of(groups), Evaluation.of(greedy))


def shown(candidates: list[Candidate], differences=(), width=160) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(comparison_table("title", [measures(c) for c in candidates], list(differences)))
    return console.export_text()


def test_measures_by_hand():
    found = json.loads(json.dumps(measures(candidate(GROUPS))))  # as --json writes them
    assert found["accuracy"]["mean"] == 0.5
    assert found["greedy"]["mean"] == 0.75
    assert found["accuracy"]["low"] == pytest.approx(0.1500, abs=1e-4)  # Wilson of 2 in 4
    # 3, 1, 4 and 0 of four are correct; of two draws both miss with chance 0, 3/6, 0 and 1, of three 0, 1/4,
    # 0 and 1.
    assert found["pass_at"] == pytest.approx({"1": 0.5, "2": 0.625, "3": 0.6875, "4": 0.75})
    assert found["outcomes"] == {"correct": 8 / 16, "near": 1 / 16, "wrong": 1 / 16, "malformed": 6 / 16}
    assert {kind: (row["mean"], row["problems"]) for kind, row in found["by_difficulty"].items()} == {
        "3 numbers, + and - suffice": (0.875, 2),
        "3 numbers, needs * or /": (0.25, 1),
        "4 numbers, needs * or /": (0.0, 1),
    }
    assert (found["completion_length"], found["truncated_fraction"], found["non_latin_fraction"]) == (1, 0, 0)


def test_a_difference_is_taken_problem_by_problem():
    found = difference(
        candidate(WORSE, greedy=[g[:1] for g in WORSE], name="before"), candidate(GROUPS, name="after")
    )
    assert (found["from"], found["to"]) == ("before", "after")
    assert found["accuracy"]["mean"] == pytest.approx((0.75 + 0.25) / 4)
    assert found["accuracy"]["low"] == 0
    assert found["accuracy"]["high"] == pytest.approx(0.5625, abs=0.07)
    assert found["greedy"] == {"mean": 0.5, "low": 0.0, "high": 1.0}  # two of four are gained
    back = difference(candidate(GROUPS), candidate(WORSE, greedy=[g[:1] for g in WORSE]))
    assert back["greedy"]["mean"] == -0.5
    assert back["accuracy"]["mean"] == -found["accuracy"]["mean"]


def test_the_table_has_a_column_per_model_and_differences():
    worse, better = candidate(WORSE, name="worse"), candidate(GROUPS, name="better")
    text = shown([worse, better], [difference(worse, better)])
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") > 2}
    assert "25.0 %" in rows["accuracy, sampled"]
    assert "50.0 % (15.0 to 85.0)" in rows["accuracy, sampled"]
    assert "+25.0 points" in rows["sampled, against the first"]
    assert "+0.0 points" in rows["greedy, against the first"]
    assert "87.5 %" in rows["3 numbers, + and - suffice (2)"]
    assert "75.0 %" in rows["pass@4"]
    assert "pass@8" not in text
    single = shown([candidate(FIRST_ONLY)])
    assert "pass@" not in single
    assert "against" not in single


def test_problems_count_alike_whatever_their_samples():
    """k goes up to the samples that all problems have."""
    uneven = [GROUPS[0], answered(Problem((2, 5, 10), 100), "2*5*10", "")]
    found = measures(candidate(uneven))
    assert found["samples"] == 2
    assert set(found["pass_at"]) == {1, 2}
    assert found["pass_at"][1] == pytest.approx((0.75 + 0.5) / 2) == found["accuracy"]["mean"]


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 5000).flatmap(lambda trials: st.tuples(st.integers(0, trials), st.just(trials))))
def test_the_wilson_interval_solves_its_equation(case):
    """The share lies 1.96 standard errors, sqrt(p (1 - p) / n), from each of its ends p."""
    successes, trials = case
    low, high = wilson_interval(successes, trials)
    share = successes / trials
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    assert low < high
    for end in (low, high):
        if 1e-9 < end < 1 - 1e-9:
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / trials), rel=1e-6)


def test_the_bootstrap_gives_quantiles_or_the_normal_interval():
    """Few values give their quantiles, many the normal interval."""
    assert bootstrap_interval([0.0, 1.0]) == (
        0.0,
        1.0,
    )  # means of 0, 1/2 and 1 in a quarter, a half and a quarter of the draws
    assert bootstrap_interval([0.25] * 7) == (0.25, 0.25)
    values = [1.0] * 300 + [0.0] * 500 + [-1.0] * 224
    mean = sum(values) / 1024
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / 1024 / 1024)
    interval = bootstrap_interval(values)
    assert interval == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.1 * error)
    assert interval == bootstrap_interval(values) != bootstrap_interval(values, seed=1)

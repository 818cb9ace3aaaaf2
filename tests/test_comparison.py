"""eval.py's numbers and table: what is said of one model, and of the difference between two."""

import json

import pytest
from rich.console import Console
from test_evaluate import GROUPS, answered

from data import Problem
from lab.comparison import Candidate, comparison_table, difference, measures
from lab.evaluate import Evaluation
from data import Countdown

FIRST_ONLY = [group[:1] for group in GROUPS]  # correct, correct, correct, malformed
WORSE = [answered(group[0].problem, *["7-1-2"] * 4) for group in GROUPS[:2]] + GROUPS[2:]


def candidate(groups, greedy=FIRST_ONLY, name="a", limit=256) -> Candidate:
    return Candidate(name, Countdown(), Evaluation.of(groups), greedy and Evaluation.of(greedy), True, limit)


def shown(candidates: list[Candidate], differences=(), width=160) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(comparison_table("title", [measures(c) for c in candidates], list(differences)))
    return console.export_text()


def test_measures_by_hand():
    found = measures(candidate(GROUPS))
    assert found["accuracy"]["mean"] == 0.5 and found["greedy"]["mean"] == 0.75
    assert found["accuracy"]["low"] == pytest.approx(0.1500, abs=1e-4)  # Wilson of 2 in 4
    # 3, 1, 4 and 0 of four are correct; of two draws both miss with chance 0, 3/6, 0 and 1, of three 0, 1/4, 0 and 1.
    assert found["pass_at"] == pytest.approx({1: 0.5, 2: 0.625, 3: 0.6875, 4: 0.75})
    assert found["majority"] == 0.75  # 2*5*10 comes before its rival 2+5+10
    assert found["distinct_answers"] == 2.0
    assert found["outcomes"] == {"correct": 8 / 16, "near": 1 / 16, "wrong": 1 / 16, "malformed": 6 / 16}
    assert {kind: (row["mean"], row["problems"]) for kind, row in found["by_difficulty"].items()} == {
        "3 numbers, + and - suffice": (0.875, 2),
        "3 numbers, needs * or /": (0.25, 1),
        "4 numbers, needs * or /": (0.0, 1),
    }
    assert (found["completion_length"], found["truncated_fraction"], found["non_latin_fraction"]) == (1, 0, 0)


def test_texts_made_elsewhere_have_no_lengths_and_no_greedy_row():
    found = measures(candidate(GROUPS, greedy=None, limit=None))
    assert not {"greedy", "completion_length", "truncated_fraction"} & found.keys()
    text = shown([candidate(GROUPS, greedy=None, limit=None)])
    assert "greedy" not in text and "length" not in text and "pass@4" in text


def test_a_difference_is_taken_problem_by_problem():
    found = difference(candidate(WORSE, greedy=[g[:1] for g in WORSE], name="before"), candidate(GROUPS, name="after"))
    assert (found["from"], found["to"]) == ("before", "after")
    assert found["accuracy"]["mean"] == pytest.approx((0.75 + 0.25) / 4)
    assert found["accuracy"]["low"] == 0 and found["accuracy"]["high"] == pytest.approx(0.5625, abs=0.07)
    assert found["greedy"] == {"gained": 2, "lost": 0, "mcnemar_p": 0.5}
    back = difference(candidate(GROUPS), candidate(WORSE, greedy=[g[:1] for g in WORSE]))
    assert back["greedy"]["lost"] == 2 and back["accuracy"]["mean"] == -found["accuracy"]["mean"]
    assert "greedy" not in difference(candidate(WORSE, greedy=None), candidate(GROUPS))


def test_the_table_has_a_column_a_model_and_says_the_difference_in_points():
    worse, better = candidate(WORSE, name="worse"), candidate(GROUPS, name="better")
    text = shown([worse, better], [difference(worse, better)])
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") > 2}
    assert "25.0 %" in rows["accuracy, sampled"] and "50.0 % (15.0 to 85.0)" in rows["accuracy, sampled"]
    assert "+25.0 points" in rows["sampled, against the first"] and "p = 1" in rows["greedy: gained, lost"]
    assert "87.5 %" in rows["3 numbers, + and - suffice (2)"]
    assert "75.0 %" in rows["pass@4"] and "pass@8" not in text
    single = shown([candidate(FIRST_ONLY)])
    assert "pass@" not in single and "majority" not in single and "against" not in single


def test_measures_are_json():
    assert json.loads(json.dumps(measures(candidate(GROUPS))))["pass_at"]["4"] == 0.75


def test_unequal_groups_count_what_every_problem_has():
    uneven = [GROUPS[0], answered(Problem((2, 5, 10), 100), "2*5*10", "")]
    found = measures(candidate(uneven, greedy=None))
    assert found["samples"] == 2 and set(found["pass_at"]) == {1, 2}
    assert found["pass_at"][1] == pytest.approx((0.75 + 0.5) / 2) == found["accuracy"]["mean"]

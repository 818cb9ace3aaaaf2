"""What the paper tells in words, as numbers: drift out of the Latin script, near misses paid for, pass@k beside pass@1."""

import json
from dataclasses import replace

import pytest
from helpers import PROBLEM

from data.traces import latin_only, non_latin
from model import Completion
from lab.recipe import RewardSettings
from rl.reward import pay
from rl.rollout import Rollout, paid, rollout_metrics
from data.task import Score
from data.countdown import score

RIGHT = "fine\n</think>\n<answer>79-60+17</answer>"
DRIFTED = "七十九 減 六十\n</think>\n<answer>79-60+17</answer>"


@pytest.mark.parametrize(
    "text, count",
    [
        ("", 0),
        ("79-60=19 ok", 0),
        ("naïve é ß", 0),
        ("π r", 1),
        ("да, yes", 2),
        ("七十九 減 六十", 6),
        ("½ ± ∞ 🙂", 0),
        ("ａ", 1),
    ],
)
def test_letters_outside_the_latin_script_are_counted_one_by_one(text, count):
    assert non_latin(text) == count
    assert latin_only(text) == (count == 0)


def rollout(text: str) -> Rollout:
    return Rollout(PROBLEM, [1], Completion([5] * 4, [-0.5] * 4, True), text, score(text, PROBLEM))


def test_the_guard_pays_nothing_for_drift_and_leaves_the_verdict_alone():
    groups = [[rollout(RIGHT), rollout(DRIFTED), rollout("七")]]
    assert [r.score for r in groups[0]] == [Score(1.0, "correct"), Score(1.0, "correct"), Score(0.0, "malformed")]
    assert paid(groups, RewardSettings()) == groups, "off by default"
    guarded = paid(groups, RewardSettings(latin_only=True))
    assert [r.score for r in guarded[0]] == [Score(1.0, "correct"), Score(0.0, "correct"), Score(0.0, "malformed")]
    assert [r.text for r in guarded[0]] == [r.text for r in groups[0]]
    metrics = rollout_metrics(guarded)
    assert metrics["reward_mean"] == pytest.approx(1 / 3) and metrics["train_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("near_miss, expected", [(True, 0.75), (False, 0.1)])
def test_near_misses_are_paid_for_or_not(near_miss, expected):
    near = score("</think><answer>79-60+17</answer>", replace(PROBLEM, target=37))
    settings = RewardSettings(near_miss=near_miss)
    assert near == Score(0.75, "near") and pay(near, "79", settings) == Score(expected, "near")
    for other in Score(1.0, "correct"), Score(0.1, "wrong"), Score(0.0, "malformed"):
        assert pay(other, "79", settings) == other


def test_the_drifted_share_is_of_all_characters():
    metrics = rollout_metrics([[rollout(RIGHT), rollout(DRIFTED)]])
    assert metrics["non_latin_fraction"] == 6 / (len(RIGHT) + len(DRIFTED))
    assert rollout_metrics([[rollout("")]])["non_latin_fraction"] == 0


def test_pass_at_k_is_logged_for_every_power_of_two_that_a_group_has():
    groups = [[rollout(RIGHT), *[rollout("no")] * 5], [rollout("no")] * 6]
    metrics = rollout_metrics(groups)
    assert {name for name in metrics if name.startswith("pass_at")} == {"pass_at_2", "pass_at_4"}
    assert metrics["train_accuracy"] == pytest.approx(1 / 12)
    assert metrics["pass_at_2"] == pytest.approx((1 / 3) / 2)  # of 15 pairs, 5 hold the correct one
    assert metrics["pass_at_4"] == pytest.approx((2 / 3) / 2)
    assert json.dumps(metrics)


def test_near_misses_are_paid_for_unless_a_recipe_says_otherwise():
    near = score("</think><answer>79-60+17</answer>", replace(PROBLEM, target=37))
    assert pay(near, "", RewardSettings()) == near and near.reward == 0.75

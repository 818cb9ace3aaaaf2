"""What the paper tells in words, as numbers: drift out of the Latin script, and rewards for near misses."""

import pytest
from helpers import PROBLEM

from data import Problem, score
from data.task import CORRECT, MALFORMED, WRONG, Score
from data.traces import non_latin
from lab.metrics import rollout_metrics
from model import Completion
from rl.reward import RewardSettings, reward_for
from rl.rollout import Rollout

RIGHT = "fine\n</think>\n<answer>79-60+17</answer>"
DRIFTED = "七十九 減 六十\n</think>\n<answer>79-60+17</answer>"
COMPLETION = Completion([5] * 4, [-0.5] * 4, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "naïve é ß",
        "Đặng, ŁÓDŹ",
        "79 - 60 = 19",
        "\n\t </think>",
        "→ × ÷ ≠ √2 ½ ∞",
        "🙂👍🏽",
        "٣",
        "¿«»…—",
    ],
)
def test_digits_symbols_and_accents_are_fine(text):
    assert non_latin(text) == 0


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("π r", 1),
        ("да, yes", 2),
        ("七十九 減 六十", 6),
        ("ａ", 1),
        ("so it is с", 1),
        ("لذا", 3),
        ("して", 2),
    ],
)
def test_letters_outside_the_latin_script_are_counted_one_by_one(text, count):
    assert non_latin(text) == count


def rollout(text: str, **settings) -> Rollout:
    verdict = score(text, PROBLEM)
    reward = reward_for(verdict, text, COMPLETION, RewardSettings(**settings))
    return Rollout(PROBLEM, [1], COMPLETION, text, verdict.outcome, reward)


@pytest.mark.parametrize(("settings", "drifted"), [({}, 1.0), ({"latin_only": True}, 0.0)])
def test_the_guard_pays_nothing_for_drift_and_leaves_the_verdict(settings, drifted):
    group = [rollout(text, **settings) for text in (RIGHT, DRIFTED, "七")]
    assert [each.outcome for each in group] == ["correct", "correct", "malformed"]
    assert [each.reward for each in group] == [1.0, drifted, 0.0]
    assert rollout_metrics([group])["train_accuracy"] == pytest.approx(2 / 3)


NEAR = Score(0.75, "near")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1.0, 0.75, 0.1, 0.0]),
        ({"near_miss": False}, [1.0, 0.1, 0.1, 0.0]),
        ({"format": False}, [1.0, 0.75, 0.0, 0.0]),
        ({"near_miss": False, "format": False}, [1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_near_misses_earn_a_part_unless_a_recipe_says_otherwise(settings, expected):
    assert score("</think><answer>79-60+17</answer>", Problem(PROBLEM.numbers, 37)) == NEAR
    rewards = []
    for verdict in (CORRECT, NEAR, WRONG, MALFORMED):
        rewards.append(reward_for(verdict, "79", COMPLETION, RewardSettings(**settings)))
    assert rewards == expected


def test_the_drifted_share_is_of_all_characters():
    metrics = rollout_metrics([[rollout(RIGHT), rollout(DRIFTED)]])
    assert metrics["non_latin_fraction"] == 6 / (len(RIGHT) + len(DRIFTED))
    assert rollout_metrics([[rollout("")]])["non_latin_fraction"] == 0

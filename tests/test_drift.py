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


@pytest.mark.parametrize(
    "text",
    [
        "",
        "naïve é ß",
        "Đặng, ŁÓDŹ",
        "79 - 60 + 17 = 36",
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
    [("π r", 1), ("да, yes", 2), ("七十九 減 六十", 6), ("ａ", 1), ("so it is с", 1), ("άρα", 3), ("لذا", 3),
     ("して", 2), ("그래", 2)],
)  # fmt: skip
def test_letters_outside_the_latin_script_are_counted_one_by_one(text, count):
    assert non_latin(text) == count


def rollout(text: str, settings: RewardSettings = RewardSettings()) -> Rollout:
    verdict, completion = score(text, PROBLEM), Completion([5] * 4, [-0.5] * 4, True)
    reward = reward_for(verdict, text, completion, settings)
    return Rollout(PROBLEM, [1], completion, text, verdict.outcome, reward)


@pytest.mark.parametrize(
    ("settings", "drifted"), [({}, 1.0), ({"latin_only": False}, 1.0), ({"latin_only": True}, 0.0)]
)
def test_the_guard_pays_nothing_for_drift_and_leaves_the_verdict(settings, drifted):
    group = [rollout(text, RewardSettings(**settings)) for text in (RIGHT, DRIFTED, "七")]
    assert [(r.outcome, r.reward) for r in group] == [
        ("correct", 1.0),
        ("correct", drifted),
        ("malformed", 0.0),
    ]
    metrics = rollout_metrics([group])
    assert metrics["reward_mean"] == pytest.approx((1 + drifted) / 3)
    assert metrics["train_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, 0.75), ({"near_miss": True}, 0.75), ({"near_miss": False}, 0.1)]
)
def test_near_misses_earn_a_part_unless_a_recipe_says_otherwise(settings, expected):
    near = score("</think><answer>79-60+17</answer>", Problem(PROBLEM.numbers, 37))
    assert near == Score(0.75, "near")
    plain, unformed = RewardSettings(**settings), RewardSettings(**settings, format=False)
    completion = Completion([5, 6], [-0.5, -0.5], True)
    for verdict, reward, without_format in (
        (CORRECT, 1.0, 1.0), (near, expected, 0.75 if expected == 0.75 else 0.0), (WRONG, 0.1, 0.0),
        (MALFORMED, 0.0, 0.0)
    ):  # fmt: skip
        assert reward_for(verdict, "79", completion, plain) == reward
        assert reward_for(verdict, "79", completion, unformed) == without_format


def test_the_drifted_share_is_of_all_characters():
    metrics = rollout_metrics([[rollout(RIGHT), rollout(DRIFTED)]])
    assert metrics["non_latin_fraction"] == 6 / (len(RIGHT) + len(DRIFTED))
    assert rollout_metrics([[rollout("")]])["non_latin_fraction"] == 0

"""Accuracy, its interval, and the counts and shares that an evaluation and a metrics line report."""

import hashlib
from dataclasses import replace
from unittest import mock

import pytest
from helpers import GROUPS, PROBLEM, one_step

import lab.run
from data import Problem
from lab.evaluate import Evaluation, problems_hash
from lab.metrics import common_form, rollout_metrics
from lab.recipe import problems_of
from lab.runfolder import RunFolder
from lab.stages import train
from model import Completion
from rl.rollout import Rollout


def rollout(reward: float, outcome: str, tokens: int, finished: bool = True) -> Rollout:
    completion = Completion([5] * tokens, [-0.5] * tokens, finished)
    return Rollout(PROBLEM, [1, 2], completion, "", outcome, reward)


def test_an_evaluation_counts_outcomes_lengths_and_truncations():
    groups = [[rollout(1.0, "correct", 2)] for _ in range(8)]
    groups += [[rollout(0.75, "near", 10)], [rollout(0.0, "malformed", 14, finished=False)]]
    result = Evaluation.of(groups)
    assert result.counts == {"correct": 8, "near": 1, "wrong": 0, "malformed": 1}
    assert result.accuracy == 0.8
    assert result.completion_length == 4.0
    assert result.truncated_fraction == 0.1
    assert (result.low, result.high) == pytest.approx((0.490162, 0.943318), abs=1e-6)  # Wilson


def test_the_hash_of_problems_follows_content_and_order():
    problems = [PROBLEM, Problem((1, 2, 3), 10)]
    assert problems_hash([PROBLEM]) == hashlib.sha256(b"[[[79, 60, 17], 36]]").hexdigest()[:12]
    assert problems_hash(problems) != problems_hash(problems[::-1])


def test_rollout_metrics_by_hand():
    groups = [
        [rollout(1.0, "correct", 2), rollout(0.1, "wrong", 4)],
        [rollout(0.0, "malformed", 8, finished=False), rollout(0.0, "malformed", 2)],
    ]
    found = rollout_metrics(groups)
    assert found.pop("common_form") == ""
    assert found == pytest.approx({
        "reward_mean": 0.275, "train_accuracy": 0.25, "format_rate": 0.5, "entropy": 0.5,
        "completion_length": 4.0, "truncated_fraction": 0.25, "silent_groups": 0.5, "tokens": 16,
        "near_fraction": 0.0, "non_latin_fraction": 0.0, "pass_at_2": 0.5, "common_form_fraction": 0.0,
    })  # fmt: skip
    logged = [name for name in rollout_metrics(GROUPS) if name.startswith("pass_at")]
    assert logged == ["pass_at_2", "pass_at_4"]  # every power of two that a group of four has


def test_the_common_form_of_answers_by_hand():
    answers = ["<answer>1+20*3</answer>", "x <answer>4 + 5*6</answer>", "<answer>7-8</answer>", "<answer>"]
    assert common_form(answers) == ("n+n*n", pytest.approx(2 / 3))
    assert common_form(["<answer>1</answer><answer>2+3</answer>"]) == ("n+n", 1.0)  # the last one counts


def test_a_run_ends_with_all_held_out_problems_in_both_ways(monkeypatch, tmp_path):
    """Sampled, and greedy."""
    recipe = one_step(f"--out {tmp_path} --evaluation.problems 4 --evaluation.final-problems 7")
    three, half, all_correct = (Evaluation.of(GROUPS[start:end]) for start, end in ((0, 3), (0, 2), (2, 3)))
    evaluate = mock.Mock(side_effect=[three, half, all_correct])
    monkeypatch.setattr(lab.run, "evaluate", evaluate)
    train(replace(recipe, stages=()), quiet=True)
    held_out = problems_of(recipe)[1]
    assert [call.args[3] for call in evaluate.call_args_list] == [held_out[:4], held_out, held_out]
    settings = [call.kwargs["sampling"] for call in evaluate.call_args_list]
    assert [sampling.temperature for sampling in settings] == [1.0, 1.0, 0.0]
    (row,) = RunFolder(tmp_path).metrics()
    assert row["eval_accuracy"] == three.accuracy
    assert row["final_accuracy"] == half.accuracy
    assert row["final_greedy_accuracy"] == all_correct.accuracy

"""Accuracy, its interval, and the counts and shares that an evaluation and a metrics line report."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers import PROBLEM, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import rl.stages
from data import Problem
from model import Completion, Tokenizer
from model.weights import TINY
from rl import score
from rl.evaluate import Evaluation, accuracy_by_difficulty, distinct_answers, evaluate, wilson_interval
from rl.problems import problems_of
from rl.recipe import EvaluationSettings, SamplingSettings
from rl.recipe_file import load_recipe
from rl.reward import Score
from rl.rollout import Rollout, collect_rollouts, judge, pass_at_k, reward_tensor, rollout_metrics
from rl.runfolder import RunFolder
from rl.stages import train

PROBLEMS = [Problem((1, 2, number), 10) for number in range(1, 6)]


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


def rollout(reward: float, outcome: str, tokens: int = 4, finished: bool = True) -> Rollout:
    completion = Completion([5] * tokens, [-0.5] * tokens, finished)
    return Rollout(PROBLEM, [1, 2], completion, "", Score(reward, outcome))


def test_an_evaluation_counts_outcomes_lengths_and_truncations(monkeypatch):
    made = [[rollout(1.0, "correct", 2)] for _ in range(8)] + [
        [rollout(0.75, "near", 10)],
        [rollout(0.0, "malformed", 14, finished=False)],
    ]
    asked = []

    def collect(model, tokenizer, problems, num_samples, sampling, seed, progress):
        asked.append((problems, num_samples, sampling, seed))
        return made

    monkeypatch.setattr("rl.evaluate.collect_rollouts", collect)
    sampling = SamplingSettings(max_new_tokens=14)
    result = evaluate(None, None, PROBLEMS * 2, sampling, seed=3)
    assert asked == [(PROBLEMS * 2, 1, sampling, 3)]
    assert result.counts == {"correct": 8, "near": 1, "wrong": 0, "malformed": 1}
    assert (result.accuracy, result.completion_length, result.truncated_fraction) == (0.8, 4.0, 0.1)
    assert result.groups == made
    assert (result.low, result.high) == pytest.approx((0.490162, 0.943318), abs=1e-6)


def answered(problem: Problem, *answers: str) -> list[Rollout]:
    """A group of completions with these answers, scored as usual; an empty one gives no answer at all."""
    texts = [f"</think>\n<answer>{answer}</answer>" if answer else "</think>\n" for answer in answers]
    return [Rollout(problem, [1], Completion([5], [-0.5], True), text, score(text, problem)) for text in texts]


GROUPS = [
    answered(Problem((1, 2, 7), 10), "1+2+7", "7+1+2", "7+1+2", "7-1-2"),  # 3 of 4 correct, 3 different answers
    answered(Problem((2, 5, 10), 100), "2*5*10", "", "", "2+5+10"),  # 1 of 4, 2 different
    answered(Problem((3, 5, 4), 12), "3+5+4", "3+5+4", "3+4+5", "5+4+3"),  # 4 of 4, 3 different
    answered(Problem((3, 3, 8, 8), 24), "", "", "", ""),  # only 8 / (3 - 8 / 3): none, none
]


def test_accuracy_is_told_apart_where_a_multiplication_is_needed_trap_whole_hides_it():
    assert accuracy_by_difficulty(GROUPS) == {
        "3 numbers, + and - suffice": (0.875, 2),
        "3 numbers, needs * or /": (0.25, 1),
        "4 numbers, needs * or /": (0.0, 1),
    }


def test_pass_at_k_equals_the_mean_over_every_choice_of_k_completions():
    for k in range(1, 5):
        by_hand = []
        for group in GROUPS:
            choices = list(itertools.combinations([r.score.outcome == "correct" for r in group], k))
            by_hand.append(sum(map(any, choices)) / len(choices))
        assert pass_at_k(GROUPS, k) == pytest.approx(sum(by_hand) / len(by_hand))


def test_distinct_answers_count_what_pass_at_1_cannot_see():
    assert distinct_answers(GROUPS) == (3 + 2 + 3 + 0) / 4
    assert distinct_answers([GROUPS[3]]) == 0


def test_rollout_metrics_by_hand():
    groups = [
        [rollout(1.0, "correct", 2), rollout(0.1, "wrong", 4)],
        [rollout(0.0, "malformed", 8, finished=False), rollout(0.0, "malformed", 2)],
    ]
    assert rollout_metrics(groups) == pytest.approx({
        "reward_mean": 0.275, "train_accuracy": 0.25, "format_rate": 0.5, "entropy": 0.5, "completion_length": 4.0,
        "truncated_fraction": 0.25, "silent_groups": 0.5, "tokens": 16, "near_fraction": 0.0, "non_latin_fraction": 0.0,
        "pass_at_2": 0.5,
    })  # fmt: skip
    assert torch.equal(reward_tensor(groups), torch.tensor([[1.0, 0.1], [0.0, 0.0]]))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(TINY)


@pytest.fixture(scope="module")
def model(tokenizer):
    model = random_model(std=0.1, vocab_size=len(tokenizer) + 3)
    model.num_tokens = len(tokenizer)
    return model


@pytest.mark.parametrize("finished", [True, False])
def test_the_stop_token_is_cut_off_before_judging_and_a_truncated_end_is_not(tokenizer, finished):
    """A truncated completion whose last token completes the answer is judged with that token."""
    ids = tokenizer.encode("so\n</think>\n<answer>79-60+17</answer>")
    if finished:
        ids.append(tokenizer.end_of_turn_id)
    judged = judge(PROBLEM, [1], Completion(ids, [-1.0] * len(ids), finished), tokenizer, thinking=True)
    assert judged.text == "so\n</think>\n<answer>79-60+17</answer>"
    assert judged.score == Score(1.0, "correct")
    without_prompt_tag = judge(PROBLEM, [1], Completion(ids, [-1.0] * len(ids), finished), tokenizer, thinking=False)
    assert without_prompt_tag.score.outcome == "malformed"


def test_an_evaluation_repeats_itself_and_does_not_depend_on_how_much_is_decoded_at_once(model, tokenizer):
    def texts(room, seed=1):
        sampling = SamplingSettings(max_new_tokens=12, max_cache_tokens=room)
        return [group[0].text for group in evaluate(model, tokenizer, PROBLEMS, sampling, seed).groups]

    assert texts(None) == texts(None) == texts(300) == texts(150)
    assert texts(None, seed=2) != texts(None)


def test_rollouts_stand_where_their_problems_do(model, tokenizer):
    groups = collect_rollouts(model, tokenizer, PROBLEMS, 3, SamplingSettings(max_new_tokens=6), seed=1)
    assert [[rollout.problem for rollout in group] for group in groups] == [[problem] * 3 for problem in PROBLEMS]
    for problem, group in zip(PROBLEMS, groups, strict=True):
        assert f"numbers {', '.join(map(str, problem.numbers))} " in tokenizer.decode(group[0].prompt_ids)
        assert len({rollout.text for rollout in group}) > 1


def test_the_same_problem_twice_makes_two_groups_of_different_completions(model, tokenizer):
    """Two groups from one random stream would be one group counted twice."""
    sampling = SamplingSettings(max_new_tokens=12)
    first, second = collect_rollouts(model, tokenizer, [PROBLEM, PROBLEM], 2, sampling, seed=1)
    assert {rollout.text for rollout in first}.isdisjoint(rollout.text for rollout in second)


@pytest.mark.parametrize("final, sizes", [(7, [4, 7, 7]), (0, [4])])
def test_a_run_ends_with_all_of_its_held_out_problems_as_sampled_and_greedy(monkeypatch, tmp_path, final, sizes):
    recipe = load_recipe("256", "tiny")[1]
    recipe = replace(
        recipe, stages=(), out=str(tmp_path), generated_problems=40,
        evaluation=EvaluationSettings(problems=4, final_problems=final),
    )  # fmt: skip
    asked = []

    def evaluated(model, tokenizer, problems, sampling, seed, quiet):
        asked.append((problems, sampling.temperature))
        return Evaluation(len(asked) / 10, 0.0, 1.0, {}, 5.0, 0.0, [])

    monkeypatch.setattr(rl.stages, "evaluate", evaluated)
    train(recipe, quiet=True)
    held_out = problems_of(recipe)[1]
    assert [(problems, t) for problems, t in asked] == [(held_out[:n], t) for n, t in zip(sizes, (1.0, 1.0, 0.0))]
    (row,) = RunFolder(tmp_path).metrics()
    assert row["eval_accuracy"] == 0.1
    finals = {name: value for name, value in row.items() if name.endswith("accuracy") and name.startswith("final")}
    assert finals == ({"final_accuracy": 0.2, "final_greedy_accuracy": 0.3} if final else {})

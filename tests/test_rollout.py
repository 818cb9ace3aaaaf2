"""From problems to scored completions: every setting reaches the sampler, and the scorer sees everything."""

import json
import threading
from dataclasses import replace
from unittest import mock

import pytest
from helpers import FakeTask, FakeTokenizer, random_model

import rl.rollout
from data import GSM8K, Calculus, Countdown
from data.task import Score
from model import Completion, load_model
from model.sampler import Cancelled
from rl.reward import RewardSettings
from rl.rollout import Rollout, SamplingSettings, collect_rollouts, prompt_for


def collect(task, **options):
    options = {"sampling": SamplingSettings(max_new_tokens=30), "num_samples": 2, "seed": 5} | options
    return collect_rollouts(random_model(std=0.1), FakeTokenizer(), task, ["ab", "c", "ab"], **options)


def test_rollouts_hold_what_was_sampled_decoded_and_scored(monkeypatch):
    truncated = Completion([5, 7, 9], [-1.0] * 3, False)
    finished = Completion([5, 7, 1], [-1.0] * 3, True)
    generate = mock.Mock(return_value=[[truncated, finished]] * 3)
    monkeypatch.setattr(rl.rollout, "generate", generate)
    task = FakeTask(None)
    task.score = mock.Mock(return_value=Score(0.7, "near"))
    sampling = SamplingSettings(9, temperature=0.6, thinking=False, max_cache_tokens=77, top_k=3, top_p=0.8)
    cancel = threading.Event()
    groups = collect(
        task, sampling=sampling, reward=RewardSettings(near_miss=False), on_progress=print, cancel=cancel
    )
    [called] = generate.call_args_list
    assert called.args[1] == [[1, 2], [3], [1, 2]]
    assert called.kwargs == {
        "num_samples": 2, "max_new_tokens": 9, "temperature": 0.6, "stop_token_ids": (0, 1, 2), "seed": 5,
        "top_k": 3, "top_p": 0.8, "max_cache_tokens": 77, "only": slice(0, None, 1), "on_progress": print,
        "cancel": cancel,
    }  # fmt: skip
    # The stop token is cut off before scoring; the last token of a truncated completion is not.
    texts = ("5 7 9", "5 7")
    scored = [mock.call(text, problem, False) for problem in ("ab", "c", "ab") for text in texts]
    assert task.score.call_args_list == scored
    pays = ("near", 0.1)  # with these reward settings
    assert groups[1] == [
        Rollout("c", [3], truncated, "5 7 9", *pays),
        Rollout("c", [3], finished, "5 7", *pays),
    ]


@pytest.mark.parametrize("task", [Countdown(), Calculus(), GSM8K()])
def test_a_prompt_speaks_of_thinking_and_limits_only_if_asked(task):
    example = task.problem_from_row(json.loads(task.file_format.example))
    tokenizer = load_model("tiny")[1]

    def prompt(**settings) -> str:
        return tokenizer.decode(prompt_for(tokenizer, task, example, SamplingSettings(**settings)))

    assert "<think> </think>" in prompt()
    assert prompt().endswith("<think>\n")
    assert "tokens" not in prompt()
    without = prompt(thinking=False)
    assert without.count("<think>") == without.count("</think>") == 1
    assert without.endswith("<think>\n\n</think>\n\n")
    assert "<answer> </answer>" in without
    assert "at most 512 tokens in all.<|im_end|>" in prompt(max_new_tokens=512, state_limit=True)


@pytest.mark.parametrize("task, thinking", [(Countdown(), True), (Calculus(), False), (GSM8K(), True)])
def test_examples_are_solved_problems_as_earlier_turns(task, thinking):
    problem = task.problem_from_row(json.loads(task.file_format.example))
    tokenizer = load_model("tiny")[1]
    settings = SamplingSettings(thinking=thinking)
    plain = tokenizer.decode(prompt_for(tokenizer, task, problem, settings))
    text = tokenizer.decode(prompt_for(tokenizer, task, problem, replace(settings, examples=2)))
    assert text.endswith(plain)
    for example in task.examples(2):
        _, asked, after = text.partition(f"<|im_start|>user\n{task.prompt(example, thinking)}<|im_end|>\n")
        assert asked
        assert after.startswith("<|im_start|>assistant\n" + "<think>\n" * thinking)
        answer = after.partition("assistant\n")[2].removeprefix("<think>\n").partition("<|im_end|>")[0]
        assert task.score(answer, example, thinking).outcome == "correct"
    assert text.count("<|im_start|>user") == 3


def test_a_reward_sees_text_and_ids_and_leaves_the_outcome(monkeypatch):
    reward_for = mock.Mock(side_effect=[5.0, 6.0] * 3)
    monkeypatch.setattr(rl.rollout, "reward_for", reward_for)
    for rollout in collect(FakeTask(lambda problem, text: 1.0))[2]:
        verdict = Score(1.0, "correct")
        assert mock.call(verdict, rollout.text, rollout.completion, RewardSettings()) in reward_for.mock_calls
        assert rollout.reward in (5.0, 6.0)
        assert rollout.outcome == "correct"


def test_an_error_of_the_scorer_ends_the_step_at_once():
    reward = mock.Mock(side_effect=ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        collect(FakeTask(reward))
    reward.assert_called_once()


def test_a_cancelled_rollout_scores_nothing():
    reward, cancel = mock.Mock(), threading.Event()
    with pytest.raises(Cancelled):
        collect(FakeTask(reward), cancel=cancel, on_progress=lambda *report: cancel.set())
    reward.assert_not_called()

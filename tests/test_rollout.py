"""From problems to scored completions: every setting reaches the sampler, and the scorer sees everything."""

import json
import threading
from unittest import mock

import pytest
from helpers import FakeTask, FakeTokenizer, random_model

import rl.rollout
from data import GSM8K, Calculus, Countdown
from data.task import Score
from model import Completion, load_model
from model.sampler import Cancelled
from rl.reward import RewardSettings
from rl.rollout import SamplingSettings, collect_rollouts, prompt_for


def collect(task, **options):
    options = {"sampling": SamplingSettings(max_new_tokens=30), "num_samples": 2, "seed": 5} | options
    return collect_rollouts(random_model(std=0.1), FakeTokenizer(), task, ["ab", "c", "ab"], **options)


def test_rollouts_hold_what_was_sampled_decoded_and_scored(monkeypatch):
    calls, scored = [], []
    truncated, finished = Completion([5, 7, 9], [-1.0] * 3, False), Completion([5, 7, 1], [-1.0] * 3, True)

    class Task(FakeTask):
        def score(self, text, problem, thinking):
            scored.append((text, problem, thinking))
            return Score(0.7, "near")

    def fake(model, prompts, **options):
        calls.append(options | {"prompts": prompts})
        return [[truncated, finished]] * len(prompts)

    monkeypatch.setattr(rl.rollout, "generate", fake)
    sampling = SamplingSettings(9, temperature=0.6, thinking=False, max_cache_tokens=77, top_k=3, top_p=0.8)
    options = dict(reward=RewardSettings(near_miss=False), on_progress=print, cancel=threading.Event())
    groups = collect(Task(None), sampling=sampling, **options)
    assert calls == [{
        "prompts": [[1, 2], [3], [1, 2]], "num_samples": 2, "max_new_tokens": 9, "temperature": 0.6,
        "stop_token_ids": (0, 1, 2), "seed": 5, "top_k": 3, "top_p": 0.8, "max_cache_tokens": 77,
        "only": slice(0, None, 1), "on_progress": print, "cancel": options["cancel"],
    }]  # fmt: skip
    # The stop token is cut off before scoring; the last token of a truncated completion is not.
    assert scored == [(text, problem, False) for problem in ("ab", "c", "ab") for text in ("5 7 9", "5 7")]
    for group, problem, prompt in zip(groups, ("ab", "c", "ab"), calls[0]["prompts"], strict=True):
        assert [(r.problem, r.prompt_ids, r.completion, r.text) for r in group] == [
            (problem, prompt, truncated, "5 7 9"), (problem, prompt, finished, "5 7"),
        ]  # fmt: skip
        assert [(r.outcome, r.reward) for r in group] == [("near", 0.1)] * 2  # what these reward settings pay


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


@pytest.mark.parametrize("task", [Countdown(), Calculus(), GSM8K()])
@pytest.mark.parametrize("thinking", [True, False])
def test_examples_are_solved_problems_as_earlier_turns(task, thinking):
    problem = task.problem_from_row(json.loads(task.file_format.example))
    tokenizer = load_model("tiny")[1]
    plain = prompt_for(tokenizer, task, problem, SamplingSettings(thinking=thinking))
    text = tokenizer.decode(
        prompt_for(tokenizer, task, problem, SamplingSettings(thinking=thinking, examples=2))
    )
    assert text.endswith(tokenizer.decode(plain))
    for example in task.examples(2):
        _, asked, after = text.partition(f"<|im_start|>user\n{task.prompt(example, thinking)}<|im_end|>\n")
        assert asked
        assert after.startswith("<|im_start|>assistant\n" + "<think>\n" * thinking)
        answer = after.partition("assistant\n")[2].removeprefix("<think>\n").partition("<|im_end|>")[0]
        assert task.score(answer, example, thinking).outcome == "correct"
    assert text.count("<|im_start|>user") == 3


def test_a_reward_sees_text_and_ids_and_leaves_the_outcome(monkeypatch):
    def shorter_is_better(verdict, text, completion, settings) -> float:
        assert text
        assert settings == RewardSettings()
        return verdict.reward - len(completion.token_ids)

    monkeypatch.setattr(rl.rollout, "reward_for", shorter_is_better)
    groups = collect(FakeTask(lambda problem, text: 1.0))
    rollouts = [rollout for group in groups for rollout in group]
    lengths = [len(rollout.completion.token_ids) for rollout in rollouts]
    assert [rollout.reward for rollout in rollouts] == [1.0 - length for length in lengths]
    assert {rollout.outcome for rollout in rollouts} == {"correct"}
    assert len(set(lengths)) > 1


def test_an_error_of_the_scorer_ends_the_step_at_once():
    reward = mock.Mock(side_effect=ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        collect(FakeTask(reward))
    reward.assert_called_once()


def test_a_cancelled_rollout_scores_nothing():
    reward, cancel = mock.Mock(), threading.Event()

    def stop(*report):
        cancel.set()

    with pytest.raises(Cancelled):
        collect(FakeTask(reward), cancel=cancel, on_progress=stop)
    reward.assert_not_called()

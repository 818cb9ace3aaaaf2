"""Completions are judged while others are still sampled, and no verdict, error or interruption differs for it."""

import threading
import time

import pytest
import torch
from helpers import random_model

import rl.rollout
from data import generate_problems
from model import generate, load_model
from lab.signals import RolloutsDropped
from lab.recipe import SamplingSettings
from rl.rollout import Actor, collect_rollouts
from data import Countdown

PROMPTS = [[5, 17, 3, 44, 9], [8, 2], [40, 2, 2, 30, 31, 12, 4, 4, 25], [19, 6, 40], [8, 1, 37, 20, 3, 9, 13]]
SAMPLING = SamplingSettings(max_new_tokens=120)
PROBLEMS = generate_problems(4, seed=3)
judge = Actor.judge


@pytest.fixture(scope="module")
def tiny():
    return Actor(*load_model("tiny"), Countdown(), SAMPLING)


@pytest.mark.parametrize("room", [None, 80], ids=["one wave", "groups in parts"])
@pytest.mark.parametrize("only", [slice(None), slice(1, None, 2), slice(9, None)], ids=["all", "some", "none"])
def test_each_completion_is_handed_over_once_with_its_place(room, only):
    found = {}

    def hand_over(prompt, sample, completion):
        assert (prompt, sample) not in found
        found[prompt, sample] = completion

    options = dict(num_samples=4, max_new_tokens=23, stop_token_ids=range(0, 48, 6), seed=5, max_cache_tokens=room, only=only)
    groups = generate(random_model(std=0.2), PROMPTS, **options, on_completion=hand_over)
    assert found == {(p, s): completion for p, group in enumerate(groups) for s, completion in enumerate(group)}
    assert groups == generate(random_model(std=0.2), PROMPTS, **options)


def test_a_completion_is_handed_over_before_the_others_are_done():
    done_at = []  # for each completion, how many tokens had been sampled when it came
    tokens = [0]
    groups = generate(
        random_model(std=0.2), PROMPTS, num_samples=4, max_new_tokens=60, stop_token_ids=range(0, 48, 6), seed=5,
        progress=lambda done, count: tokens.__setitem__(0, count), on_completion=lambda *_: done_at.append(tokens[0]),
    )  # fmt: skip
    total = sum(len(completion.token_ids) for group in groups for completion in group)
    assert sum(at < 0.8 * total for at in done_at) > 10


def as_scored_afterwards(actor):
    prompts = [rollout[0].prompt_ids for rollout in collect_rollouts(actor, PROBLEMS, 1, seed=1)]
    options = dict(num_samples=4, max_new_tokens=120, stop_token_ids=actor.tokenizer.stop_token_ids, seed=1)
    groups = generate(actor.model, prompts, **options)
    return [
        [actor.judge(problem, prompt, completion) for completion in group]
        for problem, prompt, group in zip(PROBLEMS, prompts, groups, strict=True)
    ]


@pytest.mark.parametrize("seconds", [0, 0.02], ids=["fast", "slow"])
def test_verdicts_are_those_of_scoring_afterwards_and_some_are_there_before_sampling_ends(seconds, tiny, monkeypatch):
    events = []

    def slow(*arguments):
        time.sleep(seconds)
        events.append("judged")
        return judge(*arguments)

    def generate_and_say(*arguments, **options):
        generate(*arguments, **options)
        events.append("sampled")

    expected = as_scored_afterwards(tiny)
    monkeypatch.setattr(Actor, "judge", slow)
    monkeypatch.setattr(rl.rollout, "generate", generate_and_say)
    assert collect_rollouts(tiny, PROBLEMS, 4, seed=1) == expected
    assert events.count("judged") == 16 and events[0] == "judged"


def test_an_error_of_the_scorer_comes_out_as_it_is_and_the_rest_is_not_scored(tiny, monkeypatch):
    judged = []

    def raising(*arguments):
        judged.append(arguments)
        time.sleep(0.02)
        raise ZeroDivisionError("in the scorer")

    def at_once(model, prompts, *, on_completion, **options):
        for prompt, group in enumerate(generate(model, prompts, **options)):
            for sample, completion in enumerate(group):
                on_completion(prompt, sample, completion)

    monkeypatch.setattr(Actor, "judge", raising)
    monkeypatch.setattr(rl.rollout, "generate", at_once)
    with pytest.raises(ZeroDivisionError, match="in the scorer"):
        collect_rollouts(tiny, PROBLEMS, 4, seed=1)
    assert len(judged) < 4


@pytest.mark.parametrize("error", [RolloutsDropped, KeyboardInterrupt])
def test_who_breaks_off_does_not_wait_for_verdicts(error, tiny, monkeypatch):
    judging, go_on = threading.Event(), threading.Event()
    judged, waited = [], []

    def stuck(*arguments):
        judged.append(arguments)
        judging.set()
        waited.append(go_on.wait(0 if waited else 20))

    def progress(done, tokens):
        if judging.is_set():
            raise error

    before = set(threading.enumerate())
    monkeypatch.setattr(Actor, "judge", stuck)
    with pytest.raises(error):
        collect_rollouts(tiny, PROBLEMS, 4, 1, progress)
    assert len(judged) == 1 and not waited  # the one at hand has not ended
    go_on.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()
    assert len(judged) == 1 and waited == [True]


def test_judging_aside_leaves_no_thread_behind_and_gradients_as_they_were(tiny):
    before = threading.active_count()
    collect_rollouts(tiny, PROBLEMS, 2, seed=1)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and "ThreadPool" in thread.name:
            thread.join(10)
    assert threading.active_count() <= before

"""The GRPO update: the same however the batch is divided, on-policy at first, clipped once the weights have moved."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import gradients, largest, largest_gap, learner, ragged_samples, random_model, rollouts
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Problem
from model import Completion, generate
from rl import grpo_loss
from rl.batch import completion_logprobs, make_batch, micro_batches
from rl.grpo import accumulate_gradient, group_samples, grpo_update, recompute_logprobs
from rl.loss import AGGREGATIONS, loss_denominator
from lab.recipe import endless_problems
from lab.recipe import GRPOStage
from lab.steps import learning_rate

REWARDS = [[1.0, 0.0, 0.1, 0.1], [0.0, 0.1, 1.0, 1.0], [0.8, 0.3, 0.1, 0.0], [0.0, 0.0, 0.0, 1.0]]


def fresh_groups(model, rewards=REWARDS, temperature: float = 1.0):
    """Groups sampled from the model itself, with rewards of the test's choice."""
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8], [4]][: len(rewards)]
    completions = generate(
        model, prompts, num_samples=len(rewards[0]), max_new_tokens=8, temperature=temperature,
        stop_token_ids=[0, 1, 2], seed=1,
    )  # fmt: skip
    return rollouts(completions, rewards, prompts)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kl_coef", [0.0, 0.2], ids=["plain", "kl"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradient_and_logged_loss_do_not_depend_on_micro_batches_trap_last_ones_loss_logged(aggregation, kl_coef):
    """Ragged rows in 1, 2, 4 ... micro-batches, against one autograd pass over the whole batch."""
    model, reference = random_model(1, torch.float64), random_model(2, torch.float64)
    samples = ragged_samples(12, seed=4)
    stage = GRPOStage(aggregation=aggregation, kl_coef=kl_coef, clip_low=0.2, clip_high=0.4)

    batch = make_batch(samples)
    with torch.no_grad():
        ref_logprobs = completion_logprobs(reference, batch)
    lengths = [len(sample.completion_ids) for sample in samples]
    loss = grpo_loss(
        completion_logprobs(model, batch), batch.old_logprobs, batch.advantages, batch.mask, 0.2, 0.4,
        aggregation=aggregation, denominator=loss_denominator(lengths, 8, aggregation),
        ref_logprobs=ref_logprobs, kl_coef=kl_coef,
    )  # fmt: skip
    loss.backward()
    whole = gradients(model)
    assert largest(whole) > 1e-3

    counts, clipped = [], set()
    for budget in (10_000, 110, 70, 40, 20, 1):
        counts.append(len(micro_batches(samples, budget)))
        result = accumulate_gradient(replace(learner(model, budget), reference=reference if kl_coef else None), samples, stage)
        assert largest_gap(gradients(model), whole) < 1e-9
        assert result["loss"] == pytest.approx(loss.item(), abs=1e-6)
        clipped.add((result["clipped_low"], result["clipped_high"]))
    assert {1, 2, 12} <= set(counts) and len(set(counts)) >= 5, counts
    assert len(clipped) == 1 and min(clipped.pop()) > 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_update_does_not_depend_on_micro_batches(aggregation):
    stage = GRPOStage(updates_per_step=2, prompts_per_step=4, aggregation=aggregation)
    outcomes = []
    for budget in (10_000, 40, 1):
        model = random_model(1)
        metrics = grpo_update(learner(model, budget), group_samples(fresh_groups(model)), stage, learning_rate=1e-3)
        assert metrics.pop("micro_batch_tokens") == budget
        outcomes.append((metrics, weights(model)))
    for metrics, after in outcomes[1:]:
        assert metrics == pytest.approx(outcomes[0][0], rel=1e-3, abs=1e-6)
        assert largest_gap(after, outcomes[0][1]) < 1e-4


def test_silent_groups_count_in_the_average_but_not_in_the_work():
    """A batch with one group of two silent has half the gradient of that group alone (all completions equally long)."""
    model = random_model(1, torch.float64)
    samples = [replace(sample, completion_ids=[5] * 4, old_logprobs=[-4.0] * 4) for sample in ragged_samples(4)]
    loud, silent = samples[:2], [replace(sample, advantage=0.0) for sample in samples[2:]]
    seen = []
    model.model.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    accumulate_gradient(learner(model), loud, GRPOStage())
    alone = gradients(model)
    accumulate_gradient(learner(model), loud + silent, GRPOStage())
    together = gradients(model)
    assert largest_gap(together, {name: gradient / 2 for name, gradient in alone.items()}) < 1e-9
    assert seen[0] == seen[1] > 0


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_groups_of_equal_rewards_leave_every_weight_as_it_is(kind):
    """0.1 and 0.3 have rounding errors in their mean; none of it may reach a weight, weight decay included."""
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    model = random_model()
    before = weights(model)
    groups = fresh_groups(model, [[0.1] * 4, [0.3] * 4])
    stage = GRPOStage(prompts_per_step=2, updates_per_step=2)
    metrics = grpo_update(learner(model, kind=kind, weight_decay=0.1), group_samples(groups), stage, learning_rate=0.1)
    assert metrics["grad_norm"] == 0 and metrics["loss"] == 0 and metrics["clip_fraction"] == 0
    assert all(torch.equal(before[name], after) for name, after in weights(model).items())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_clip_fraction_is_zero_on_the_first_update_of_a_batch(temperature):
    model = random_model(std=0.4)
    groups = fresh_groups(model, temperature=temperature)
    stage = GRPOStage(updates_per_step=1, clip_low=1e-3, clip_high=1e-3)
    metrics = grpo_update(learner(model, temperature=temperature), group_samples(groups), stage, learning_rate=0.5)
    assert metrics["clip_fraction"] == metrics["clip_fraction_low"] == metrics["clip_fraction_high"] == 0
    assert metrics["grad_norm"] > 0.01 and abs(metrics["loss"]) < 0.5


def test_the_clip_binds_once_the_weights_have_moved_low_and_high_apart_trap_clip_never_binds():
    """Two updates with a large rate: the second share's counts are worked out again from a model stopped in between."""
    model = random_model(std=0.4)
    twin = copy.deepcopy(model)
    groups = fresh_groups(model)
    stage = GRPOStage(updates_per_step=2, prompts_per_step=4)
    metrics = grpo_update(learner(model, 40), group_samples(groups), stage, learning_rate=0.05)

    samples = group_samples(groups)
    other = learner(twin, 40)
    accumulate_gradient(other, [sample for group in samples[0::2] for sample in group], stage)
    other.step(0.05)
    low = high = 0
    for sample in (sample for group in samples[1::2] for sample in group):
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        logprobs = twin(ids)[0].log_softmax(-1)
        for place, (token, old) in enumerate(zip(sample.completion_ids, sample.old_logprobs, strict=True)):
            ratio = math.exp(logprobs[len(sample.prompt_ids) - 1 + place, token].item() - old)
            low += sample.advantage < 0 and ratio < 0.75
            high += sample.advantage > 0 and ratio > 1.25
    tokens = sum(len(sample.completion_ids) for group in samples for sample in group)
    assert low > 0 and high > 0 and low != high
    assert metrics["clip_fraction_low"] == pytest.approx(low / tokens)
    assert metrics["clip_fraction_high"] == pytest.approx(high / tokens)
    assert metrics["clip_fraction"] == pytest.approx((low + high) / tokens)


def test_each_clip_range_governs_its_own_side():
    def fractions(**clip):
        model = random_model(std=0.4)
        stage = GRPOStage(updates_per_step=2, prompts_per_step=4, **clip)
        metrics = grpo_update(learner(model), group_samples(fresh_groups(model)), stage, learning_rate=0.05)
        return metrics["clip_fraction_low"] > 0, metrics["clip_fraction_high"] > 0

    assert fractions(clip_low=0.1, clip_high=1e9) == (True, False)
    assert fractions(clip_low=0.9999, clip_high=0.1) == (False, True)


def test_every_group_is_learned_from_once():
    """Three updates share five groups out; with a rate of zero, their gradients are those of the shares."""
    model = random_model()
    prompts = [[number] for number in range(5)]
    completions = generate(model, prompts, num_samples=2, max_new_tokens=4, seed=1)
    groups = rollouts(completions, [[1.0, 0.0]] * 5, prompts)
    pupil, seen = learner(model), []
    accumulate = pupil.accumulate

    def recording(samples, backward):
        seen.append([sample.prompt_ids[0] for sample in samples])
        return accumulate(samples, backward)

    pupil.accumulate = recording
    grpo_update(pupil, group_samples(groups), GRPOStage(updates_per_step=3, prompts_per_step=5), learning_rate=0.0)
    assert seen == [[0, 0, 3, 3], [1, 1, 4, 4], [2, 2]]


def test_the_update_makes_the_better_completions_likelier_and_the_worse_ones_rarer():
    model = random_model()
    groups = fresh_groups(model, REWARDS[:2])
    samples = [sample for group in group_samples(groups) for sample in group]

    def mean_logprobs():
        batch = make_batch(samples)
        with torch.no_grad():
            means = completion_logprobs(model, batch).sum(1) / batch.mask.sum(1)
        better = batch.advantages > 0
        return means[better].mean().item(), means[~better].mean().item()

    before = mean_logprobs()
    pupil = learner(model)
    for _ in range(3):
        metrics = grpo_update(pupil, group_samples(groups), GRPOStage(updates_per_step=1), 3e-3)
    after = mean_logprobs()
    assert after[0] > before[0] + 0.05 and after[1] < before[1] - 0.05
    assert metrics["lr"] == 3e-3


def test_the_kl_penalty_holds_the_policy_at_the_reference_where_rewards_say_nothing():
    """Equal rewards and kl_coef: no pull at the reference itself, and a pull back from anywhere else."""
    model = random_model(dtype=torch.float64)
    reference = copy.deepcopy(model)
    samples = [replace(sample, advantage=0.0) for sample in ragged_samples(4)]
    stage = GRPOStage(kl_coef=0.5)
    pupil = replace(learner(model), reference=reference)
    result = accumulate_gradient(pupil, samples, stage)
    assert result["loss"] < 1e-9 and largest(gradients(model)) < 1e-6
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    moved = accumulate_gradient(pupil, samples, stage)
    assert moved["loss"] > 1e-3 and largest(gradients(model)) > 1e-3
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_the_log_ratio_to_the_sampler_is_measured_before_the_first_update():
    """Zero where sampler and trainer agree; of log-probabilities captured wrongly by known amounts, their mean and spread."""
    model = random_model()
    groups = fresh_groups(model, [[1.0, 0.0, 0.1, 0.1]] * 4)  # nobody at the mean, where tokens would not be learned from
    stage = GRPOStage(updates_per_step=2, prompts_per_step=4)
    metrics = grpo_update(learner(copy.deepcopy(model)), group_samples(groups), stage, learning_rate=0.05)
    assert abs(metrics["log_ratio_mean"]) < 1e-5 and metrics["log_ratio_std"] < 1e-4

    shifts = []

    def shifted(rollout, first_share):
        found = [(-0.3 if place % 3 else 0.1) for place in range(len(rollout.completion.logprobs))]
        shifts.extend(found if first_share else [])
        logprobs = [logprob - shift for logprob, shift in zip(rollout.completion.logprobs, found, strict=True)]
        return replace(rollout, completion=replace(rollout.completion, logprobs=logprobs))

    groups = [[shifted(rollout, number % 2 == 0) for rollout in group] for number, group in enumerate(groups)]
    for cap in (None, 2.0):
        stage = replace(stage, importance_cap=cap)
        metrics = grpo_update(learner(copy.deepcopy(model)), group_samples(groups), stage, learning_rate=0.05)
        assert metrics["log_ratio_mean"] == pytest.approx(np.mean(shifts), abs=1e-4)
        assert metrics["log_ratio_std"] == pytest.approx(np.std(shifts), abs=1e-4)


def test_policy_entropy_is_the_mean_over_the_tokens_learned_from():
    """Of two updates with a rate of zero, against the plain softmax at every completion token of both shares."""
    model = random_model()
    groups = fresh_groups(model, [[1.0, 0.0, 0.1, 0.1]] * 4)
    stage = GRPOStage(updates_per_step=2, prompts_per_step=4)
    metrics = grpo_update(learner(model, 40), group_samples(groups), stage, learning_rate=0.0)
    entropies = []
    for sample in (sample for group in group_samples(groups) for sample in group):
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        with torch.no_grad():
            distribution = model(ids)[0, len(sample.prompt_ids) - 1 : -1].double().log_softmax(-1)
        entropies += (-(distribution.exp() * distribution).sum(-1)).tolist()
    assert metrics["policy_entropy"] == pytest.approx(np.mean(entropies), abs=1e-5)


def test_importance_weights_correct_for_a_sampler_that_differs_up_to_their_cap():
    """Captured log-probabilities are off by -0.4 and +0.9: tokens weigh exp(-0.4) and the cap, and ratios are still one."""
    model = random_model(dtype=torch.float64)
    prompt, ids = [1, 2, 3], [[5, 6, 7], [8, 9]]
    true = []
    for completion in ids:
        found = model(torch.tensor([prompt + completion]))[0, 2:-1].log_softmax(-1)
        true.append(found.gather(-1, torch.tensor(completion)[:, None])[:, 0].tolist())
    captured = [[logprob + 0.4 for logprob in true[0]], [logprob - 0.9 for logprob in true[1]]]
    completions = [[Completion(i, c, True) for i, c in zip(ids, captured, strict=True)]]
    groups = rollouts(completions, [[1.0, 0.0]], [prompt])
    pupil = learner(model)
    (samples,) = recompute_logprobs(pupil, group_samples(groups, scale_by_std=False))
    for sample, expected in zip(samples, true, strict=True):
        assert sample.recomputed_logprobs == pytest.approx(expected, abs=1e-6)
    stage = GRPOStage(importance_cap=2.0)
    found = accumulate_gradient(pupil, samples, stage)
    ours = gradients(model)
    assert found["clipped_low"] == found["clipped_high"] == 0
    # Advantages are a half and minus a half; the gradient is that of the weighted log-probabilities.
    loss = 0
    for sign, weight, completion in ((0.5, math.exp(-0.4), ids[0]), (-0.5, 2.0, ids[1])):
        found = model(torch.tensor([prompt + completion]))[0, 2:-1].log_softmax(-1)
        loss = loss - sign * weight * found.gather(-1, torch.tensor(completion)[:, None]).sum() / 5
    loss.backward()
    assert largest_gap(ours, gradients(model)) < 1e-5 < largest(ours)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 7), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 5))
def test_problems_come_round_each_once_an_epoch_however_they_are_taken(total, counts, seed):
    """Steps of any size take the same sequence: position is all that resuming needs to know."""
    problems = [Problem((1, 2), number + 1) for number in range(total)]
    taken = []
    for count in counts:
        taken += endless_problems(problems, seed, len(taken), count)
    assert taken == endless_problems(problems, seed, 0, sum(counts))
    for start in range(0, len(taken) - total + 1, total):
        assert sorted(problem.target for problem in taken[start : start + total]) == list(range(1, total + 1))


def test_every_epoch_of_problems_has_an_order_of_its_own():
    problems = [Problem((1, 2), number + 1) for number in range(20)]
    first, second = (endless_problems(problems, 0, start, 20) for start in (0, 20))
    assert first != second and first != problems and first != endless_problems(problems, 1, 0, 20)


def test_the_learning_rate_rises_over_the_warm_up_and_falls_to_the_share_asked_for():
    def rates(**changes) -> list[float]:
        stage = GRPOStage(steps=5, learning_rate=8.0, **changes)
        return [learning_rate(stage, step) for step in range(5)]

    assert rates(warmup_steps=4) == [2, 4, 6, 8, 8]
    assert rates(warmup_steps=0, end_rate=0.5) == [8, 7, 6, 5, 4]
    assert rates(warmup_steps=2, end_rate=0.0) == [4, 6, 4, 2, 0]
    assert learning_rate(GRPOStage(steps=1, learning_rate=8.0, warmup_steps=0, end_rate=0.5), 0) == 8

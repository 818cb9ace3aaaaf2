"""`grpo_step` against its definition written out sample by sample, and what it does when things go wrong."""

import copy
import math
import resource
import threading

import numpy as np
import pytest
import torch
from helpers import (
    REWARDS,
    gradients,
    largest,
    largest_gap,
    ragged_samples,
    random_model,
    sampler_that_is_off,
    take_step,
    trainer_for,
    weights,
)

import rl.grpo
from lab.stages import learning_rate_at
from model.sampler import Cancelled
from rl.batch import logprobs_and_entropy
from rl.grpo import GRPOStage
from rl.optimizer import Optimizer, OptimizerSettings
from rl.trainer import Trainer

MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"
    ),
]


class Recording(Optimizer):
    """Keeps the model, in float64, and the gradient as they are before each update."""

    def __init__(self, model):
        super().__init__(model, OptimizerSettings())
        self.model, self.recorded = model, []

    def step(self, learning_rate: float, skip: bool = False) -> float:
        grads = {name: p.grad.clone() for name, p in self.parameters.items()}
        twin = copy.deepcopy(self.model).double()
        twin.zero_grad()
        self.recorded.append((twin, grads))
        return super().step(learning_rate, skip)


def rows_by_hand(model, rollout, temperature) -> torch.Tensor:
    """Log-probabilities [token, vocab] of a completion, which is alone in a plain forward."""
    tokens = torch.tensor([rollout.prompt_ids + rollout.completion.token_ids])
    logits = model(tokens)[0, len(rollout.prompt_ids) - 1 : -1]
    return (logits / temperature).log_softmax(-1)


def update_by_hand(model, reference, groups, stage, temperature) -> dict:
    """One update from its definition.

    The loss, its gradient, and of the tokens that have one: ratios below and above the clip, log ratios and
    entropies.
    """
    result = {"loss": 0.0, "low": 0, "high": 0, "log_ratios": [], "entropies": []}
    lengths = [len(rollout.completion.token_ids) for group in groups for rollout in group]
    for group in groups:
        rewards = np.array([rollout.reward for rollout in group])
        deviation = rewards.std() + 1e-4 if stage.scale_by_std else 1.0
        advantages = (rewards - rewards.mean()) / deviation * (len(set(rewards)) > 1)
        for rollout, advantage in zip(group, advantages.tolist()):
            ids = torch.tensor(rollout.completion.token_ids)[:, None]
            token_weights = {
                "token": 1 / sum(lengths),
                "sequence": 1 / len(lengths) / len(ids),
                "constant": 1 / len(lengths) / 8,
            }
            rows = rows_by_hand(model, rollout, temperature)
            log_ratio = rows.gather(1, ids)[:, 0] - torch.tensor(rollout.completion.logprobs).double()
            side, edge = ("high", 1 + stage.clip_high) if advantage > 0 else ("low", 1 - stage.clip_low)
            clipped = (log_ratio.exp() - edge) * advantage > 0
            surrogate = advantage * torch.where(clipped, edge, log_ratio.exp())
            reference_rows = rows_by_hand(reference, rollout, temperature).detach()
            gap = (reference_rows - rows).gather(1, ids)[:, 0]
            penalty = stage.kl_coef * (gap.exp() - gap - 1)
            result["loss"] += token_weights[stage.aggregation] * (penalty - surrogate).sum()
            if advantage or stage.kl_coef:
                result[side] += clipped.sum().item()
                result["log_ratios"] += log_ratio.tolist()
                result["entropies"] += (-rows.exp() * rows).sum(-1).tolist()
    result["loss"].backward()
    result["gradient"] = gradients(model)
    return result


@pytest.mark.parametrize(
    ("aggregation", "kl_coef", "temperature"),
    [("token", 0.0, 1.0), ("token", 0.3, 0.7), ("sequence", 0.0, 0.7), ("constant", 0.3, 1.0)],
)
def test_every_update_has_the_gradient_and_metrics_by_definition(
    aggregation, kl_coef, temperature, monkeypatch
):
    """Three updates share five groups; one has equal rewards, and the sampler is off."""
    off = sampler_that_is_off(lambda place: -0.3 if place % 3 else 0.1)
    monkeypatch.setattr(rl.grpo, "collect_rollouts", off)
    model, reference = random_model(1), random_model(2)
    optimizer, before = Recording(model), weights(reference)
    stage = {"aggregation": aggregation, "kl_coef": kl_coef, "scale_by_std": kl_coef > 0}
    stage |= {"clip_low": 0.15, "clip_high": 0.2, "updates_per_step": 3}
    groups, _, metrics = take_step(
        Trainer(model, optimizer, micro_batch_tokens=30),
        learning_rate=0.02,
        temperature=temperature,
        reference=reference,
        **stage,
    )

    twin_reference = copy.deepcopy(reference).double()
    updates = []
    for number, (twin, gradient) in enumerate(optimizer.recorded):
        update = update_by_hand(twin, twin_reference, groups[number::3], GRPOStage(**stage), temperature)
        assert largest_gap(gradient, update["gradient"]) < 1e-5 < 1e-2 < largest(gradient)
        updates.append(update)
    assert len(updates) == 3

    tokens = sum(len(rollout.completion.token_ids) for group in groups for rollout in group)
    low = sum(update["low"] for update in updates) / tokens
    high = sum(update["high"] for update in updates) / tokens
    assert 0 < low != high > 0
    norms = [torch.nn.utils.get_total_norm(update["gradient"].values()) for update in updates]
    expected = {
        "loss": np.mean([update["loss"].item() for update in updates]),
        "grad_norm": np.mean(norms),
        "skipped_updates": 0,
        "policy_entropy": np.mean([entropy for update in updates for entropy in update["entropies"]]),
        "lr": 0.02,
        "clip_fraction": low + high,
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "log_ratio_mean": np.mean(updates[0]["log_ratios"]),
        "log_ratio_std": np.std(updates[0]["log_ratios"]),
    }
    assert without_times(metrics) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert largest_gap(weights(reference), before) == 0
    assert all(parameter.grad is None for parameter in reference.parameters())


def without_times(metrics: dict) -> dict:
    return {name: value for name, value in metrics.items() if "seconds" not in name}


@pytest.mark.parametrize("updates", [1, 2])
def test_only_updates_after_the_first_are_off_policy_and_clipped(updates):
    trainer = trainer_for(random_model(std=0.4))
    stage = {"clip_low": 1e-3, "clip_high": 1e-3, "updates_per_step": updates}
    metrics = take_step(trainer, temperature=0.7, **stage)[2]
    assert metrics["grad_norm"] > 0.01
    assert abs(metrics["log_ratio_mean"]) < 1e-5
    assert metrics["log_ratio_std"] < 1e-4
    assert (metrics["clip_fraction_low"] > 0) == (updates > 1)
    assert (metrics["clip_fraction_high"] > 0) == (updates > 1)


def test_a_signal_between_updates_ends_the_step_with_those_made():
    cancel = threading.Event()
    trainer = trainer_for(random_model())
    update = trainer.optimizer.step

    def update_and_cancel(*arguments, **options):
        cancel.set()
        return update(*arguments, **options)

    trainer.optimizer.step = update_and_cancel
    metrics = take_step(trainer, cancel=cancel, updates_per_step=3)[2]
    assert trainer.optimizer.updates == 1
    assert metrics["grad_norm"] > 0
    with pytest.raises(Cancelled):
        take_step(trainer, cancel=cancel)
    assert trainer.optimizer.updates == 1


def test_groups_of_equal_rewards_leave_every_weight_as_it_is():
    """0.1 and 0.3 have rounding errors in their mean; none of it may reach a weight."""
    model = random_model()
    before = weights(model)
    _, advantages, metrics = take_step(trainer_for(model), [[0.1] * 4, [0.3] * 4], learning_rate=0.1)
    assert not advantages.any()
    assert largest_gap(weights(model), before) == 0
    assert metrics["skipped_updates"] == 0
    for name in ("loss", "grad_norm", "policy_entropy", "clip_fraction_low"):
        assert math.isnan(metrics[name])


def test_the_same_problem_twice_makes_two_groups():
    """Grouped by prompt, the second "c" would have advantages, because the mean would be 0.75."""
    rewards = [REWARDS[0], [1.0, 0.0, 1.0, 0.0], REWARDS[2], [1.0] * 4]
    groups, advantages, _ = take_step(trainer_for(random_model()), rewards)
    assert groups[1][0].prompt_ids == groups[3][0].prompt_ids
    assert groups[1][0].completion != groups[3][0].completion
    assert advantages[1].tolist() == pytest.approx([1 / 1.0002, -1 / 1.0002] * 2)
    assert not advantages[3].any()


# Micro-batches and lack of memory


@pytest.mark.parametrize("budget, error", [(1, None), (100, MEMORY_ERRORS[0]), (100, MEMORY_ERRORS[1])])
def test_micro_batches_and_lack_of_memory_change_no_step(budget, error, monkeypatch):
    whole = random_model(1)  # trained in one micro-batch
    _, _, expected = take_step(trainer_for(whole, 10_000), updates_per_step=2)

    def failing(model, batch, temperature):
        scored = logprobs_and_entropy(model, batch, temperature)
        if error and batch.input_ids.shape[1] > 20:
            scored.logprobs.sum().backward()  # what a failed micro-batch has added to the gradient must go
            raise error
        return scored

    monkeypatch.setattr(rl.grpo, "logprobs_and_entropy", failing)
    model = random_model(1)
    trainer = trainer_for(model, budget)
    _, _, metrics = take_step(trainer, updates_per_step=2)
    assert trainer.micro_batch_tokens == (12 if error else budget)  # halved for good
    assert without_times(metrics) == pytest.approx(without_times(expected), rel=1e-4, abs=1e-6)
    assert largest_gap(weights(model), weights(whole)) < 1e-4


@pytest.mark.parametrize("error, tries", [(MEMORY_ERRORS[0], range(3, 12)), (RuntimeError("a bug"), [1])])
def test_a_sample_that_does_not_fit_alone_raises_its_error(error, tries):
    """So does any other error, without another try."""
    tried = []

    def failing(batch):
        tried.append(batch.input_ids.shape[1])
        raise error

    with pytest.raises(type(error), match=str(error)):
        trainer_for(random_model(), budget=120).for_each_micro_batch(ragged_samples(12), failing)
    assert len(tried) in tries
    assert tried == sorted(tried, reverse=True)


def test_a_lack_of_memory_on_a_cpu_is_recognised():
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**35, hard))  # so that the system refuses
    try:
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.empty(2**37, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize(
    ("warmup_steps", "end_rate", "rates"),
    [(4, 1.0, [2, 4, 6, 8, 8]), (0, 0.5, [8, 7, 6, 5, 4]), (2, 0.0, [4, 6, 4, 2, 0]), (0, 0.5, [8])],
)
def test_the_learning_rate_warms_up_and_falls_to_its_end(warmup_steps, end_rate, rates):
    """There are two updates per step."""
    steps = range(len(rates))
    stage = GRPOStage(steps=len(rates), learning_rate=8.0, warmup_steps=warmup_steps, end_rate=end_rate)
    assert [learning_rate_at(stage, step, updates=2 * step) for step in steps] == rates


def test_the_learning_rate_does_not_rise_without_updates():
    stage = GRPOStage(steps=100, learning_rate=8.0, warmup_steps=4)
    rates = [learning_rate_at(stage, 50, updates) for updates in (0, 1, 2, 6, 7)]
    assert rates == [2, 3, 4, 8, 8]

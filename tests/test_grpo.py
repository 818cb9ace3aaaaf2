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
from rl.loss import AGGREGATIONS
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

    def __init__(self, model, **options):
        super().__init__(model, OptimizerSettings(**options))
        self.model, self.recorded = model, []

    def step(self, learning_rate: float, skip: bool = False) -> float:
        grads = {name: p.grad.clone() for name, p in self.parameters.items() if p.grad is not None}
        twin = copy.deepcopy(self.model).double()
        twin.zero_grad()
        self.recorded.append((twin, grads))
        return super().step(learning_rate, skip)


def recording(model, budget: int = 1000, **options) -> Trainer:
    return Trainer(model, Recording(model, **options), budget)


def update_by_hand(model, groups, stage, temperature, reference) -> dict:
    """One update from its definition: every sample alone in a plain forward, every token's term written out.

    The loss, its gradient, and of the tokens that have one: ratios below and above the clip, log ratios and
    entropies.
    """
    result = {"loss": 0.0, "low": 0, "high": 0, "log_ratios": [], "entropies": []}
    lengths = [len(rollout.completion.token_ids) for group in groups for rollout in group]
    for group in groups:
        rewards = np.array([rollout.reward for rollout in group])
        deviation = rewards.std() + 1e-4 if stage.scale_by_std else 1.0
        for rollout, reward in zip(group, rewards, strict=True):
            advantage = 0.0 if len(set(rewards)) == 1 else (reward - rewards.mean()) / deviation
            ids = rollout.completion.token_ids
            token_weight = {
                "token": 1 / sum(lengths), "sequence": 1 / len(lengths) / len(ids),
                "constant": 1 / len(lengths) / 8
            }[stage.aggregation]  # fmt: skip
            tokens = torch.tensor([rollout.prompt_ids + ids])
            rows = model(tokens)[0, len(rollout.prompt_ids) - 1 : -1].div(temperature).log_softmax(-1)
            with torch.no_grad():
                ref_rows = (
                    reference(tokens)[0, len(rollout.prompt_ids) - 1 : -1].div(temperature).log_softmax(-1)
                )
            for token, old, row, ref_row in zip(
                ids, rollout.completion.logprobs, rows, ref_rows, strict=True
            ):
                ratio = (row[token] - old).exp()
                edge = 1 + stage.clip_high if advantage > 0 else 1 - stage.clip_low
                clipped = bool(ratio > edge) if advantage > 0 else bool(ratio < edge and advantage < 0)
                surrogate = advantage * (edge if clipped else ratio)
                gap = ref_row[token] - row[token]
                result["loss"] = result["loss"] + token_weight * (
                    stage.kl_coef * (gap.exp() - gap - 1) - surrogate
                )
                if advantage or stage.kl_coef:
                    result["low"] += clipped and advantage < 0
                    result["high"] += clipped and advantage > 0
                    result["log_ratios"].append(row[token].item() - old)
                    result["entropies"].append(-(row.exp() * row).sum().item())
    result["loss"].backward()
    result["gradient"] = gradients(model)
    return result


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3], ids=["plain", "kl"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_update_has_the_gradient_and_metrics_by_definition(
    aggregation, kl_coef, temperature, monkeypatch
):
    """Three updates share five groups; one has equal rewards, and the sampler is off."""
    monkeypatch.setattr(
        rl.grpo, "collect_rollouts", sampler_that_is_off(lambda place: -0.3 if place % 3 else 0.1)
    )
    model, reference = random_model(1), random_model(2)
    before = weights(reference)
    clip = {"clip_low": 0.15, "clip_high": 0.2, "updates_per_step": 3}
    stage = dict(aggregation=aggregation, kl_coef=kl_coef, scale_by_std=bool(kl_coef), **clip)
    trainer = recording(model, budget=30)
    options = dict(temperature=temperature, reference=reference if kl_coef else None)
    groups, advantages, metrics = take_step(trainer, learning_rate=0.02, **options, **stage)

    settings = GRPOStage(samples_per_prompt=4, **stage)
    expected = []
    for number, (twin, gradient) in enumerate(trainer.optimizer.recorded):
        expected.append(
            update_by_hand(twin, groups[number::3], settings, temperature, copy.deepcopy(reference).double())
        )
        assert largest_gap(gradient, expected[-1]["gradient"]) < 1e-5 < 1e-2 < largest(gradient)
    assert len(expected) == 3
    assert not advantages[1].any()
    assert advantages[0].any()
    tokens = sum(len(rollout.completion.token_ids) for group in groups for rollout in group)
    low, high = (sum(update[side] for update in expected) for side in ("low", "high"))
    assert low > 0
    assert high > 0
    assert low != high
    norms = [
        torch.cat([g.flatten() for g in update["gradient"].values()]).norm().item() for update in expected
    ]
    assert {name: value for name, value in metrics.items() if "seconds" not in name} == pytest.approx({
        "loss": np.mean([update["loss"].item() for update in expected]), "grad_norm": np.mean(norms),
        "skipped_updates": 0,
        "policy_entropy": np.mean([x for update in expected for x in update["entropies"]]), "lr": 0.02,
        "clip_fraction": (low + high) / tokens, "clip_fraction_low": low / tokens,
        "clip_fraction_high": high / tokens, "log_ratio_mean": np.mean(expected[0]["log_ratios"]),
        "log_ratio_std": np.std(expected[0]["log_ratios"]),
    }, rel=1e-5, abs=1e-5)  # fmt: skip
    assert largest_gap(weights(reference), before) == 0
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_only_updates_after_the_first_are_off_policy_and_clipped(temperature):
    def metrics_of(updates: int) -> dict:
        model = random_model(std=0.4)
        options = dict(temperature=temperature, clip_low=1e-3, clip_high=1e-3, updates_per_step=updates)
        return take_step(recording(model), **options)[2]

    one, two = metrics_of(1), metrics_of(2)
    assert one["clip_fraction"] == 0
    assert one["grad_norm"] > 0.01
    assert abs(one["log_ratio_mean"]) < 1e-5
    assert one["log_ratio_std"] < 1e-4
    assert two["clip_fraction_low"] > 0
    assert two["clip_fraction_high"] > 0


def test_a_signal_between_updates_ends_the_step_with_those_made():
    cancel = threading.Event()
    trainer = recording(random_model())
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


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_groups_of_equal_rewards_leave_every_weight_as_it_is(kind):
    """0.1 and 0.3 have rounding errors in their mean; none of it may reach a weight."""
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    model = random_model()
    before = weights(model)
    _, advantages, metrics = take_step(recording(model, kind=kind), [[0.1] * 4, [0.3] * 4], learning_rate=0.1)
    assert not advantages.any()
    assert metrics["skipped_updates"] == 0
    assert all(
        map(
            math.isnan,
            (metrics[name] for name in ("loss", "grad_norm", "policy_entropy", "clip_fraction_low")),
        )
    )
    assert all(torch.equal(before[name], after) for name, after in weights(model).items())


def test_the_same_problem_twice_makes_two_groups():
    """Grouped by prompt, the second "c" would have advantages, because the mean would be 0.75."""
    model = random_model()
    groups, advantages, _ = take_step(
        recording(model), [REWARDS[0], [1.0, 0.0, 1.0, 0.0], REWARDS[2], [1.0] * 4]
    )
    assert groups[1][0].prompt_ids == groups[3][0].prompt_ids != groups[0][0].prompt_ids
    assert [rollout.completion for rollout in groups[1]] != [rollout.completion for rollout in groups[3]]
    assert advantages[1].tolist() == pytest.approx([1 / 1.0002, -1 / 1.0002] * 2)
    assert not advantages[3].any()


# Micro-batches and lack of memory


@pytest.mark.parametrize(
    "budget, error", [(40, None), (1, None), (100, MEMORY_ERRORS[0]), (100, MEMORY_ERRORS[1])]
)
def test_micro_batches_and_lack_of_memory_change_no_step(budget, error, monkeypatch):
    whole = random_model(1)  # trained in one micro-batch
    _, _, expected = take_step(recording(whole, 10_000), updates_per_step=2)

    def failing(model, batch, temperature):
        scored = logprobs_and_entropy(model, batch, temperature)
        if error and batch.input_ids.shape[1] > 20:
            scored.logprobs.sum().backward()  # what a failed micro-batch has added to the gradient must go
            raise error
        return scored

    monkeypatch.setattr(rl.grpo, "logprobs_and_entropy", failing)
    model = random_model(1)
    trainer = recording(model, budget)
    _, _, metrics = take_step(trainer, updates_per_step=2)
    assert trainer.micro_batch_tokens == (12 if error else budget)  # halved for good
    metrics |= {name: value for name, value in expected.items() if "seconds" in name}
    assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
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


def test_the_learning_rate_warms_up_and_falls_to_its_end():
    def rates(steps: int = 5, **changes) -> list[float]:
        stage = GRPOStage(steps=steps, learning_rate=8.0, **changes)
        return [
            learning_rate_at(stage, step, updates=2 * step) for step in range(steps)
        ]  # two updates a step

    assert rates(warmup_steps=4) == [2, 4, 6, 8, 8]
    assert rates(warmup_steps=0, end_rate=0.5) == [8, 7, 6, 5, 4]
    assert rates(warmup_steps=2, end_rate=0.0) == [4, 6, 4, 2, 0]
    assert rates(1, warmup_steps=0, end_rate=0.5) == [8]
    silent = GRPOStage(steps=100, learning_rate=8.0, warmup_steps=4)
    assert [learning_rate_at(silent, 50, updates) for updates in (0, 1, 2, 6, 7)] == [
        2,
        3,
        4,
        8,
        8,
    ]  # no rise without

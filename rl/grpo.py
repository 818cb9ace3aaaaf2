"""GRPO: sample groups of completions, compare each with its group, learn from the difference.

Unlike PPO, no critic: the group's other completions say what reward to expect (Le 2025, section 2.2). The
reward comes once, at the end, and is exact, so there is no GAE and, without `kl_coef`, no KL penalty.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from threading import Event
from typing import Literal

import torch
from torch import Tensor

from data.task import AnyProblem, Task
from model import Qwen3, Tokenizer
from model.sampler import Cancelled
from rl.advantage import group_advantages
from rl.batch import Batch, Sample, completion_logprobs, logprobs_and_entropy
from rl.distributed import own_part, sum_counts, sum_gradients
from rl.loss import clip_counts, grpo_loss, loss_denominator
from rl.ranges import Count, CountOrZero, NonNegative, Positive, ZeroToOne
from rl.reward import RewardSettings
from rl.rollout import Groups, OnProgress, SamplingSettings, collect_rollouts
from rl.trainer import Trainer


@dataclass(frozen=True)
class GRPOStage:
    """GRPO on groups of completions."""

    kind: Literal["grpo"] = "grpo"
    steps: Count = 80  # Rollout batches
    prompts_per_step: Count = 32  # Groups in a rollout batch
    samples_per_prompt: Count = 8  # Completions in a group
    updates_per_step: Count = 2  # Optimizer steps, each on its own part of the groups
    learning_rate: Positive = 5e-6  # Before the factors of warm-up and decay
    warmup_steps: CountOrZero = 5  # Steps in which the rate rises; those without an update do not count
    end_rate: ZeroToOne = 1.0  # Share of learning_rate at the last step, by linear decay; 1: constant
    clip_low: ZeroToOne = 0.25  # The ratio is clipped below at 1 - clip_low; 1 disables it
    clip_high: NonNegative = 0.25  # The ratio is clipped above at 1 + clip_high; 1e9 disables it
    aggregation: Literal["token", "sequence", "constant"] = "token"  # How token losses are averaged
    scale_by_std: bool = True  # Divide advantages by the group's standard deviation
    kl_coef: NonNegative = 0.0  # Weight of the KL penalty towards the policy at the stage's start


def grpo_step(
    trainer: Trainer, tokenizer: Tokenizer, task: Task, problems: list[AnyProblem], *,
    settings: GRPOStage, sampling: SamplingSettings, reward: RewardSettings = RewardSettings(),
    learning_rate: float, seed: int, reference: Qwen3 | None = None,
    on_progress: OnProgress | None = None, cancel: Event | None = None,
) -> tuple[Groups, Tensor, dict[str, float]]:  # fmt: skip
    """One step: answer `problems`, compare the answers, and make the better ones of each group likelier.

    `reference` is the frozen model of the KL penalty; `on_progress` is that of `generate`. If `cancel` is
    set, the step ends with the updates made, or with Cancelled if there are none. Returns the rollouts,
    [problem][sample]; their advantages, [problems, samples]; and metrics.
    """
    # 1. Sample completions and reward each. Those of one problem are a group.
    start = time.perf_counter()
    groups = collect_rollouts(
        trainer.model, tokenizer, task, problems,
        num_samples=settings.samples_per_prompt, sampling=sampling, reward=reward, seed=seed,
        on_progress=on_progress, cancel=cancel,
    )  # fmt: skip
    sampling_end = time.perf_counter()

    # 2. Compare. The advantage of a completion says how much better it did than its group.
    rewards = torch.tensor([[rollout.reward for rollout in group] for group in groups])
    advantages = group_advantages(rewards, scale_by_std=settings.scale_by_std)  # [problems, samples]
    samples = with_advantages(groups, advantages)  # [problem][sample]

    # 3. Learn, each update from its own part of the groups. The clip limits how far the later ones go.
    updates = []
    for number in range(settings.updates_per_step):
        part = samples[number :: settings.updates_per_step]
        try:
            updates.append(grpo_update(trainer, part, settings, sampling, learning_rate, reference, cancel))
        except Cancelled:
            if not any(update.taken for update in updates):
                raise  # nothing has changed
            break
    metrics = update_metrics(updates) | {"lr": learning_rate}
    metrics["rollout_seconds"] = sampling_end - start
    metrics["update_seconds"] = time.perf_counter() - sampling_end
    return groups, advantages, metrics


def with_advantages(groups: Groups, advantages: Tensor) -> list[list[Sample]]:
    """The rollouts as samples to learn from, [problem][sample]."""
    samples = []
    for group, row in zip(groups, advantages.tolist(), strict=True):
        its_samples = []
        for rollout, advantage in zip(group, row, strict=True):
            sample = Sample(
                prompt_ids=rollout.prompt_ids,
                completion_ids=rollout.completion.token_ids,
                old_logprobs=rollout.completion.logprobs,
                advantage=advantage,
            )
            its_samples.append(sample)
        samples.append(its_samples)
    return samples


@dataclass(frozen=True)
class Update:
    """Sums of an optimizer step, the same on all ranks."""

    tokens: int  # of all its completions
    sums: Counter  # over the tokens of the samples that took part, by the names of `policy_sums`
    grad_norm: float | None  # before clipping; NaN if the step was skipped, None if no sample took part

    @property
    def taken(self) -> bool:
        """Whether it has changed the weights."""
        return self.grad_norm is not None and math.isfinite(self.grad_norm)


def grpo_update(
    trainer: Trainer,
    groups: list[list[Sample]],
    settings: GRPOStage,
    sampling: SamplingSettings,
    learning_rate: float,
    reference: Qwen3 | None = None,
    cancel: Event | None = None,
) -> Update:
    """One optimizer step on `groups`, of which each rank takes its own part.

    Cancelled: `cancel` was set before the optimizer's step.
    """
    # 1. The samples that take part. Without a KL penalty, one with advantage zero has no gradient. It counts
    # in the denominator, and is not run.
    lengths = [len(sample.completion_ids) for group in groups for sample in group]
    denominator = loss_denominator(lengths, sampling.max_new_tokens, settings.aggregation)
    all_learn = settings.kl_coef > 0
    learners = [[sample for sample in group if all_learn or sample.advantage != 0] for group in groups]
    if not any(learners):
        return Update(sum(lengths), Counter(), None)
    own = [sample for group in own_part(learners) for sample in group]

    # 2. The gradient, one micro-batch at a time.
    def add_gradient(batch: Batch) -> Counter:
        logprobs, entropy = logprobs_and_entropy(trainer.model, batch, sampling.temperature)
        ref_logprobs = None
        if reference is not None:
            with torch.no_grad():
                ref_logprobs = completion_logprobs(reference, batch, sampling.temperature)
        loss = grpo_loss(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.mask,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            aggregation=settings.aggregation,
            denominator=denominator,
            ref_logprobs=ref_logprobs,
            kl_coef=settings.kl_coef,
        )
        loss.backward()
        return policy_sums(batch, loss, logprobs, entropy, settings)

    sums = sum_counts(trainer.for_each_micro_batch(own, add_gradient, cancel))
    sum_gradients(trainer.optimizer.parameters.values())

    # 3. The optimizer's step.
    finite = all(math.isfinite(value) for value in sums.values())
    grad_norm = trainer.optimizer.step(learning_rate, skip=not finite)
    return Update(sum(lengths), sums, grad_norm)


@torch.no_grad()
def policy_sums(
    batch: Batch, loss: Tensor, logprobs: Tensor, entropy: Tensor, settings: GRPOStage
) -> Counter:
    """Sums over the tokens of a micro-batch, for `update_metrics`."""
    log_ratio = (logprobs - batch.old_logprobs)[batch.mask].double()
    clipped_low, clipped_high = clip_counts(
        logprobs, batch.old_logprobs, batch.advantages, batch.mask, settings.clip_low, settings.clip_high
    )
    return Counter(
        loss=loss.item(),
        learned_tokens=len(log_ratio),
        clipped_low=clipped_low,
        clipped_high=clipped_high,
        entropy=entropy.sum().item(),
        log_ratio=log_ratio.sum().item(),
        log_ratio_squared=log_ratio.square().sum().item(),
    )


def update_metrics(updates: list[Update]) -> dict[str, float]:
    """The metrics of the updates of a step. What could not be measured is NaN.

    `policy_entropy` is exact, over the samples that took part. `log_ratio_*` is trainer against sampler
    before the first update. Both are in nats per token. Clip fractions are of the tokens of all completions.
    """
    tried = [update for update in updates if update.grad_norm is not None]
    taken = [update for update in tried if update.taken]
    tokens = sum(update.tokens for update in updates) if taken else 0
    first = taken[0].sums if taken else Counter()
    log_ratio_mean = mean(first["log_ratio"], first["learned_tokens"])
    log_ratio_variance = mean(first["log_ratio_squared"], first["learned_tokens"]) - log_ratio_mean**2
    sums: Counter = Counter()
    for update in taken:
        sums.update(update.sums)  # a Counter adds
    return {
        "loss": mean(sums["loss"], len(taken)),
        "grad_norm": mean(sum(update.grad_norm for update in taken), len(taken)),
        "skipped_updates": len(tried) - len(taken),
        "policy_entropy": mean(sums["entropy"], sums["learned_tokens"]),
        "clip_fraction": mean(sums["clipped_low"] + sums["clipped_high"], tokens),
        "clip_fraction_low": mean(sums["clipped_low"], tokens),
        "clip_fraction_high": mean(sums["clipped_high"], tokens),
        "log_ratio_mean": log_ratio_mean,
        "log_ratio_std": abs(log_ratio_variance) ** 0.5,  # rounding can take the variance below zero
    }


def mean(total: float, count: float) -> float:
    """`total / count`; NaN, which stands for not measured, if the count is zero."""
    if count == 0:
        return math.nan
    return total / count

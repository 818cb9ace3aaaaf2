"""GRPO: sample groups of completions, compare each with its group, learn from the difference.

Unlike PPO, no critic: the group's other completions say what reward to expect (the paper, section 2.2). The
reward comes once, at the end, and is exact, so there is no GAE and, without `kl_coef`, no KL penalty.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data.task import AnyProblem, Task
from model import Qwen3, Tokenizer
from rl.advantage import group_advantages
from rl.batch import Batch, Sample, completion_logprobs, halve_on_oom, score_completions
from rl.distributed import share, sum_counts, sum_gradients
from rl.loss import clip_counts, grpo_loss, loss_denominator
from rl.optimizer import Optimizer
from rl.ranges import Count, CountOrZero, NonNegative, Positive, Share
from rl.reward import RewardSettings
from rl.rollout import Rollout, SamplingSettings, collect_rollouts


@dataclass(frozen=True)
class GRPOStage:
    """Reinforcement on sampled groups."""

    kind: Literal["grpo"] = "grpo"
    steps: Count = 80  # Rollout batches
    prompts_per_step: Count = 32  # Groups in a rollout batch
    samples_per_prompt: Count = 8  # Completions in a group
    updates_per_step: Count = 2  # Optimizer steps on a rollout batch; the clip matters from the second on
    learning_rate: Positive = 5e-6  # After the warm-up
    warmup_steps: CountOrZero = 5  # Steps in which the rate rises; those without an update do not count
    end_rate: Share = 1.0  # The rate falls linearly to this share of itself
    clip_low: Share = 0.25  # The ratio is clipped below at 1 - clip_low; 1 disables it
    clip_high: NonNegative = 0.25  # The ratio is clipped above at 1 + clip_high; 1e9 disables it
    aggregation: Literal["token", "sequence", "constant"] = "token"  # How token losses are averaged
    scale_by_std: bool = True  # Divide advantages by the group's standard deviation
    kl_coef: NonNegative = 0.0  # Weight of the KL penalty towards the policy at the stage's start


def grpo_step(
    model: Qwen3,
    tokenizer: Tokenizer,
    optimizer: Optimizer,
    task: Task,
    problems: list[AnyProblem],
    *,
    settings: GRPOStage,
    sampling: SamplingSettings,
    learning_rate: float,
    seed: int,
    reward: RewardSettings = RewardSettings(),
    reference: Qwen3 | None = None,
    **watch,
) -> tuple[list[list[Rollout]], Tensor, dict[str, float]]:
    """One step: answer `problems`, score the answers, and make the better ones of each group likelier.

    `reference` is the frozen model of the KL penalty; `watch` may be `on_progress` and `cancel`.
    Returns the rollouts, [problem][sample]; their advantages, [problems, samples]; the updates' metrics.
    """
    # 1. Sample and score. The completions of one problem are a group.
    start = time.perf_counter()
    options = {"num_samples": settings.samples_per_prompt, "sampling": sampling, "seed": seed}
    groups = collect_rollouts(model, tokenizer, task, problems, reward=reward, **options, **watch)
    sampled = time.perf_counter()

    # 2. Compare with the group. The advantage says how much better a completion did than its group.
    rewards = torch.tensor([[rollout.score.reward for rollout in group] for group in groups])
    advantages = group_advantages(rewards, scale_by_std=settings.scale_by_std)  # [problems, samples]
    samples = []
    for group, row in zip(groups, advantages.tolist(), strict=True):
        answers = [(r.prompt_ids, r.completion.token_ids, r.completion.logprobs) for r in group]
        samples.append([Sample(*answer, advantage) for answer, advantage in zip(answers, row, strict=True)])

    # 3. Learn, each update from its own part of the groups. In the first, every ratio is one; after it the
    # weights have moved, and the clip limits the ratios.
    updates = []
    for number in range(settings.updates_per_step):
        part = samples[number :: settings.updates_per_step]
        lengths = [len(sample.completion_ids) for group in part for sample in group]
        denominator = loss_denominator(lengths, sampling.max_new_tokens, settings.aggregation)
        # Completions with advantage zero only count in the denominator. If all are zero, there is no update:
        # one group runs through the model, for the metrics.
        own = [sample for group in share(part) for sample in group if sample.advantage or settings.kl_coef]
        teaches = settings.kl_coef > 0 or any(sample.advantage for group in part for sample in group)
        own = own if teaches else [sample for group in share(part)[:1] for sample in group]
        arguments = (settings, sampling.temperature, denominator, reference)
        with torch.set_grad_enabled(teaches):
            sums = sum_counts(halve_on_oom(add_gradient, optimizer, model, own, *arguments))
        sum_gradients(optimizer.parameters.values())
        finite = all(map(math.isfinite, sums.values()))
        updates.append((sums, optimizer.step(learning_rate, skip=not finite) if teaches else None))
    seconds = {"rollout_seconds": sampled - start, "update_seconds": time.perf_counter() - sampled}
    tokens = sum(len(sample.completion_ids) for group in samples for sample in group)
    return groups, advantages, update_metrics(updates, tokens) | {"lr": learning_rate} | seconds


def add_gradient(
    model: Qwen3,
    batches: Iterable[Batch],
    settings: GRPOStage,
    temperature: float,
    denominator: float,
    reference=None,
) -> Counter:
    """Add the gradient of `grpo_loss` over `batches`; return sums over their tokens for `update_metrics`."""
    sums: Counter = Counter()
    for batch in batches:
        logprobs, entropy = score_completions(model, batch, temperature)
        ref_logprobs = None
        if reference is not None:
            with torch.no_grad():
                ref_logprobs = completion_logprobs(reference, batch, temperature)
        surrogate = (batch.old_logprobs, batch.advantages, batch.mask, settings.clip_low, settings.clip_high)
        average = {"aggregation": settings.aggregation, "denominator": denominator}
        kl = {"ref_logprobs": ref_logprobs, "kl_coef": settings.kl_coef}
        loss = grpo_loss(logprobs, *surrogate, **average, **kl)
        if loss.requires_grad:
            loss.backward()
        logprobs = logprobs.detach()
        log_ratio = (logprobs - batch.old_logprobs)[batch.mask].double()
        low, high = clip_counts(logprobs, *surrogate)
        sums["loss"] += loss.item()
        sums["tokens"] += len(log_ratio)
        sums["clipped_low"] += low
        sums["clipped_high"] += high
        sums["entropy"] += entropy.sum().item()
        sums["log_ratio"] += log_ratio.sum().item()
        sums["log_ratio_squared"] += log_ratio.square().sum().item()
    return sums


def update_metrics(updates: list[tuple[Counter, float | None]], tokens: int) -> dict[str, float]:
    """The metrics of a step, from each update's (sums of `add_gradient`, gradient norm).

    The norm is NaN if the update was skipped, None if nothing had an advantage. `policy_entropy` is exact,
    `log_ratio_*` is trainer against sampler before the first update; both in nats. Clip fractions are shares
    of all `tokens` of the step. What could not be measured is NaN.
    """
    measured = [sums for sums, _ in updates if all(map(math.isfinite, sums.values()))]
    first = measured[0] if measured else Counter()
    mean = first["log_ratio"] / (first["tokens"] or math.nan)
    variance = first["log_ratio_squared"] / (first["tokens"] or math.nan) - mean**2
    entropy = sum(sums["entropy"] for sums in measured)
    learned = [(sums, norm) for sums, norm in updates if norm is not None and math.isfinite(norm)]
    count = len(learned) or math.nan
    clipped = {name: sum(sums[name] for sums, _ in learned) for name in ("clipped_low", "clipped_high")}
    low, high = (number / (tokens if learned else math.nan) for number in clipped.values())
    return {
        "loss": sum(sums["loss"] for sums, _ in learned) / count,
        "grad_norm": sum(norm for _, norm in learned) / count,
        "skipped_updates": sum(norm is not None for _, norm in updates) - len(learned),
        "policy_entropy": entropy / (sum(sums["tokens"] for sums in measured) or math.nan),
        "clip_fraction": low + high,
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "log_ratio_mean": mean,
        "log_ratio_std": max(variance, 0.0) ** 0.5,
    }

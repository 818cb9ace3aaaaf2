"""The GRPO update: from scored groups to a better policy.

What this leaves out of PPO, and why: no critic, since the other completions of a group say what to expect (the paper's
section 2.2); no generalised advantage estimation, since the reward comes once, at the end; no KL penalty by default,
since the reward is exact and cannot be fooled into nonsense, though `kl_coef` brings it back.
"""

import torch

from model import Qwen3
from rl.advantage import group_advantages
from rl.batch import Sample, completion_logprobs, make_batch, micro_batches
from rl.loss import clip_counts, grpo_loss, loss_denominator
from rl.optimizer import Optimizer
from rl.recipe import GRPOStage, Recipe
from rl.rollout import Rollout, reward_tensor


def group_samples(groups: list[list[Rollout]], scale_by_std: bool = True) -> list[list[Sample]]:
    """Each rollout with its advantage in its group, ready for a batch."""
    advantages = group_advantages(reward_tensor(groups), scale_by_std=scale_by_std).tolist()
    return [
        [
            Sample(rollout.prompt_ids, rollout.completion.token_ids, rollout.completion.logprobs, advantage)
            for rollout, advantage in zip(group, row, strict=True)
        ]
        for group, row in zip(groups, advantages, strict=True)
    ]


def grpo_update(
    model: Qwen3,
    optimizer: Optimizer,
    groups: list[list[Rollout]],
    stage: GRPOStage,
    recipe: Recipe,
    learning_rate: float,
    reference: Qwen3 | None = None,
) -> dict[str, float]:
    """Learn from one rollout batch in `stage.updates_per_step` optimizer steps, each on its own share of the groups.

    The first share is on-policy, its ratios all one. By the second the weights have moved, and ratios and clip matter.

    Returns:
        Means over the updates: `loss`, `grad_norm`; shares of tokens: `clip_fraction`, `clip_fraction_low`,
        `clip_fraction_high`; `lr`; and, for weights below float32, `weights_moved`, the share that changed.
    """
    samples = group_samples(groups, stage.scale_by_std)
    totals = {"loss": 0.0, "grad_norm": 0.0, "clipped_low": 0, "clipped_high": 0}
    for number in range(stage.updates_per_step):
        share = [sample for group in samples[number :: stage.updates_per_step] for sample in group]
        result = accumulate_gradient(model, share, stage, recipe, reference)
        result["grad_norm"] = optimizer.step(learning_rate, recipe.optimizer.max_grad_norm)
        totals = {name: totals[name] + result[name] for name in totals}
    tokens = sum(len(sample.completion_ids) for group in samples for sample in group)
    low, high = totals["clipped_low"] / tokens, totals["clipped_high"] / tokens
    moved = {} if optimizer.moved_share is None else {"weights_moved": optimizer.moved_share}
    return moved | {
        "loss": totals["loss"] / stage.updates_per_step,
        "grad_norm": totals["grad_norm"] / stage.updates_per_step,
        "clip_fraction": low + high,
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "lr": learning_rate,
    }


def accumulate_gradient(
    model: Qwen3, samples: list[Sample], stage: GRPOStage, recipe: Recipe, reference: Qwen3 | None = None
) -> dict[str, float]:
    """Forward and backward over `samples` in micro-batches; the gradient does not depend on how they are divided.

    Samples with advantage zero have no gradient and are passed over, unless the KL penalty needs them; they still count
    in the average.
    """
    lengths = [len(sample.completion_ids) for sample in samples]
    denominator = loss_denominator(lengths, recipe.sampling.max_new_tokens, stage.aggregation)
    useful = [sample for sample in samples if sample.advantage != 0 or stage.kl_coef]
    result = {"loss": 0.0, "clipped_low": 0, "clipped_high": 0}
    for micro in micro_batches(useful, recipe.optimizer.micro_batch_tokens):
        batch = make_batch(micro, model.device)
        logprobs = completion_logprobs(model, batch, recipe.sampling.temperature)
        ref_logprobs = None
        if reference is not None:
            with torch.no_grad():
                ref_logprobs = completion_logprobs(reference, batch, recipe.sampling.temperature)
        loss = grpo_loss(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.mask,
            stage.clip_low,
            stage.clip_high,
            aggregation=stage.aggregation,
            denominator=denominator,
            ref_logprobs=ref_logprobs,
            kl_coef=stage.kl_coef,
        )
        loss.backward()
        low, high = clip_counts(
            logprobs.detach(), batch.old_logprobs, batch.advantages, batch.mask, stage.clip_low, stage.clip_high
        )
        result["loss"] += loss.item()
        result["clipped_low"] += low
        result["clipped_high"] += high
    return result

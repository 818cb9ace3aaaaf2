"""The GRPO update: from scored groups to a better policy.

What this leaves out of PPO, and why: no critic, since the other completions of a group say what to expect (the paper's
section 2.2); no generalised advantage estimation, since the reward comes once, at the end; no KL penalty by default,
since the reward is exact and cannot be fooled into nonsense, though `kl_coef` brings it back.
"""

from collections import Counter
from dataclasses import replace

import torch

from rl.advantage import group_advantages
from rl.batch import Batch, Sample, completion_logprobs, score_completions
from rl.learner import Learner
from rl.loss import clip_counts, grpo_loss, loss_denominator, truncated_importance
from rl.recipe import GRPOStage
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


def grpo_update(learner: Learner, samples: list[list[Sample]], stage: GRPOStage, learning_rate: float) -> dict[str, float]:
    """Learn from one batch of groups in `stage.updates_per_step` optimizer steps, each on its own share of them.

    An update whose loss or gradient is not finite is left out, see `Learner.step`.

    The first share is on-policy, its ratios all one. By the second the weights have moved, and ratios and clip matter.

    Returns:
        Means over the updates taken: `loss`, `grad_norm`; how many were not, `skipped_updates`; shares of tokens:
        `clip_fraction`, `clip_fraction_low`, `clip_fraction_high`; of the tokens learned from, in nats: `policy_entropy`,
        exact, and, before the first update, `log_ratio_mean` and `log_ratio_std` between trainer and sampler, zero if the
        two agree; `lr`; `micro_batch_tokens`; and, for weights below float32, `weights_moved`, the share that changed.
    """
    shares = [samples[number :: stage.updates_per_step] for number in range(stage.updates_per_step)]
    own = [learner.workers.share(share) for share in shares]
    if stage.importance_cap is not None:
        own = [recompute_logprobs(learner, share) for share in own]
    totals: Counter[str] = Counter()
    first: Counter[str] = Counter()
    for share, mine in zip(shares, own, strict=True):
        lengths = [len(sample.completion_ids) for group in share for sample in group]
        denominator = loss_denominator(lengths, learner.recipe.sampling.max_new_tokens, stage.aggregation)
        sums = accumulate_gradient(learner, [sample for group in mine for sample in group], stage, denominator)
        norm = learner.step(learning_rate)
        if norm is not None:
            first = first if totals else sums
            totals.update(sums | {"grad_norm": norm, "updates": 1})
    tokens, updates = sum(len(sample.completion_ids) for group in samples for sample in group), max(1, totals["updates"])
    low, high = totals["clipped_low"] / tokens, totals["clipped_high"] / tokens
    count = max(1, first["tokens"])
    mean = first["log_ratio"] / count
    moved = {} if learner.optimizer.moved_share is None else {"weights_moved": learner.optimizer.moved_share}
    return moved | {
        "loss": totals["loss"] / updates,
        "grad_norm": totals["grad_norm"] / updates,
        "skipped_updates": stage.updates_per_step - totals["updates"],
        "policy_entropy": totals["entropy"] / max(1, totals["tokens"]),
        "clip_fraction": low + high,
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "log_ratio_mean": mean,
        "log_ratio_std": max(0.0, first["log_ratio_squared"] / count - mean**2) ** 0.5,
        "lr": learning_rate,
        "micro_batch_tokens": learner.micro_batch_tokens,
    }


def recompute_logprobs(learner: Learner, groups: list[list[Sample]]) -> list[list[Sample]]:
    """The samples with the trainer's log-probabilities of their tokens beside the sampler's, before any update."""
    found: dict[int, list[float]] = {}
    for micro, batch in learner.batches([sample for group in groups for sample in group]):
        with torch.no_grad():
            logprobs = completion_logprobs(learner.model, batch, learner.recipe.sampling.temperature)
        for sample, row, mask in zip(micro, logprobs, batch.mask, strict=False):
            found[id(sample)] = row[mask].tolist()
    return [[replace(sample, recomputed_logprobs=found[id(sample)]) for sample in group] for group in groups]


def accumulate_gradient(
    learner: Learner, samples: list[Sample], stage: GRPOStage, denominator: float | None = None
) -> Counter[str]:
    """Forward and backward over `samples` in micro-batches; the gradient does not depend on how they are divided.

    Samples with advantage zero have no gradient and are passed over, unless the KL penalty needs them; they still count
    in the average. `denominator` is that of the whole update, of which other processes may have the rest; None: there is
    no rest.

    Returns, of all processes' samples:
        `loss`, and sums over the tokens learned from: `tokens`, `clipped_low`, `clipped_high`, `entropy`, and
        `log_ratio` and `log_ratio_squared` against the sampler's log-probabilities.
    """
    sampling = learner.recipe.sampling
    if denominator is None:
        lengths = [len(sample.completion_ids) for sample in samples]
        denominator = loss_denominator(lengths, sampling.max_new_tokens, stage.aggregation)

    def backward(batch: Batch) -> dict[str, float]:
        logprobs, entropy = score_completions(learner.model, batch, sampling.temperature)
        ref_logprobs = importance = None
        if learner.reference is not None:
            with torch.no_grad():
                ref_logprobs = completion_logprobs(learner.reference, batch, sampling.temperature)
        if stage.importance_cap is not None:
            importance = truncated_importance(batch.recomputed_logprobs, batch.old_logprobs, stage.importance_cap)
        ratio_of = (batch.recomputed_logprobs, batch.advantages, batch.mask, stage.clip_low, stage.clip_high)
        loss = grpo_loss(
            logprobs, *ratio_of, aggregation=stage.aggregation, denominator=denominator,
            ref_logprobs=ref_logprobs, kl_coef=stage.kl_coef, importance=importance,
        )  # fmt: skip
        loss.backward()
        logprobs = logprobs.detach()
        log_ratio = (logprobs - batch.old_logprobs)[batch.mask].double()
        low, high = clip_counts(logprobs, *ratio_of)
        return {
            "loss": loss.item(),
            "tokens": len(log_ratio),
            "clipped_low": low,
            "clipped_high": high,
            "entropy": entropy.sum().item(),
            "log_ratio": log_ratio.sum().item(),
            "log_ratio_squared": log_ratio.square().sum().item(),
        }

    useful = [sample for sample in samples if sample.advantage != 0 or stage.kl_coef]
    return learner.accumulate(useful, backward)

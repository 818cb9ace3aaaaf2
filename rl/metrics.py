"""What a rollout batch looks like, in numbers."""

import math

from data.traces import non_latin
from rl.rollout import Rollout

Groups = list[list[Rollout]]


def rollout_metrics(groups: Groups) -> dict[str, float]:
    """The metrics of a rollout batch, under the names of `metrics.jsonl`; shares are from 0 to 1.

    `entropy` is estimated by the mean of -logprob over the sampled tokens, in nats.
    """
    rollouts = [rollout for group in groups for rollout in group]
    count = len(rollouts)
    tokens = sum(len(rollout.completion.token_ids) for rollout in rollouts)
    spread = [len({rollout.score.reward for rollout in group}) > 1 for group in groups]
    return {
        "reward_mean": sum(rollout.score.reward for rollout in rollouts) / count,
        "train_accuracy": sum(rollout.score.outcome == "correct" for rollout in rollouts) / count,
        "near_fraction": sum(rollout.score.outcome == "near" for rollout in rollouts) / count,
        "format_rate": sum(rollout.score.outcome != "malformed" for rollout in rollouts) / count,
        "entropy": -sum(sum(rollout.completion.logprobs) for rollout in rollouts) / tokens,
        "completion_length": tokens / count,
        "truncated_fraction": sum(not rollout.completion.finished for rollout in rollouts) / count,
        "non_latin_fraction": non_latin_fraction(groups),
        "silent_groups": 1 - sum(spread) / len(groups),  # all rewards equal: advantages are zero
        "tokens": tokens,
    } | {f"pass_at_{k}": pass_at_k(groups, k) for k in (2, 4, 8, 16, 32) if k <= len(groups[0])}


def pass_at_k(groups: Groups, k: int) -> float:
    """Chance that one of k completions is correct, by the unbiased estimator (arXiv:2107.03374, eq. 1)."""
    missed = 0.0
    for group in groups:
        wrong = sum(rollout.score.outcome != "correct" for rollout in group)
        missed += math.comb(wrong, k) / math.comb(len(group), k)
    return 1 - missed / len(groups)


def non_latin_fraction(groups: Groups) -> float:
    """Share of characters that are letters outside the Latin script."""
    texts = [rollout.text for group in groups for rollout in group]
    return sum(map(non_latin, texts)) / max(1, sum(map(len, texts)))

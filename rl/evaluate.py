"""Accuracy on held-out problems, with its uncertainty."""

import math
from collections import Counter
from dataclasses import dataclass

from data import Problem
from model import Qwen3, Tokenizer
from rl.recipe import SamplingSettings
from rl.rollout import Rollout, collect_rollouts, rollout_metrics

OUTCOMES = ("correct", "near", "wrong", "malformed")


@dataclass(frozen=True)
class Evaluation:
    """One completion for each of some problems.

    Attributes:
        accuracy: share of completions that are correct, with its 95 % interval `low` to `high`.
        counts: completions by outcome.
        completion_length: mean, in tokens.
        truncated_fraction: share that ran into the token limit.
    """

    accuracy: float
    low: float
    high: float
    counts: dict[str, int]
    completion_length: float
    truncated_fraction: float
    rollouts: list[Rollout]

    def __str__(self) -> str:
        return f"{100 * self.accuracy:.1f} % ({100 * self.low:.1f} to {100 * self.high:.1f})"


def evaluate(
    model: Qwen3, tokenizer: Tokenizer, problems: list[Problem], sampling: SamplingSettings, seed: int
) -> Evaluation:
    """Sample one completion a problem and score it."""
    groups = collect_rollouts(model, tokenizer, problems, 1, sampling, seed)
    rollouts = [group[0] for group in groups]
    metrics = rollout_metrics(groups)
    found = Counter(rollout.score.outcome for rollout in rollouts)
    low, high = wilson_interval(found["correct"], len(rollouts))
    return Evaluation(
        accuracy=found["correct"] / len(rollouts),
        low=low,
        high=high,
        counts={outcome: found[outcome] for outcome in OUTCOMES},
        completion_length=metrics["completion_length"],
        truncated_fraction=metrics["truncated_fraction"],
        rollouts=rollouts,
    )


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927): within [0, 1], and of use at 0 and at `trials` successes too."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    margin = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)

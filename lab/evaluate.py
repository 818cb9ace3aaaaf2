"""Accuracy on held-out problems with its uncertainty, and other measures of a model's completions."""

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from data.task import AnyProblem, Task
from model import Qwen3, Tokenizer
from rl.rollout import Rollout, collect_rollouts

OUTCOMES = ("correct", "near", "wrong", "malformed")
EVALUATION_SEED = 1_000_003  # every evaluation of a run samples with the same random numbers
Group = list[Rollout]


@dataclass(frozen=True)
class Evaluation:
    """Scored completions; the interval counts problems, since completions of one are not independent."""

    accuracy: float  # share of a problem's completions that are correct, averaged over problems
    low: float  # end of its 95 % interval
    high: float
    shares: list[float]  # of each problem's completions that are correct
    counts: dict[str, int]  # completions by outcome
    completion_length: float  # mean, in tokens
    truncated_fraction: float  # share of completions that reached the token limit
    groups: list[Group]  # [problem][sample]

    @classmethod
    def of(cls, groups: list[Group]) -> "Evaluation":
        shares = [fmean(rollout.outcome == "correct" for rollout in group) for group in groups]
        low, high = wilson_interval(sum(shares), len(groups))
        rollouts = [rollout for group in groups for rollout in group]
        counts = Counter(rollout.outcome for rollout in rollouts)
        return cls(
            accuracy=fmean(shares),
            low=low,
            high=high,
            shares=shares,
            counts={outcome: counts[outcome] for outcome in OUTCOMES},
            completion_length=fmean(len(rollout.completion.token_ids) for rollout in rollouts),
            truncated_fraction=fmean(not rollout.completion.finished for rollout in rollouts),
            groups=groups,
        )


def evaluate(
    model: Qwen3, tokenizer: Tokenizer, task: Task, problems: list[AnyProblem], **options
) -> Evaluation:
    """Sample completions and score them; `options` are those of `collect_rollouts`."""
    return Evaluation.of(collect_rollouts(model, tokenizer, task, problems, **options))


def problems_hash(problems: list[AnyProblem]) -> str:
    """12 digits of the SHA-256 of the problems in their order; evaluations are comparable if it is equal."""
    text = json.dumps([list(problem.row().values()) for problem in problems])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927); it lies in [0, 1] and is not empty at 0 or 1."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    margin = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)


def bootstrap_interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean of `values`, such as differences, from 10,000 resamples (Efron, 1979)."""
    drawn = np.asarray(values)
    rng = np.random.default_rng(seed)
    means = [rng.choice(drawn, len(drawn)).mean() for _ in range(10_000)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)

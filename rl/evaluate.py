"""Accuracy on held-out problems, with its uncertainty."""

import math
from collections import Counter
from dataclasses import dataclass

from data import Problem, solve
from model import Qwen3, Tokenizer
from rl.console import sampling_progress
from rl.recipe import SamplingSettings
from rl.rollout import Rollout, collect_rollouts, rollout_metrics

OUTCOMES = ("correct", "near", "wrong", "malformed")


@dataclass(frozen=True)
class Evaluation:
    """One or more completions for each of some problems.

    Attributes:
        accuracy: share of completions that are correct, with its 95 % interval `low` to `high`. Completions of one
            problem are not independent, so the interval counts problems, whatever the number of completions.
        counts: completions by outcome.
        completion_length: mean, in tokens.
        truncated_fraction: share that ran into the token limit.
        groups: the completions, [problem][sample].
    """

    accuracy: float
    low: float
    high: float
    counts: dict[str, int]
    completion_length: float
    truncated_fraction: float
    groups: list[list[Rollout]]


def evaluate(
    model: Qwen3,
    tokenizer: Tokenizer,
    problems: list[Problem],
    sampling: SamplingSettings,
    seed: int,
    num_samples: int = 1,
    quiet: bool = False,
) -> Evaluation:
    """Sample `num_samples` completions a problem and score them; without `quiet` a terminal shows how far it is."""
    with sampling_progress("evaluation", len(problems) * num_samples, quiet) as progress:
        groups = collect_rollouts(model, tokenizer, problems, num_samples, sampling, seed, progress)
    metrics = rollout_metrics(groups)
    found = Counter(rollout.score.outcome for group in groups for rollout in group)
    low, high = wilson_interval(metrics["train_accuracy"] * len(groups), len(groups))
    return Evaluation(
        accuracy=metrics["train_accuracy"],
        low=low,
        high=high,
        counts={outcome: found[outcome] for outcome in OUTCOMES},
        completion_length=metrics["completion_length"],
        truncated_fraction=metrics["truncated_fraction"],
        groups=groups,
    )


def accuracy_by_difficulty(groups: list[list[Rollout]]) -> dict[str, tuple[float, int]]:
    """(accuracy, problems) for problems of 3 and 4 numbers, where + and - suffice and where * or / is needed.

    A model may do well on the whole and never multiply; the whole does not show it.
    """
    kinds: dict[str, list[float]] = {}
    for group in groups:
        problem = group[0].problem
        need = "+ and - suffice" if solve(problem, operators="+-") else "needs * or /"
        share = sum(rollout.score.outcome == "correct" for rollout in group) / len(group)
        kinds.setdefault(f"{len(problem.numbers)} numbers, {need}", []).append(share)
    return {kind: (sum(shares) / len(shares), len(shares)) for kind, shares in sorted(kinds.items())}


def distinct_answers(groups: list[list[Rollout]]) -> float:
    """Mean number of different well-formed answers a problem gets; SFT may raise accuracy and narrow this."""
    answers = [
        {r.text.partition("</answer>")[0].rpartition("<answer>")[2] for r in group if r.score.outcome != "malformed"}
        for group in groups
    ]
    return sum(map(len, answers)) / len(answers)


def wilson_interval(successes: float, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson, 1927): within [0, 1], and of use at 0 and at `trials` successes too."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    margin = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - margin) / scale), min(1.0, (centre + margin) / scale)

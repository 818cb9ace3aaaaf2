"""Metrics of a rollout batch."""

import math
import re
from collections import Counter

from data.traces import non_latin
from rl.rollout import Groups

ANSWER = re.compile(r"<answer>([^<]{1,256})</answer>")


def rollout_metrics(groups: Groups) -> dict[str, float]:
    """The metrics of a rollout batch, under the names of `metrics.jsonl`; shares are from 0 to 1.

    `entropy` is estimated by the mean of -logprob over the sampled tokens, in nats.
    """
    rollouts = [rollout for group in groups for rollout in group]
    count = len(rollouts)
    outcomes = Counter(rollout.outcome for rollout in rollouts)
    tokens = sum(len(rollout.completion.token_ids) for rollout in rollouts)
    logprobs = sum(sum(rollout.completion.logprobs) for rollout in rollouts)
    truncated = sum(not rollout.completion.finished for rollout in rollouts)
    silent = sum(len({rollout.reward for rollout in group}) == 1 for group in groups)
    form, form_fraction = common_form([rollout.text for rollout in rollouts])
    metrics = {
        "reward_mean": sum(rollout.reward for rollout in rollouts) / count,
        "train_accuracy": outcomes["correct"] / count,
        "near_fraction": outcomes["near"] / count,
        "format_rate": (count - outcomes["malformed"]) / count,
        "entropy": -logprobs / tokens,
        "completion_length": tokens / count,
        "truncated_fraction": truncated / count,
        "non_latin_fraction": non_latin_fraction(groups),
        "silent_groups": silent / len(groups),  # all rewards equal: advantages are zero
        "common_form": form,
        "common_form_fraction": form_fraction,
        "tokens": tokens,
    }
    for k in (2, 4, 8, 16, 32):
        if k <= len(groups[0]):
            metrics[f"pass_at_{k}"] = pass_at_k(groups, k)
    return metrics


def common_form(texts: list[str]) -> tuple[str, float]:
    """The most common form of the answers in `texts`, such as `n+n*n`, and the share that has it.

    The form of an answer is its text with each number written as n, without blanks. The share is of the
    completions with an answer; without any it is 0.
    """
    forms: Counter[str] = Counter()
    for text in texts:
        answers = ANSWER.findall(text)
        if answers:
            with_n = re.sub(r"[0-9]+", "n", answers[-1])
            forms[re.sub(r"\s", "", with_n)] += 1
    if not forms:
        return "", 0.0
    form, count = forms.most_common(1)[0]
    return form, count / forms.total()


def pass_at_k(groups: Groups, k: int) -> float:
    """Chance that k completions hold a correct one, by the unbiased estimator (arXiv:2107.03374, eq. 1)."""
    missed = 0.0
    for group in groups:
        wrong = sum(rollout.outcome != "correct" for rollout in group)
        missed += math.comb(wrong, k) / math.comb(len(group), k)
    return 1 - missed / len(groups)


def non_latin_fraction(groups: Groups) -> float:
    """Share of characters that are letters outside the Latin script."""
    text = "".join(rollout.text for group in groups for rollout in group)
    return non_latin(text) / max(1, len(text))

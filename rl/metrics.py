"""What a rollout batch looks like, in numbers."""

import math
import re
from collections import Counter

from data.traces import non_latin
from rl.rollout import Rollout

ANSWER = re.compile(r"<answer>([^<]{1,256})</answer>")
Groups = list[list[Rollout]]


def rollout_metrics(groups: Groups) -> dict[str, float]:
    """The metrics of a rollout batch, under the names of `metrics.jsonl`; shares are from 0 to 1.

    `entropy` is estimated by the mean of -logprob over the sampled tokens, in nats.
    """
    rollouts = [rollout for group in groups for rollout in group]
    count = len(rollouts)
    tokens = sum(len(rollout.completion.token_ids) for rollout in rollouts)
    spread = [len({rollout.score.reward for rollout in group}) > 1 for group in groups]
    form, form_fraction = common_form([rollout.text for rollout in rollouts])
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
        "common_form": form,
        "common_form_fraction": form_fraction,
        "tokens": tokens,
    } | {f"pass_at_{k}": pass_at_k(groups, k) for k in (2, 4, 8, 16, 32) if k <= len(groups[0])}


def common_form(texts: list[str]) -> tuple[str, float]:
    """The most common form of the answers in `texts`, such as `n+n*n`, and the share that has it.

    The form of an answer is its text with each number written as n, without blanks. The share is of the
    completions with an answer; without any it is 0.
    """
    answers = [found[-1] for text in texts if (found := ANSWER.findall(text))]
    forms = Counter(re.sub(r"\s", "", re.sub(r"[0-9]+", "n", answer)) for answer in answers)
    [(form, count)] = forms.most_common(1) or [("", 0)]
    return form, count / max(1, len(answers))


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

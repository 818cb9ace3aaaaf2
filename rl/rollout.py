"""From problems to scored completions: prompt, sample, decode, score."""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from data.traces import non_latin
from model import Completion, Qwen3, Tokenizer, generate, prompt_ids
from rl.recipe import SamplingSettings
from rl.reward import RewardSettings, pay
from rl.sharding import sampling_model
from rl.workers import ALONE, Workers
from tasks import Problem, Score, Task


@dataclass(frozen=True)
class Rollout:
    """One completion with its problem and its verdict; `text` is the completion without its stop token."""

    problem: Problem
    prompt_ids: list[int]
    completion: Completion
    text: str
    score: Score


@dataclass(frozen=True)
class Actor:
    """A model that answers the problems of a task, sampling in a certain way."""

    model: Qwen3
    tokenizer: Tokenizer
    task: Task
    sampling: SamplingSettings

    def prompt_ids(self, problem: Problem) -> list[int]:
        return prompt_ids(self.tokenizer, self.task.prompt(problem), self.sampling.thinking)

    def judge(self, problem: Problem, prompt: list[int], completion: Completion) -> Rollout:
        text = self.tokenizer.decode(completion.token_ids[: -1 if completion.finished else None])
        return Rollout(problem, prompt, completion, text, self.task.score(text, problem, self.sampling.thinking))


def collect_rollouts(
    actor: Actor,
    problems: list[Problem],
    num_samples: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    workers: Workers = ALONE,
) -> list[list[Rollout]]:
    """`num_samples` scored completions for each problem, as `[problem][sample]`; `progress` as in `generate`.

    A group is a place in this list, not a prompt: the same problem twice makes two groups. Of several processes each
    samples its share of the groups, and gets all of them.

    A completion is decoded and judged in a thread while others are still sampled: `benchmarks/overlap.py` says what that gives.
    """
    sampling, prompts = actor.sampling, [actor.prompt_ids(problem) for problem in problems]
    mine = list(zip(workers.share(problems), workers.share(prompts), strict=True))
    verdicts: dict[tuple[int, int], Future[Rollout]] = {}
    thread = ThreadPoolExecutor(1)

    def hand_over(number: int, sample: int, completion: Completion) -> None:
        verdicts[number, sample] = thread.submit(actor.judge, *mine[number], completion)

    try:
        with sampling_model(actor.model) as sampler:
            generate(
                sampler,
                prompts,
                num_samples=num_samples,
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                stop_token_ids=actor.tokenizer.stop_token_ids,
                seed=seed,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                max_cache_tokens=sampling.max_cache_tokens,
                only=slice(workers.rank, None, workers.size),
                progress=progress,
                on_completion=hand_over,
            )
        groups = [[verdicts[number, sample].result() for sample in range(num_samples)] for number in range(len(mine))]
    finally:
        thread.shutdown(wait=False, cancel_futures=True)  # who breaks off, or fails, does not wait for other verdicts
    return workers.join(groups)


def reward_tensor(groups: list[list[Rollout]]) -> torch.Tensor:
    """Rewards as [groups, samples], float32."""
    return torch.tensor([[rollout.score.reward for rollout in group] for group in groups])


def paid(groups: list[list[Rollout]], settings: RewardSettings) -> list[list[Rollout]]:
    """The rollouts with the rewards that a recipe pays, see `rl.reward.pay`."""
    return [[replace(r, score=pay(r.score, r.text, settings)) for r in group] for group in groups]


def pass_at_k(groups: list[list[Rollout]], k: int) -> float:
    """Chance that at least one of k completions is correct, by the unbiased estimator (arXiv:2107.03374, equation 1)."""
    missed = 0.0
    for group in groups:
        wrong = sum(rollout.score.outcome != "correct" for rollout in group)
        missed += math.comb(wrong, k) / math.comb(len(group), k)
    return 1 - missed / len(groups)


def non_latin_fraction(groups: list[list[Rollout]]) -> float:
    """Share of characters that are letters outside the Latin script."""
    texts = [rollout.text for group in groups for rollout in group]
    return sum(map(non_latin, texts)) / max(1, sum(map(len, texts)))


def rollout_metrics(groups: list[list[Rollout]]) -> dict[str, float]:
    """What a batch of rollouts looks like, under the names of `metrics.jsonl`; shares are from 0 to 1.

    `entropy` is estimated from the samples: the mean of -logprob over the sampled tokens, in nats. Its expectation is
    the policy's entropy, and it needs no pass over the vocabulary.
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
        "silent_groups": 1 - sum(spread) / len(groups),
        "tokens": tokens,
    } | {f"pass_at_{k}": pass_at_k(groups, k) for k in (2, 4, 8, 16, 32) if k <= len(groups[0])}

"""From problems to scored completions: prompt, sample, decode, score."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Interval

from data.task import AnyProblem, Score, Task, solved_examples
from model import Completion, Qwen3, Tokenizer, generate, prompt_ids
from rl.distributed import gather, rank, share, world_size
from rl.ranges import Count, CountOrZero, NonNegative
from rl.reward import RewardSettings, reward_for


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled, in training and in evaluation alike."""

    max_new_tokens: Count = 256  # Tokens a completion may have, its stop token included
    temperature: NonNegative = 1.0  # Softmax temperature; training needs it above 0
    thinking: bool = True  # End the prompt with an open <think>; if false, as the model's template does
    examples: CountOrZero = 0  # Solved examples before the problem, as earlier turns of the chat
    state_limit: bool = False  # Say in the prompt how many tokens there are; not measured on any model yet
    max_cache_tokens: Annotated[int, Interval(ge=1, le=10**12)] | None = None
    """Tokens of keys and values in memory at once, at most; None: as many as fit."""
    top_k: Count | None = None  # Sample from the k likeliest tokens; for evaluation, not for training
    top_p: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Sample from the likeliest tokens that together have this probability; for evaluation, not training."""


def prompt_of(tokenizer: Tokenizer, task: Task, problem: AnyProblem, sampling: SamplingSettings) -> list[int]:
    """The ids that a completion goes on from."""

    def question(asked: AnyProblem) -> str:
        limit = f" Use at most {sampling.max_new_tokens} tokens in all." if sampling.state_limit else ""
        return task.prompt(asked, sampling.thinking) + limit

    examples = []
    if sampling.examples:
        for solved, solution in solved_examples(task, sampling.examples, sampling.thinking):
            opened = "<think>\n" if sampling.thinking else ""
            examples.append((question(solved), opened + solution))
    return prompt_ids(tokenizer, question(problem), sampling.thinking, examples)


@dataclass(frozen=True)
class Rollout:
    """One completion with its problem, and its score; `text` is the completion without its stop token."""

    problem: AnyProblem
    prompt_ids: list[int]
    completion: Completion
    text: str
    score: Score


def collect_rollouts(
    model: Qwen3,
    tokenizer: Tokenizer,
    task: Task,
    problems: list[AnyProblem],
    *,
    sampling: SamplingSettings,
    num_samples: int,
    seed: int,
    reward: RewardSettings = RewardSettings(),
    **watch,
) -> list[list[Rollout]]:
    """Sample and score `num_samples` completions of each problem, as `[problem][sample]`.

    The same problem twice makes two groups. Each rank samples its share and gets all. `watch` may be
    `on_progress` and `cancel` of `generate`.
    """
    prompts = [prompt_of(tokenizer, task, problem, sampling) for problem in problems]
    completions = generate(
        model,
        prompts,
        num_samples=num_samples,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        stop_token_ids=tokenizer.stop_token_ids,
        seed=seed,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        max_cache_tokens=sampling.max_cache_tokens,
        only=slice(rank(), None, world_size()),
        **watch,
    )
    groups = []
    for problem, prompt, its_completions in zip(share(problems), share(prompts), completions, strict=True):
        group = []
        for completion in its_completions:
            text = tokenizer.decode(completion.token_ids[: -1 if completion.finished else None])
            score = task.score(text, problem, sampling.thinking)
            group.append(Rollout(problem, prompt, completion, text, reward_for(score, text, reward)))
        groups.append(group)
    return gather(groups)

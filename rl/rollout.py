"""From problems to rollouts: write the prompt, sample completions, decode and judge them."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Annotated

from annotated_types import Interval

from data.task import AnyProblem, Task, solved_examples
from model import Completion, Qwen3, Tokenizer, generate, prompt_ids
from rl.distributed import cancelled_together, gather, own_part, rank, world_size
from rl.ranges import Count, CountOrZero, NonNegative
from rl.reward import RewardSettings, reward_for

OnProgress = Callable[[int, int], None]  # is told completions done and tokens sampled so far


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled, in training and in evaluation alike."""

    max_new_tokens: Count = 256  # Tokens a completion may have, its stop token included
    temperature: NonNegative = 1.0  # Softmax temperature; training needs it above 0
    thinking: bool = True  # End the prompt with an open <think>; if false, leave no <think> open
    examples: CountOrZero = 0  # Solved examples before the problem, as earlier turns of the chat
    state_limit: bool = False  # State max_new_tokens in the prompt; not measured on any model yet
    max_cache_tokens: Annotated[int, Interval(ge=1, le=10**12)] | None = None
    """Tokens of keys and values in memory at once, at most; None: as many as fit."""
    top_k: Count | None = None  # Sample from the k likeliest tokens; for evaluation, not for training
    top_p: Annotated[float, Interval(gt=0, le=1)] | None = None
    """Sample from the likeliest tokens that together have this probability; for evaluation, not training."""


def prompt_for(
    tokenizer: Tokenizer, task: Task, problem: AnyProblem, sampling: SamplingSettings
) -> list[int]:
    """The ids that a completion goes on from."""
    thinking = sampling.thinking
    opening = "<think>\n" if thinking else ""
    limit = f" Use at most {sampling.max_new_tokens} tokens in all." if sampling.state_limit else ""
    earlier_turns = []
    if sampling.examples:
        for solved, solution in solved_examples(task, sampling.examples, thinking):
            earlier_turns.append((task.prompt(solved, thinking) + limit, opening + solution))
    return prompt_ids(tokenizer, task.prompt(problem, thinking) + limit, thinking, earlier_turns)


@dataclass(frozen=True)
class Rollout:
    """A completion of a problem, its verdict and reward."""

    problem: AnyProblem
    prompt_ids: list[int]
    completion: Completion
    text: str  # of the completion, without its stop token
    outcome: str  # the task's verdict, by which accuracy counts: "correct", "near", "wrong" or "malformed"
    reward: float  # what the recipe pays for it, from which the policy learns


Groups = list[list[Rollout]]  # [problem][sample]


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
    on_progress: OnProgress | None = None,
    cancel: Event | None = None,
) -> Groups:
    """Sample and judge `num_samples` completions of each problem, as `[problem][sample]`.

    The same problem twice makes two groups. Each rank samples its own part and gets all. `on_progress` and
    `cancel` are those of `generate`.
    """
    prompts = [prompt_for(tokenizer, task, problem, sampling) for problem in problems]
    with cancelled_together():
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
            only=slice(rank(), None, world_size()),  # the prompts that `own_part` gives
            on_progress=on_progress,
            cancel=cancel,
        )
    groups = []
    own = zip(own_part(problems), own_part(prompts), completions, strict=True)
    for problem, prompt, group in own:
        rollouts = []
        for completion in group:
            rollouts.append(make_rollout(tokenizer, task, problem, prompt, completion, sampling, reward))
        groups.append(rollouts)
    return gather(groups)


def make_rollout(
    tokenizer: Tokenizer,
    task: Task,
    problem: AnyProblem,
    prompt: list[int],
    completion: Completion,
    sampling: SamplingSettings,
    reward_settings: RewardSettings,
) -> Rollout:
    """Decode a completion of `prompt`; the task gives its verdict, and the recipe its reward."""
    token_ids = completion.token_ids
    if completion.finished:
        token_ids = token_ids[:-1]
    text = tokenizer.decode(token_ids)
    verdict = task.score(text, problem, sampling.thinking)
    return Rollout(
        problem=problem,
        prompt_ids=prompt,
        completion=completion,
        text=text,
        outcome=verdict.outcome,
        reward=reward_for(verdict, text, completion, reward_settings),
    )

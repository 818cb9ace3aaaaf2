"""Completions for any number of prompts, in waves as large as memory allows.

`plain_completion` is what the sampler does; `generate` does the same for many at once, and fast.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.config import ModelError
from model.distribution import random_streams, sample
from model.memory import cache_tokens_that_fit
from model.qwen3 import Qwen3
from model.wave import Completion, Wave


@torch.inference_mode()
def generate(
    model: Qwen3,
    prompts: list[list[int]],
    *,
    num_samples: int = 1,
    max_new_tokens: int,
    temperature: float = 1.0,
    stop_token_ids: tuple[int, ...] | list[int] = (),
    seed: int = 0,
    top_k: int | None = None,
    top_p: float | None = None,
    max_cache_tokens: int | None = None,
    only: slice = slice(None),
    progress: Callable[[int, int], None] | None = None,
    on_completion: Callable[[int, int, Completion], None] | None = None,
) -> list[list[Completion]]:
    """Sample `num_samples` completions of at most `max_new_tokens` tokens for each prompt of ids.

    Each sample has a random stream of its own, made from the seed, its prompt's ids and its number in the group. So a
    completion depends neither on the batch it is sampled in nor on its place there (up to the rounding of matrix
    products, which may differ with the batch's size), and no two groups share a stream, equal prompts included.

    Args:
        temperature: 0 is greedy.
        top_k, top_p: sample from the k likeliest tokens, or from the likeliest that together reach probability p. For
            evaluation; training refuses them, since its log-probabilities are the full distribution's.
        max_cache_tokens: tokens whose keys and values may be in memory at once, each prompt's counted once for its
            group; None: what free memory allows. Prompts that find no room wait for the next wave.
        only: sample for `prompts[only]`, as if for all: several processes share one call's prompts out by it.
        progress: called now and then with (completions done, tokens sampled so far).
        on_completion: called once for each completion, soon after it is done, while others are still sampled, with its
            two places in what is returned and itself.

    Returns:
        `[prompt][sample]` completions, of the prompts in `only`.

    Raises:
        ValueError: an argument out of its range, or an empty prompt.
        ModelError: a prompt for which `max_cache_tokens`, or memory, has no room.
    """
    check_arguments(model, prompts, num_samples, max_new_tokens, temperature, top_k, top_p)
    if not prompts[only]:
        return []
    streams = random_streams(prompts, num_samples, max_new_tokens, seed, only)  # [prompts, num_samples, max_new_tokens]
    prompts = prompts[only]
    stops = torch.tensor(list(stop_token_ids), dtype=torch.int64, device=model.device)
    from_memory = max_cache_tokens is None
    room = cache_tokens_that_fit(model, max_new_tokens) if from_memory else max_cache_tokens
    groups: list[list[Completion]] = [[] for _ in prompts]
    done = tokens = 0
    for group, samples in waves(list(map(len, prompts)), num_samples, max_new_tokens, room, from_memory):
        wave = Wave(model, prompts[group], streams[group, samples], stops, (temperature, top_k, top_p))
        for now_done, now_tokens in wave.run():
            if progress:
                progress(done + now_done, tokens + now_tokens)
            while on_completion and wave.left:
                number, completion = wave.left.pop()
                prompt, sample = divmod(number, wave.num_samples)
                on_completion(group.start + prompt, samples.start + sample, completion)
        done, tokens = done + now_done, tokens + now_tokens
        for completions, found in zip(groups[group], wave.groups(), strict=True):
            completions += found
        del wave  # its keys and values have to be gone before the next one's come
    return groups


def waves(
    lengths: list[int], num_samples: int, max_new_tokens: int, max_cache_tokens: int, from_memory: bool = False
) -> list[tuple[slice, slice]]:
    """Divide groups into (prompts, samples) whose keys and values fit together, however long the completions get.

    Groups stay whole, in their order; one that is too large alone is divided into as few parts as it takes.

    Args:
        lengths: tokens of each prompt. A wave pads its prompts to the longest.
        from_memory: `max_cache_tokens` is what free memory allows, so no error advises to raise it.

    Raises:
        ModelError: there is no room for one completion of a prompt.
    """
    planned, start = [], 0
    while start < len(lengths):
        end, longest = start, 0
        while end < len(lengths):
            longest = max(longest, lengths[end])
            if (end + 1 - start) * (longest + num_samples * max_new_tokens) > max_cache_tokens:
                break
            end += 1
        if end > start:
            planned.append((slice(start, end), slice(0, num_samples)))
            start = end
            continue
        at_once = (max_cache_tokens - lengths[start]) // max_new_tokens
        if at_once < 1:
            found, advice = ("memory has", "") if from_memory else ("there is", "raise max_cache_tokens, ")
            raise ModelError(
                f"{found} room for {max_cache_tokens} tokens of keys and values, and a prompt of {lengths[start]} with "
                f"{max_new_tokens} new ones takes {lengths[start] + max_new_tokens}: {advice}lower max_new_tokens, "
                "or take a smaller model"
            )
        for first in range(0, num_samples, at_once):
            planned.append((slice(start, start + 1), slice(first, min(first + at_once, num_samples))))
        start += 1
    return planned


def plain_completion(
    model: Qwen3,
    prompt: list[int],
    uniforms: Tensor,
    stop_token_ids: tuple[int, ...] | list[int],
    distribution: tuple[float, int | None, float | None],
) -> Completion:
    """The sampler without its speed: one completion, every token from a forward over all tokens before it.

    Args:
        uniforms: [max_new_tokens], the random number of each token, in [0, 1).
        distribution: temperature, top_k, top_p.
    """
    token_ids: list[int] = []
    logprobs: list[float] = []
    for uniform in uniforms:
        logits = model(torch.tensor([prompt + token_ids], device=model.device))[:, -1]
        sampled, logprob = sample(logits, uniform[None], model.num_tokens, *distribution)
        token_ids.append(sampled.item())
        logprobs.append(logprob.item())
        if token_ids[-1] in stop_token_ids:
            return Completion(token_ids, logprobs, finished=True)
    return Completion(token_ids, logprobs, finished=False)


def check_arguments(model, prompts, num_samples, max_new_tokens, temperature, top_k, top_p) -> None:
    for name, value in (("num_samples", num_samples), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or a positive number, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], not {top_p}")
    for prompt in prompts:
        if not prompt:
            raise ValueError("a prompt needs at least one token")
        if max(prompt) >= model.config.vocab_size or min(prompt) < 0:
            raise ValueError(f"prompt ids must lie in [0, {model.config.vocab_size}), found {max(prompt)} or {min(prompt)}")

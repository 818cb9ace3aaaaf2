"""Completions for a batch of prompts: prefill each prompt once, then decode token by token with a KV cache.

One function, `token_logprobs`, turns logits into log-probabilities for the sampler and for the trainer, so that the
ratio between the two is one until the weights move.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.kv_cache import KVCache
from model.qwen3 import Qwen3

# Rows that have stopped are carried along, their tokens ignored, until they are a quarter of the batch; then the cache is
# copied without them. Copying it for every row that stops would cost more than it saves.
DROP_EVERY = 8
DROP_BELOW = 0.75


@dataclass(frozen=True)
class Completion:
    """What the model wrote after a prompt.

    Attributes:
        token_ids: the sampled ids; the stop id is the last one if `finished`.
        logprobs: log-probability of each id under the sampling distribution at its temperature, in nats. Top-k and
            top-p do not enter: they are the full distribution's.
        finished: a stop id came, on the last allowed place at the latest; False means truncated.
    """

    token_ids: list[int]
    logprobs: list[float]
    finished: bool


def token_logprobs(logits: Tensor, temperature: float, num_tokens: int) -> Tensor:
    """Log-probabilities [..., num_tokens] in float32 from logits [..., vocab], in nats.

    Logits past the tokenizer's last entry are cut off: those ids have no text and are never sampled. Temperature 0
    stands for greedy decoding, whose log-probabilities are reported at temperature 1.
    """
    return torch.log_softmax(logits[..., :num_tokens].float() / (temperature or 1.0), dim=-1)


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
    batch_rows: int = 256,
) -> list[list[Completion]]:
    """Sample `num_samples` completions of at most `max_new_tokens` tokens for each prompt of ids.

    Each sample has a random stream of its own, made from the seed, its prompt's ids and its number in the group. So a
    completion depends neither on the batch it is sampled in nor on its place there (up to the rounding of matrix
    products, which may differ with the batch's size), and no two groups share a stream, equal prompts included.

    Args:
        temperature: 0 is greedy.
        top_k, top_p: sample from the k likeliest tokens, or from the likeliest that together reach probability p. For
            evaluation; training refuses them, since its log-probabilities are the full distribution's.
        batch_rows: completions decoded at once; their keys and values have to fit into memory. A group stays together.

    Returns:
        `[prompt][sample]` completions.

    Raises:
        ValueError: an argument out of its range, or an empty prompt.
    """
    check_arguments(model, prompts, num_samples, max_new_tokens, temperature, top_k, top_p)
    if not prompts:
        return []
    stops = torch.tensor(list(stop_token_ids), dtype=torch.int64, device=model.device)
    streams = random_streams(prompts, num_samples, max_new_tokens, seed)  # [prompts, num_samples, max_new_tokens]
    at_once = max(1, batch_rows // num_samples)
    completions = []
    for start in range(0, len(prompts), at_once):
        uniforms = streams[start : start + at_once].to(model.device)
        completions += decode(model, prompts[start : start + at_once], uniforms, stops, (temperature, top_k, top_p))
    return completions


def decode(
    model: Qwen3,
    prompts: list[list[int]],
    uniforms: Tensor,
    stops: Tensor,
    distribution: tuple[float, int | None, float | None],
) -> list[list[Completion]]:
    """Prefill `prompts` and sample from them together, with one uniform number in [0, 1) for each token.

    Args:
        uniforms: [prompts, num_samples, max_new_tokens].
        stops: ids that end a completion, [any number].
        distribution: temperature, top_k, top_p.
    """
    num_samples, max_new_tokens = uniforms.shape[1:]
    rows = len(prompts) * num_samples
    uniforms = uniforms.reshape(rows, max_new_tokens)
    token_ids = torch.zeros(rows, max_new_tokens, dtype=torch.int64, device=model.device)
    logprobs = torch.zeros(rows, max_new_tokens, device=model.device)
    lengths = torch.full((rows,), max_new_tokens, device=model.device)
    finished = torch.zeros(rows, dtype=torch.bool, device=model.device)

    logits, cache = prefill(model, prompts, max_new_tokens)
    running = torch.arange(rows, device=model.device)  # the sample that each row of the batch belongs to
    cache.select(running // num_samples)
    logits = logits[running // num_samples]
    for step in range(max_new_tokens):
        sampled, sampled_logprobs = sample(logits, uniforms[running, step], model.num_tokens, *distribution)
        token_ids[running, step], logprobs[running, step] = sampled, sampled_logprobs
        stopped = torch.isin(sampled, stops) & ~finished[running]
        lengths[running] = torch.where(stopped, step + 1, lengths[running])
        finished[running] |= stopped
        if step + 1 == max_new_tokens:
            break
        if step % DROP_EVERY == 0:  # the only place where the host waits for the device
            keep = (~finished[running]).nonzero()[:, 0]
            if keep.numel() == 0:
                break
            if keep.numel() <= DROP_BELOW * running.numel():
                running, sampled = running[keep], sampled[keep]
                cache.select(keep)
        logits = model(sampled[:, None], cache)[:, -1]
    return collect(token_ids, logprobs, lengths, finished, num_samples)


def prefill(model: Qwen3, prompts: list[list[int]], max_new_tokens: int) -> tuple[Tensor, KVCache]:
    """Run each prompt through the model once: logits of its next token, [prompts, vocab], and the filled cache."""
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    longest = int(lengths.max())
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=model.device)
    cache = KVCache(model.config, len(prompts), longest + max_new_tokens, model.device, model.dtype)
    hidden = model.model(padded, cache)  # [prompts, longest, hidden]
    cache.set_lengths(lengths)
    last = hidden[torch.arange(len(prompts), device=model.device), lengths - 1]
    return model.lm_head(last), cache


def sample(
    logits: Tensor,
    uniforms: Tensor,
    num_tokens: int,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One token a row from logits [rows, vocab]: ids [rows] and their log-probabilities [rows].

    Inverse-CDF sampling: the first token at which the cumulative probability passes the row's uniform number in
    [0, 1). One random number a token, where Gumbel noise or `torch.multinomial` would draw one for each vocabulary
    entry.
    """
    logprobs = token_logprobs(logits, temperature, num_tokens)
    if temperature == 0:
        sampled = logprobs.argmax(-1)
    else:
        cumulative = truncate(logprobs, top_k, top_p).exp().cumsum(-1)
        # u is at most 1 - 2^-24, which keeps u * total below total in float32: the search always ends on a token.
        threshold = uniforms[:, None] * cumulative[:, -1:]
        sampled = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return sampled, logprobs.gather(-1, sampled[:, None])[:, 0]


def truncate(logprobs: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Give probability zero to all but the top-k, then to all but the nucleus (Holtzman et al., arXiv:1904.09751)."""
    if top_k is not None and top_k < logprobs.shape[-1]:
        smallest = logprobs.topk(top_k).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logprobs.softmax(-1).sort(descending=True)
        reached_before = ordered.cumsum(-1) - ordered >= top_p
        logprobs = logprobs.masked_fill(reached_before.scatter(-1, order, reached_before), -torch.inf)
    return logprobs


def random_streams(prompts: list[list[int]], num_samples: int, max_new_tokens: int, seed: int) -> Tensor:
    """Uniform numbers in [0, 1), [prompts, num_samples, max_new_tokens]; each sample from a generator of its own.

    Its key is (seed, prompt, how often the prompt came before among these, number of the sample).
    """
    seen: dict[tuple[int, ...], int] = {}
    rows: list[np.ndarray] = []
    for prompt in prompts:
        key = tuple(prompt)
        seen[key] = seen.get(key, -1) + 1
        text = f"{seed} {seen[key]} {' '.join(map(str, prompt))}"
        for number in range(num_samples):
            digest = hashlib.blake2b(f"{number} {text}".encode(), digest_size=16).digest()
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
            rows.append(generator.random(max_new_tokens, dtype=np.float32))
    return torch.from_numpy(np.stack(rows)).view(len(prompts), num_samples, max_new_tokens)


def collect(
    token_ids: Tensor, logprobs: Tensor, lengths: Tensor, finished: Tensor, num_samples: int
) -> list[list[Completion]]:
    """Cut the rows to their lengths and sort them into their groups."""
    completions = [
        Completion(ids[:length], values[:length], done)
        for ids, values, length, done in zip(
            token_ids.tolist(), logprobs.tolist(), lengths.tolist(), finished.tolist(), strict=True
        )
    ]
    return [completions[start : start + num_samples] for start in range(0, len(completions), num_samples)]


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

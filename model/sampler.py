"""Sampling: from logits to tokens, and from prompts to completions.

`stream` is all that sampling is; `generate` does the same for many completions at once, and fast.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from threading import Event

import numpy as np
import torch
from torch import Tensor

from model.cache import GroupCache, KVCache
from model.config import ModelError
from model.memory import cache_tokens_that_fit
from model.qwen3 import Qwen3

CPU_LOGITS = 2**19  # logits turned into probabilities at a time on a CPU
PREFILL_TOKENS = 16384  # prompt tokens in one forward
ALIGNED = {"cpu": 1, "cuda": 8}  # prompts are padded to a multiple: 16 bytes, as a GPU multiplies fastest
# Every CHECK_EVERY steps the host waits for the device and looks for finished rows. The batch is compacted
# when at most this share is unfinished: compacting copies their cache and, on a GPU, needs a new graph.
CHECK_EVERY = {"cpu": 8, "cuda": 16}
COMPACT_BELOW = {"cpu": 0.9, "cuda": 0.6}

Distribution = tuple[float, int | None, float | None]  # temperature, top_k, top_p


class Cancelled(Exception):
    """Sampling was cancelled; nothing has changed."""


@dataclass(frozen=True)
class Completion:
    """What the model wrote after a prompt."""

    token_ids: list[int]  # the stop token included if `finished`
    logprobs: list[float]  # of each id in nats, at the temperature, before top-k and top-p
    finished: bool  # True if the last token is a stop token; False if max_new_tokens ran out first


def token_logprobs(logits: Tensor, temperature: float, num_tokens: int) -> Tensor:
    """Log-probabilities [..., num_tokens] in nats, float32 or above, from logits [..., vocab].

    It serves sampler and trainer alike. Ids from `num_tokens` on have no text and are never sampled.
    Temperature 0 is greedy decoding, with the log-probabilities of temperature 1.
    """
    logits = logits[..., :num_tokens]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits if temperature in (0, 1) else logits / temperature, dim=-1)


def sample(
    logits: Tensor, uniforms: Tensor, num_tokens: int, temperature: float, top_k=None, top_p=None
) -> tuple[Tensor, Tensor]:
    """Sample a token for each row of logits [rows, vocab]: ids [rows] and their log-probabilities [rows].

    It is the first token at which the cumulative probability passes the row's uniform number in [0, 1).
    """
    token_ids, chosen = [], []
    size = rows_at_once(logits)
    for rows, row_uniforms in zip(logits.split(size), uniforms.split(size), strict=True):
        logprobs = token_logprobs(rows, temperature, num_tokens)
        if temperature == 0:
            sampled = logprobs.argmax(-1, keepdim=True)
        else:
            cumulative = truncate(logprobs, top_k, top_p).exp().cumsum(-1)
            # u <= 1 - 2^-24 keeps u * total below total in float32, so the search always ends on a token.
            sampled = torch.searchsorted(cumulative, row_uniforms[:, None] * cumulative[:, -1:], right=True)
            sampled.clamp_(max=logprobs.shape[-1] - 1)  # a row of NaN gives an index past the end
        token_ids.append(sampled[:, 0])
        chosen.append(logprobs.gather(-1, sampled)[:, 0])
    return torch.cat(token_ids), torch.cat(chosen)


def rows_at_once(logits: Tensor) -> int:
    """Rows of [rows, vocab] to turn into probabilities at a time; on a CPU large temporaries are slow."""
    return max(1, CPU_LOGITS // logits.shape[-1]) if logits.device.type == "cpu" else max(1, len(logits))


def truncate(logprobs: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Set all but the top-k to probability zero, then all but the nucleus (arXiv:1904.09751)."""
    if top_k is not None and top_k < logprobs.shape[-1]:
        smallest = logprobs.topk(top_k).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < smallest, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logprobs.softmax(-1).sort(descending=True)
        reached_before = ordered.cumsum(-1) - ordered >= top_p
        logprobs = logprobs.masked_fill(reached_before.scatter(-1, order, reached_before), -torch.inf)
    return logprobs


def random_streams(
    prompts: list[list[int]], num_samples: int, max_new_tokens: int, seed: int, only: slice = slice(None)
) -> Tensor:
    """Uniform numbers in [0, 1), [prompts[only], num_samples, max_new_tokens], from one generator a sample.

    Its key is (seed, prompt, how often this prompt came before in `prompts`, number of the sample).
    """
    seen: Counter[str] = Counter()
    keys = []
    for prompt in prompts:
        ids = " ".join(map(str, prompt))
        keys.append(f"{seed} {seen[ids]} {ids}")
        seen[ids] += 1
    streams = np.empty((len(keys[only]), num_samples, max_new_tokens), dtype=np.float32)
    for group, key in zip(streams, keys[only], strict=True):
        for number in range(num_samples):
            digest = hashlib.blake2b(f"{number} {key}".encode(), digest_size=16).digest()
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
            generator.random(dtype=np.float32, out=group[number])
    return torch.from_numpy(streams)


@torch.inference_mode()
def stream(
    model: Qwen3, prompt: list[int], uniforms: Tensor, stops: tuple[int, ...], distribution: Distribution
) -> Iterator[tuple[int, float]]:
    """The tokens of one completion as they are sampled, each with its log-probability in nats.

    `uniforms` [max_new_tokens] are random numbers in [0, 1), `stops` the stop token ids.
    """
    model.config.check_positions(len(prompt), len(uniforms))
    cache = KVCache(model.config, 1, len(prompt) + len(uniforms), model.device, model.dtype)
    ids = prompt
    for uniform in uniforms.to(model.device):
        logits = model(torch.tensor([ids], device=model.device), cache=cache)[:, -1]
        token, logprob = sample(logits, uniform[None], model.num_tokens, *distribution)
        check_finite(logprob)
        ids = [token.item()]
        yield ids[0], logprob.item()
        if ids[0] in stops:
            return


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
    on_progress: Callable[[int, int], None] | None = None,
    cancel: Event | None = None,
) -> list[list[Completion]]:
    """Sample `num_samples` completions of at most `max_new_tokens` tokens for each prompt of ids.

    Each sample has its own random stream (see `random_streams`), so a completion does not depend on its
    batch, up to the rounding of matrix products of other sizes. Returns `[prompt][sample]`.

    Args:
        temperature: 0 is greedy.
        top_k, top_p: sample from the k likeliest tokens, or the likeliest of joint probability p.
        max_cache_tokens: tokens of keys and values in memory at once; None: what fits. Other prompts wait.
        only: sample for `prompts[only]`, as if for all; so ranks divide one call among them.
        on_progress: called now and then with (completions done, tokens sampled so far).
        cancel: when a signal or another thread sets it, sampling ends with `Cancelled`.

    Raises ValueError for an argument out of its range, ModelError if there is no room for one completion, if
    the model has too few positions for it, or if logits are not finite.
    """
    check_arguments(model.config.vocab_size, prompts, num_samples, max_new_tokens, temperature, top_k, top_p)
    model.config.check_positions(max(map(len, prompts), default=0), max_new_tokens)
    uniforms = random_streams(prompts, num_samples, max_new_tokens, seed, only)
    prompts = prompts[only]
    stops = torch.tensor(list(stop_token_ids), dtype=torch.int64, device=model.device)
    room = max_cache_tokens or cache_tokens_that_fit(model, max_new_tokens)
    distribution = (temperature, top_k, top_p)
    groups: list[list[Completion]] = [[] for _ in prompts]
    done = tokens = 0
    for group, samples in plan_batches(list(map(len, prompts)), num_samples, max_new_tokens, room):
        batch = DecodeBatch(model, prompts[group], uniforms[group, samples], stops, distribution)
        for batch_done, batch_tokens in batch.run():
            if cancel and cancel.is_set():
                raise Cancelled
            if on_progress:
                on_progress(done + batch_done, tokens + batch_tokens)
        done += batch_done
        tokens += batch_tokens
        for number, completions in enumerate(groups[group]):
            completions += batch.completions[number * batch.num_samples : (number + 1) * batch.num_samples]
        del batch  # free its keys and values before the next batch takes its own
    return groups


def check_arguments(vocab: int, prompts, num_samples, max_new_tokens, temperature, top_k, top_p) -> None:
    """Raise ValueError for an argument out of its range."""
    if min(num_samples, max_new_tokens, top_k or 1) < 1 or top_k == 0:
        raise ValueError("num_samples, max_new_tokens and top_k must be at least 1")
    if not 0 <= temperature < float("inf") or not 0 < (1 if top_p is None else top_p) <= 1:
        raise ValueError(f"temperature must be 0 or more, top_p in (0, 1], not {temperature} and {top_p}")
    for prompt in prompts:
        if not prompt or max(prompt) >= vocab or min(prompt) < 0:
            raise ValueError(f"a prompt needs at least one id, all of them in [0, {vocab}), not {prompt[:8]}")


def check_finite(logprobs: Tensor) -> None:
    """Raise ModelError for a NaN, as log-probabilities are if a logit is NaN or infinite."""
    if logprobs.isnan().any():
        raise ModelError(
            "the model gives logits that are not finite, so there is nothing to sample from: "
            "its weights are damaged, or too large for their number format (try --dtype float32)"
        )


def plan_batches(lengths: list[int], num_samples: int, max_new_tokens: int, room: int) -> list[tuple]:
    """Divide groups, whole and in order, into batches (prompts, samples) of at most `room` cached tokens."""
    own = num_samples * max_new_tokens  # tokens of a group beside its prompt
    batches = []
    start = 0
    while start < len(lengths):
        end = start
        while end < len(lengths) and (end + 1 - start) * (max(lengths[start : end + 1]) + own) <= room:
            end += 1
        prompt = lengths[start]
        fitting = num_samples if end > start else (room - prompt) // max_new_tokens
        if fitting < 1:
            need = f"a prompt of {prompt} and {max_new_tokens} new ones need {prompt + max_new_tokens}"
            advice = "lower max_new_tokens, raise max_cache_tokens if memory allows, or take a smaller model"
            raise ModelError(f"room for {room} tokens of keys and values; {need}: {advice}")
        end = max(end, start + 1)  # a group that is too large comes alone, in parts
        for first in range(0, num_samples, fitting):
            batches.append((slice(start, end), slice(first, min(first + fitting, num_samples))))
        start = end
    return batches


class DecodeBatch:
    """`num_samples` completions for each prompt, decoded in lock-step: one token a row in each forward.

    Finished rows keep decoding, their output discarded, until the batch is compacted. `uniforms` are random
    numbers, [prompts, num_samples, max_new_tokens]. `static` keeps shapes constant between compactions (see
    `GroupCache`); None: where that is faster.
    """

    def __init__(self, model: Qwen3, prompts, uniforms, stops, distribution: Distribution, static=None):
        self.num_samples, self.max_new_tokens = uniforms.shape[1:]
        rows, device = len(prompts) * self.num_samples, model.device
        self.model = model
        self.stops = stops
        self.distribution = distribution
        self.completions: list[Completion | None] = [None] * rows
        # Of the rows still in the batch:
        self.numbers = torch.arange(rows, device=device)  # index in `completions`
        self.uniforms = uniforms.flatten(0, 1).to(device)
        self.token_ids = torch.zeros(rows, self.max_new_tokens, dtype=torch.int64, device=device)
        dtype = torch.promote_types(model.dtype, torch.float32)
        self.logprobs = torch.zeros(rows, self.max_new_tokens, dtype=dtype, device=device)
        logits, cache = prefill(model, prompts)
        if static is None:
            static = device.type == "cuda" or model.dtype == torch.bfloat16
        self.cache = GroupCache(cache, self.num_samples, self.max_new_tokens, static)
        self.record(logits.repeat_interleave(self.num_samples, dim=0))

    def run(self) -> Iterator[tuple[int, int]]:
        """Decode to the end; yields (completions done, tokens sampled) now and then."""
        device = "cuda" if self.model.device.type == "cuda" else "cpu"
        graphed = device == "cuda" and self.model.graphed
        step = GraphedStep(self.step) if graphed else lambda shape: self.step()
        for count in range(1, self.max_new_tokens):
            if count % CHECK_EVERY[device] == 0:
                yield self.compact(count, COMPACT_BELOW[device])
                if len(self.numbers) == 0:
                    return
            self.cache.reserve(count)
            step((len(self.numbers), self.cache.visible))
        yield self.compact(self.max_new_tokens, below=1.0)

    def step(self) -> None:
        """Decode one token for each row. Nothing here waits for the device or depends on what was sampled."""
        last = self.token_ids.index_select(1, self.cache.stored)  # [rows, 1]
        self.record(self.model.next_logits(self.model.model(last, self.cache)[:, -1]))

    def record(self, logits: Tensor) -> None:
        """Sample the token after the stored ones, from logits [rows, vocab]."""
        column = self.cache.stored
        uniforms = self.uniforms.index_select(1, column)[:, 0]
        sampled, logprobs = sample(logits, uniforms, self.model.num_tokens, *self.distribution)
        self.token_ids.index_copy_(1, column, sampled[:, None])
        self.logprobs.index_copy_(1, column, logprobs[:, None])

    def compact(self, count: int, below: float) -> tuple[int, int]:
        """Drop finished rows if at most `below` of all are unfinished; return completions done, tokens."""
        check_finite(self.logprobs[:, :count])
        stops = torch.isin(self.token_ids[:, :count], self.stops)  # [rows, count]
        finished = stops.any(1)
        lengths = torch.where(finished, stops.int().argmax(1) + 1, count)
        dropped = finished if count < self.max_new_tokens else torch.ones_like(finished)
        before = [completion for completion in self.completions if completion]
        done = len(before) + int(dropped.sum())
        tokens = sum(len(completion.token_ids) for completion in before) + int(lengths.sum())
        keep = (~dropped).nonzero()[:, 0]
        if len(keep) <= below * len(dropped):
            columns = (self.numbers, lengths, finished, self.token_ids, self.logprobs)
            rows = zip(*(column[dropped].tolist() for column in columns), strict=True)
            for number, length, ended, token_ids, logprobs in rows:
                self.completions[number] = Completion(token_ids[:length], logprobs[:length], ended)
            self.numbers = self.numbers[keep]
            self.uniforms = self.uniforms[keep]
            self.token_ids = self.token_ids[keep]
            self.logprobs = self.logprobs[keep]
            if len(keep):
                self.cache.select(keep)
        return done, tokens


class GraphedStep:
    """Runs `function` as one CUDA graph: launching its thousand small kernels takes longer than running them.

    It must work in place on the same tensors in every call; a new `shape` says that they have changed.
    """

    def __init__(self, function: Callable[[], None]):
        self.function = function
        self.shape: Hashable = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, shape: Hashable) -> None:
        if shape != self.shape:  # once without a graph: libraries set themselves up on their first call
            self.graph = None
            self.shape = shape
            self.function()
            return
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records, in memory of its own, and runs nothing
                self.function()
        self.graph.replay()


def prefill(model: Qwen3, prompts: list[list[int]]) -> tuple[Tensor, KVCache]:
    """Run each prompt through the model once: logits of its next token, [prompts, vocab], and the cache."""
    aligned = ALIGNED["cuda" if model.device.type == "cuda" else "cpu"]
    longest = -(-max(map(len, prompts)) // aligned) * aligned
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=model.device)
    cache = KVCache(model.config, len(prompts), longest, model.device, model.dtype)
    last = []
    at_once = max(1, PREFILL_TOKENS // longest)
    for start in range(0, len(prompts), at_once):
        rows = slice(start, start + at_once)
        hidden = model.model(padded[rows], cache.part(rows))  # [at_once, longest, hidden]
        last.append(hidden[torch.arange(len(hidden), device=model.device), lengths[rows] - 1])
    cache.set_lengths(lengths)
    return model.next_logits(torch.cat(last)), cache

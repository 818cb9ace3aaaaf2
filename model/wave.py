"""Decoding: a wave of completions that advance together, one token each a forward."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from model.cuda_graph import GraphedStep
from model.distribution import sample
from model.group_cache import GroupCache
from model.kv_cache import KVCache
from model.quantize import has_int8
from model.qwen3 import Qwen3

# Every CHECK_EVERY steps the host looks which rows have stopped, for which it waits for the device. Those leave the
# batch when the others are fewer than this share of it: leaving copies the others' cache and, on a GPU, costs a new graph.
CHECK_EVERY = {"cpu": 8, "cuda": 16}
LEAVE_BELOW = {"cpu": 0.9, "cuda": 0.6}
PREFILL_TOKENS = 16384  # prompt tokens in one forward


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


class Wave:
    """`num_samples` completions of each of some prompts, all at the same distance from their prompts.

    Rows that have stopped go on, their tokens ignored, until they are enough; then they leave, and no later step pays
    for them.

    Args:
        uniforms: [prompts, num_samples, max_new_tokens], the random number of each token, in [0, 1).
        stops: ids that end a completion, [any number].
        distribution: temperature, top_k, top_p.
        static: decode by steps of constant shape (`GroupCache`); None: where that pays, on GPUs and in bfloat16.
    """

    def __init__(
        self,
        model: Qwen3,
        prompts: list[list[int]],
        uniforms: Tensor,
        stops: Tensor,
        distribution: tuple[float, int | None, float | None],
        static: bool | None = None,
    ):
        self.num_samples, self.max_new_tokens = uniforms.shape[1:]
        rows, device = len(prompts) * self.num_samples, model.device
        self.model, self.stops, self.distribution = model, stops, distribution
        self.completions: list[Completion | None] = [None] * rows
        self.left: list[tuple[int, Completion]] = []  # with their numbers, for whoever takes them from here on the way
        # Of the rows in the batch, so fewer and fewer:
        self.samples = torch.arange(rows, device=device)  # which completion each is
        self.uniforms = uniforms.flatten(0, 1).to(device)
        self.token_ids = torch.zeros(rows, self.max_new_tokens, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(rows, self.max_new_tokens, device=device)
        logits, cache = prefill(model, prompts)
        if static is None:
            static = device.type == "cuda" or model.dtype == torch.bfloat16
        self.cache = GroupCache(cache, self.num_samples, self.max_new_tokens, static)
        self.record(logits.repeat_interleave(self.num_samples, dim=0))

    def run(self) -> Iterator[tuple[int, int]]:
        """Decode to the end, yielding now and then how many completions are done and how many tokens sampled."""
        device = "cuda" if self.model.device.type == "cuda" else "cpu"
        graphed = device == "cuda" and not has_int8(self.model)
        step = GraphedStep(self.step) if graphed else lambda shape: self.step()
        for count in range(1, self.max_new_tokens):
            if count % CHECK_EVERY[device] == 0:
                yield self.retire(count, LEAVE_BELOW[device])
                if len(self.samples) == 0:
                    return
            self.cache.reserve(count)
            step(self.cache.shape)
        yield self.retire(self.max_new_tokens, leave_below=1.0)

    def groups(self) -> list[list[Completion]]:
        """The completions, [prompt][sample]."""
        size = self.num_samples
        return [self.completions[start : start + size] for start in range(0, len(self.completions), size)]

    def step(self) -> None:
        """One more token for each row. Nothing here waits for the device or depends on what was sampled."""
        last = self.token_ids.index_select(1, self.cache.stored)  # [rows, 1]
        self.record(self.model(last, self.cache)[:, -1])

    def record(self, logits: Tensor) -> None:
        """Sample what follows the stored tokens, from logits [rows, vocab]."""
        place = self.cache.stored
        uniforms = self.uniforms.index_select(1, place)[:, 0]
        sampled, logprobs = sample(logits, uniforms, self.model.num_tokens, *self.distribution)
        self.token_ids.index_copy_(1, place, sampled[:, None])
        self.logprobs.index_copy_(1, place, logprobs[:, None])

    def retire(self, count: int, leave_below: float) -> tuple[int, int]:
        """Let the rows leave that stopped within their `count` tokens, if those that go on are few enough.

        Returns:
            completions done and tokens sampled, of the whole wave.
        """
        stops = torch.isin(self.token_ids[:, :count], self.stops)
        finished = stops.any(1)
        lengths = torch.where(finished, stops.int().argmax(1) + 1, count)
        leaving = finished if count < self.max_new_tokens else torch.ones_like(finished)
        left = [completion for completion in self.completions if completion]
        done = len(left) + int(leaving.sum())
        tokens = sum(len(completion.token_ids) for completion in left) + int(lengths.sum())
        keep = (~leaving).nonzero()[:, 0]
        if len(keep) <= leave_below * len(leaving):
            columns = (self.samples, lengths, finished, self.token_ids, self.logprobs)
            for row in zip(*(column[leaving].tolist() for column in columns), strict=True):
                number, length, ended, token_ids, logprobs = row
                self.completions[number] = Completion(token_ids[:length], logprobs[:length], ended)
                self.left.append((number, self.completions[number]))
            self.samples, self.uniforms = self.samples[keep], self.uniforms[keep]
            self.token_ids, self.logprobs = self.token_ids[keep], self.logprobs[keep]
            if len(keep):
                self.cache.select(keep)
        return done, tokens


def prefill(model: Qwen3, prompts: list[list[int]]) -> tuple[Tensor, KVCache]:
    """Run each prompt through the model once: logits of its next token, [prompts, vocab], and the filled cache."""
    longest = max(map(len, prompts))
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
    return model.lm_head(torch.cat(last)), cache

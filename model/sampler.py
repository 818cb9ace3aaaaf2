"""Sampling: from logits to tokens, and from prompts to completions.

`sample_completion` is all that sampling is; `generate` does the same for many completions at once, and fast.
"""

import hashlib
import math
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
# when at most COMPACT_BELOW is unfinished: that copies the cache and, on a GPU, needs a new graph.
CHECK_EVERY = {"cpu": 8, "cuda": 16}
COMPACT_BELOW = {"cpu": 0.9, "cuda": 0.6}


class Cancelled(Exception):
    """The work was cancelled, and has changed no weight."""


@dataclass(frozen=True)
class TokenChoice:
    """How a token is chosen from its logits. ValueError: a field is out of its range."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int | None = None  # only the k likeliest tokens
    top_p: float | None = None  # only the likeliest tokens, as many as have this probability together

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], not {self.top_p}")


@dataclass(frozen=True)
class Completion:
    """A sampled completion of a prompt."""

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
    if temperature not in (0, 1):
        logits = logits / temperature
    return torch.log_softmax(logits, dim=-1)


def sample_tokens(
    logits: Tensor, uniforms: Tensor, num_tokens: int, choice: TokenChoice
) -> tuple[Tensor, Tensor]:
    """Sample a token for each row of logits [rows, vocab]: ids [rows] and their log-probabilities [rows].

    It is the first token at which the cumulative probability passes the row's uniform number in [0, 1).
    """
    token_ids = []
    chosen_logprobs = []
    size = rows_at_once(logits)
    for rows, row_uniforms in zip(logits.split(size), uniforms.split(size), strict=True):
        logprobs = token_logprobs(rows, choice.temperature, num_tokens)
        if choice.temperature == 0:
            sampled = logprobs.argmax(-1, keepdim=True)
        else:
            cumulative = truncate(logprobs, choice).exp().cumsum(-1)
            # u <= 1 - 2^-24 keeps u * total below total in float32, so the search always ends on a token.
            threshold = row_uniforms[:, None] * cumulative[:, -1:]
            sampled = torch.searchsorted(cumulative, threshold, right=True)
            sampled.clamp_(max=num_tokens - 1)  # a row of NaN gives an index past the end
        token_ids.append(sampled[:, 0])
        chosen_logprobs.append(logprobs.gather(-1, sampled)[:, 0])
    return torch.cat(token_ids), torch.cat(chosen_logprobs)


def rows_at_once(logits: Tensor) -> int:
    """Rows of [rows, vocab] to turn into probabilities at a time; on a CPU large temporaries are slow."""
    rows = CPU_LOGITS // logits.shape[-1] if logits.device.type == "cpu" else len(logits)
    return max(1, rows)


def truncate(logprobs: Tensor, choice: TokenChoice) -> Tensor:
    """Set all but the top-k to probability zero, then all but the nucleus (arXiv:1904.09751)."""
    if choice.top_k is not None and choice.top_k < logprobs.shape[-1]:
        smallest = logprobs.topk(choice.top_k).values[:, -1:]
        logprobs = logprobs.masked_fill(logprobs < smallest, -torch.inf)
    if choice.top_p is not None and choice.top_p < 1:
        ordered, order = logprobs.softmax(-1).sort(descending=True)
        reached_before = ordered.cumsum(-1) - ordered >= choice.top_p
        outside = reached_before.scatter(-1, order, reached_before)
        logprobs = logprobs.masked_fill(outside, -torch.inf)
    return logprobs


def random_uniforms(prompts: list[list[int]], num_samples: int, max_new_tokens: int, seed: int) -> Tensor:
    """Uniform numbers in [0, 1), [prompts, num_samples, max_new_tokens].

    Each completion has a generator of its own, whose key is made of its number, the seed, how often its
    prompt came before in `prompts`, and the prompt.
    """
    seen: Counter[str] = Counter()
    uniforms = np.empty((len(prompts), num_samples, max_new_tokens), dtype=np.float32)
    for group, prompt in zip(uniforms, prompts, strict=True):
        ids = " ".join(map(str, prompt))
        for number in range(num_samples):
            key = f"{number} {seed} {seen[ids]} {ids}"
            digest = hashlib.blake2b(key.encode(), digest_size=16).digest()
            bits = np.random.Philox(key=int.from_bytes(digest, "little"))
            np.random.Generator(bits).random(dtype=np.float32, out=group[number])
        seen[ids] += 1
    return torch.from_numpy(uniforms)


@torch.inference_mode()
def sample_completion(
    model: Qwen3, prompt: list[int], uniforms: Tensor, stop_ids: tuple[int, ...], choice: TokenChoice
) -> Iterator[tuple[int, float]]:
    """The tokens of one completion as they are sampled, each with its log-probability in nats.

    `uniforms` [max_new_tokens] are random numbers in [0, 1), `stop_ids` the stop tokens.
    """
    model.config.check_positions(len(prompt), len(uniforms))
    cache = KVCache(model.config, 1, len(prompt) + len(uniforms), model.device, model.dtype)
    ids = prompt
    for uniform in uniforms.to(model.device):
        logits = model(torch.tensor([ids], device=model.device), cache=cache)[:, -1]
        token, logprob = sample_tokens(logits, uniform[None], model.num_tokens, choice)
        check_finite(logprob)
        ids = [token.item()]
        yield ids[0], logprob.item()
        if ids[0] in stop_ids:
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

    Each has its own random numbers (see `random_uniforms`), so a completion does not depend on its batch, up
    to the rounding of matrix products of other sizes. Returns `[prompt][sample]`.

    Args:
        temperature, top_k, top_p: see `TokenChoice`.
        max_cache_tokens: tokens of keys and values in memory at once; None: what fits. Other prompts wait.
        only: the prompts to sample for; their completions equal those of a call for all.
        on_progress: called now and then with (completions done, tokens sampled so far).
        cancel: when a signal or another thread sets it, sampling ends with `Cancelled`.

    Raises ValueError for an argument out of its range, ModelError if there is no room for one completion, if
    the model has too few positions for it, or if logits are not finite.
    """
    choice = TokenChoice(temperature, top_k, top_p)
    if min(num_samples, max_new_tokens) < 1:
        raise ValueError(f"num_samples {num_samples} and max_new_tokens {max_new_tokens} must be at least 1")
    check_prompts(prompts, model.config.vocab_size)
    model.config.check_positions(max(map(len, prompts), default=0), max_new_tokens)
    uniforms = random_uniforms(prompts, num_samples, max_new_tokens, seed)[only]
    prompts = prompts[only]
    stop_ids = torch.tensor(list(stop_token_ids), dtype=torch.int64, device=model.device)
    room = max_cache_tokens or cache_tokens_that_fit(model, max_new_tokens)
    groups: list[list[Completion]] = [[] for _ in prompts]
    done = tokens = 0  # in the batches before
    lengths = [len(prompt) for prompt in prompts]
    for prompt_slice, sample_slice in plan_batches(lengths, num_samples, max_new_tokens, room):
        its_uniforms = uniforms[prompt_slice, sample_slice]
        batch = DecodeBatch(model, prompts[prompt_slice], its_uniforms, stop_ids, choice)
        for batch_done, batch_tokens in batch.run():
            if cancel and cancel.is_set():
                raise Cancelled
            if on_progress:
                on_progress(done + batch_done, tokens + batch_tokens)
        done += batch_done
        tokens += batch_tokens
        for completions, more in zip(groups[prompt_slice], batch.completions(), strict=True):
            completions += more
        del batch  # free its keys and values before the next batch takes its own
    return groups


def check_prompts(prompts: list[list[int]], vocab: int) -> None:
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


def plan_batches(
    lengths: list[int], num_samples: int, max_new_tokens: int, room: int
) -> list[tuple[slice, slice]]:
    """Divide groups, whole and in order, into batches (prompts, samples) of at most `room` cached tokens.

    `lengths` are those of the prompts. A group that is too large comes alone, in parts.
    """

    def fitting_samples(start: int, end: int) -> int:
        """How many samples fit for each prompt, padded to the longest."""
        return (room // (end - start) - max(lengths[start:end])) // max_new_tokens

    batches = []
    start = 0
    while start < len(lengths):
        end = start + 1
        while end < len(lengths) and fitting_samples(start, end + 1) >= num_samples:
            end += 1
        part = fitting_samples(start, end)
        if part < 1:
            prompt = lengths[start]
            need = f"a prompt of {prompt} and {max_new_tokens} new ones need {prompt + max_new_tokens}"
            advice = "lower max_new_tokens, raise max_cache_tokens if memory allows, or take a smaller model"
            raise ModelError(f"room for {room} tokens of keys and values; {need}: {advice}")
        for first in range(0, num_samples, part):
            batches.append((slice(start, end), slice(first, first + part)))
        start = end
    return batches


class DecodeBatch:
    """`num_samples` completions for each prompt, decoded in lock-step: one token per row and forward.

    Args:
        uniforms: random numbers in [0, 1), [prompts, num_samples, max_new_tokens].

    Attributes:
        token_ids, logprobs: what was sampled, [rows, max_new_tokens].
        active: the rows that are being decoded, ascending. Those that have finished go on, their output
            ignored, until there are enough of them to drop.
    """

    def __init__(
        self, model: Qwen3, prompts: list[list[int]], uniforms: Tensor, stop_ids: Tensor, choice: TokenChoice
    ):
        self.model = model
        self.prompts = prompts
        self.stop_ids = stop_ids
        self.choice = choice
        self.num_samples, self.max_new_tokens = uniforms.shape[1:]
        self.uniforms = uniforms.flatten(0, 1).to(model.device)
        self.token_ids = torch.zeros(self.uniforms.shape, dtype=torch.int64, device=model.device)
        self.logprobs = self.uniforms.new_zeros(
            self.uniforms.shape, dtype=torch.promote_types(model.dtype, torch.float32)
        )
        self.active = torch.arange(len(self.uniforms), device=model.device)

    def run(self) -> Iterator[tuple[int, int]]:
        """Decode to the end; yields (completions done, tokens sampled) now and then."""
        device = self.model.device.type
        graphed = device == "cuda" and self.model.graphed
        step = GraphedStep(self.step) if graphed else lambda shape: self.step()
        self.start()
        for count in range(1, self.max_new_tokens + 1):  # tokens of each row that are sampled
            is_last = count == self.max_new_tokens
            if is_last or count % CHECK_EVERY[device] == 0:
                check_finite(self.logprobs[:, :count])
                finished, lengths = self.endings(count)
                done = len(finished) if is_last else int(finished.sum())
                yield done, int(lengths.sum())
                if done == len(finished):
                    return
                self.drop(finished, COMPACT_BELOW[device])
            self.cache.reserve(count)
            step((len(self.active), self.cache.visible))

    def start(self) -> None:
        """Run the prompts, and sample the first token of each row."""
        logits, prompt_cache, lengths = prefill(self.model, self.prompts)
        self.cache = GroupCache(prompt_cache, lengths, self.num_samples, self.max_new_tokens)
        self.record(logits.repeat_interleave(self.num_samples, dim=0))

    def step(self) -> None:
        """Decode one token for each row. Nothing here waits for the device or depends on what was sampled."""
        last = self.token_ids[self.active, self.cache.stored_on_device]
        hidden = self.model.model(last[:, None], self.cache)[:, -1]
        self.record(self.model.next_logits(hidden))  # the forward has counted one more token as stored

    def record(self, logits: Tensor) -> None:
        """Sample the token after the stored ones, from logits [active rows, vocab]."""
        column = self.cache.stored_on_device
        uniforms = self.uniforms[self.active, column]
        token_ids, logprobs = sample_tokens(logits, uniforms, self.model.num_tokens, self.choice)
        self.token_ids[self.active, column] = token_ids
        self.logprobs[self.active, column] = logprobs

    def endings(self, count: int) -> tuple[Tensor, Tensor]:
        """Of each row's first `count` tokens: is a stop token among them, and the length up to it; [rows]."""
        stops = torch.isin(self.token_ids[:, :count], self.stop_ids)  # [rows, count]
        finished = stops.any(dim=1)
        lengths = torch.where(finished, stops.int().argmax(dim=1) + 1, count)
        return finished, lengths

    def drop(self, finished: Tensor, below: float) -> None:
        """Go on without `finished` rows ([rows]) if at most the share `below` of the active ones is left."""
        left = (~finished[self.active]).nonzero()[:, 0]
        if len(left) <= below * len(self.active):
            self.active = self.active[left]
            self.cache.select(left)

    def completions(self) -> list[list[Completion]]:
        """The completions, [prompt][sample]."""
        finished, lengths = self.endings(self.max_new_tokens)
        found = []
        for ids, logprobs, length, is_finished in zip(
            self.token_ids.tolist(), self.logprobs.tolist(), lengths.tolist(), finished.tolist(), strict=True
        ):
            found.append(Completion(ids[:length], logprobs[:length], is_finished))
        return [found[row : row + self.num_samples] for row in range(0, len(found), self.num_samples)]


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


def prefill(model: Qwen3, prompts: list[list[int]]) -> tuple[Tensor, KVCache, Tensor]:
    """Run each prompt through the model once, padded on the right to the longest.

    Returns logits of the next tokens, [prompts, vocab]; the cache; and the prompts' lengths, [prompts].
    """
    aligned = ALIGNED[model.device.type]
    longest = math.ceil(max(map(len, prompts)) / aligned) * aligned
    padded = torch.tensor([prompt + [0] * (longest - len(prompt)) for prompt in prompts], device=model.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    cache = KVCache(model.config, len(prompts), longest, model.device, model.dtype)
    last = []
    at_once = max(1, PREFILL_TOKENS // longest)
    for start in range(0, len(prompts), at_once):
        rows = slice(start, start + at_once)
        hidden = model.model(padded[rows], cache.part(rows))  # [at_once, longest, hidden]
        position = lengths[rows, None, None] - 1
        last.append(hidden.take_along_dim(position, dim=1)[:, 0])
    return model.next_logits(torch.cat(last)), cache, lengths

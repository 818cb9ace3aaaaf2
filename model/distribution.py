"""From logits to a token and its log-probability.

One function, `token_logprobs`, turns logits into log-probabilities for the sampler and for the trainer, so that the
ratio between the two is one until the weights move.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

LOGITS_AT_ONCE = 2**19


def token_logprobs(logits: Tensor, temperature: float, num_tokens: int) -> Tensor:
    """Log-probabilities [..., num_tokens] in float32 (or above) from logits [..., vocab], in nats.

    Logits past the tokenizer's last entry are cut off: those ids have no text and are never sampled. Temperature 0
    stands for greedy decoding, whose log-probabilities are reported at temperature 1.
    """
    logits = logits[..., :num_tokens]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits if temperature in (0, 1) else logits / temperature, dim=-1)


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
    parts = []
    at_once = rows_at_once(logits)
    for rows, thresholds in zip(logits.split(at_once), uniforms.split(at_once), strict=True):
        logprobs = token_logprobs(rows, temperature, num_tokens)
        if temperature == 0:
            sampled = logprobs.argmax(-1, keepdim=True)
        else:
            cumulative = truncate(logprobs, top_k, top_p).exp().cumsum(-1)
            # u is at most 1 - 2^-24, which keeps u * total below total in float32: the search always ends on a token.
            sampled = torch.searchsorted(cumulative, thresholds[:, None] * cumulative[:, -1:], right=True)
            sampled.clamp_(max=logprobs.shape[-1] - 1)  # of a row of NaN it gives the length; the NaN shows in the logprob
        parts.append((sampled[:, 0], logprobs.gather(-1, sampled)[:, 0]))
    token_ids, logprobs = zip(*parts, strict=True)
    return torch.cat(token_ids), torch.cat(logprobs)


def rows_at_once(logits: Tensor) -> int:
    """How many rows of [rows, vocab] to turn into probabilities at a time.

    On a CPU a few: temporaries of many rows would be fresh memory each time, and its page faults cost four times the
    arithmetic.
    """
    return max(1, LOGITS_AT_ONCE // logits.shape[-1]) if logits.device.type == "cpu" else max(1, len(logits))


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


def random_streams(
    prompts: list[list[int]], num_samples: int, max_new_tokens: int, seed: int, only: slice = slice(None)
) -> Tensor:
    """Uniform numbers in [0, 1), [prompts[only], num_samples, max_new_tokens]; each sample from a generator of its own.

    Its key is (seed, prompt, how often the prompt came before among all prompts, number of the sample).
    """
    chosen = set(range(len(prompts))[only])
    seen: dict[tuple[int, ...], int] = {}
    rows: list[np.ndarray] = []
    for place, prompt in enumerate(prompts):
        key = tuple(prompt)
        seen[key] = seen.get(key, -1) + 1
        if place not in chosen:
            continue
        text = f"{seed} {seen[key]} {' '.join(map(str, prompt))}"
        for number in range(num_samples):
            digest = hashlib.blake2b(f"{number} {text}".encode(), digest_size=16).digest()
            generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
            rows.append(generator.random(max_new_tokens, dtype=np.float32))
    return torch.from_numpy(np.stack(rows)).view(len(chosen), num_samples, max_new_tokens)

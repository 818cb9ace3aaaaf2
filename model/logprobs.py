"""Log-probabilities of given tokens, and the entropy beside them, without all logits at once.

The float32 logits of 8,192 tokens are 5 GB for Qwen3. Here a few hundred tokens at a time go through the
output head; backward computes their logits again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.cache import product
from model.sampler import rows_at_once, token_logprobs

CHUNK_LOGITS = {"cpu": 2**25, "cuda": 2**26}


class TokenLogprobs(NamedTuple):
    """Of each token, in nats: its target's log-probability, and the entropy of the distribution; [tokens]."""

    logprobs: Tensor
    entropy: Tensor


def target_logprobs(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float, num_tokens: int
) -> TokenLogprobs:
    """`token_logprobs(hidden @ weight.T)` at `target_ids` [tokens], and its entropy; differentiable.

    `hidden` is [tokens, hidden], `weight` the output head, [vocab, hidden].
    """
    return TokenLogprobs(*TargetLogprobs.apply(hidden, weight, target_ids, temperature, num_tokens))


def chunk_tokens(weight: Tensor) -> int:
    """Tokens whose logits are in memory at a time."""
    return max(1, CHUNK_LOGITS["cuda" if weight.device.type == "cuda" else "cpu"] // len(weight))


def logit_chunks(hidden: Tensor, weight: Tensor, *columns: Tensor) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Yield logits [up to chunk_tokens, vocab] and those tokens' part of each column.

    On a GPU they are the sampler's float32 logits (see `product`); on a CPU they are all in one buffer.
    """
    size = chunk_tokens(weight)
    buffer = None if hidden.is_cuda else hidden.new_empty(min(size, len(hidden)), len(weight))
    for chunk, *parts in zip(*(x.split(size) for x in (hidden, *columns)), strict=True):
        if buffer is None:
            yield product(chunk, weight.T), parts
        else:
            yield torch.mm(chunk, weight.T, out=buffer[: len(chunk)]), parts


class TargetLogprobs(torch.autograd.Function):
    """With z the logits, p = softmax(z / T) and H its entropy, the gradients are

    d logp[target] / dz_j = (1[j = target] - p_j) / T and dH / dz_j = -p_j (log p_j + H) / T.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target_ids, temperature, num_tokens):
        # Results go into tensors made beforehand; small ones between large temporaries fragment the heap.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = hidden.new_empty(len(hidden), dtype=dtype)
        entropy = torch.empty_like(logprobs)
        for logits, parts in logit_chunks(hidden, weight, target_ids, logprobs, entropy):
            size = rows_at_once(logits)
            for rows, targets, chosen, spread in zip(*(x.split(size) for x in (logits, *parts)), strict=True):
                distribution = token_logprobs(rows, temperature, num_tokens)
                chosen.copy_(distribution.gather(-1, targets[:, None])[:, 0])
                spread.copy_(-torch.linalg.vecdot(distribution.exp(), distribution))
        ctx.save_for_backward(hidden, weight, target_ids, entropy)
        ctx.temperature = temperature
        ctx.num_tokens = num_tokens
        return logprobs, entropy

    @staticmethod
    def backward(ctx, on_logprobs, on_entropy):
        hidden, weight, target_ids, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        columns = (hidden, grad_hidden, target_ids, entropy, on_logprobs, on_entropy)
        for logits, (chunk, grad_chunk, *parts) in logit_chunks(hidden, weight, *columns):
            size = rows_at_once(logits)
            for rows, targets, h, up, up_h in zip(*(x.split(size) for x in (logits, *parts)), strict=True):
                distribution = token_logprobs(rows, ctx.temperature, ctx.num_tokens)
                gradient = distribution.exp()  # becomes that of logits / T
                gradient *= (distribution + h[:, None]).mul_(-up_h[:, None]).sub_(up[:, None])
                gradient.scatter_add_(-1, targets[:, None], up[:, None])
                rows[:, : ctx.num_tokens] = gradient / (ctx.temperature or 1)
                rows[:, ctx.num_tokens :] = 0
            logits = logits.to(weight.dtype)
            torch.mm(logits, weight, out=grad_chunk)
            if grad_weight is not None:
                grad_weight.addmm_(logits.T, chunk)
        return grad_hidden, grad_weight, None, None, None

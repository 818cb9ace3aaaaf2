"""Log-probabilities of given tokens, and the entropy beside them, without all logits at once.

The float32 logits of 8,192 tokens are 5 GB for Qwen3. Here a few hundred tokens at a time go through the
output head; backward computes their logits again.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from model.qwen3 import unrounded_matmul
from model.sampler import rows_at_once, token_logprobs

CHUNK_LOGITS = {"cpu": 2**25, "cuda": 2**26}


class TokenLogprobs(NamedTuple):
    """Log-probability of each token, and entropy of its distribution, in nats; of one shape."""

    logprobs: Tensor
    entropy: Tensor


def target_logprobs(
    hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float, num_tokens: int
) -> TokenLogprobs:
    """`token_logprobs(hidden @ weight.T)` at `target_ids` [tokens], and its entropy; differentiable.

    `hidden` is [tokens, hidden], `weight` the output head, [vocab, hidden].
    """
    logprobs, entropy = TargetLogprobs.apply(hidden, weight, target_ids, temperature, num_tokens)
    return TokenLogprobs(logprobs, entropy)


def chunk_tokens(weight: Tensor) -> int:
    """Tokens whose logits are in memory at a time."""
    return max(1, CHUNK_LOGITS[weight.device.type] // len(weight))


def logit_chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield a slice of the tokens and its logits [up to chunk_tokens, vocab], until all are done.

    On a GPU they are the sampler's logits, see `unrounded_matmul`; on a CPU each chunk overwrites the last.
    """
    size = chunk_tokens(weight)
    buffer = None if hidden.is_cuda else hidden.new_empty(min(size, len(hidden)), len(weight))
    start = 0
    for chunk in hidden.split(size):
        if buffer is None:
            logits = unrounded_matmul(chunk, weight.T)
        else:
            logits = torch.mm(chunk, weight.T, out=buffer[: len(chunk)])
        yield slice(start, start + len(chunk)), logits
        start += len(chunk)


def softmax_parts(tokens: slice, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Divide tokens and their logits [tokens, vocab] into parts for one softmax each."""
    start = tokens.start
    for part in logits.split(rows_at_once(logits)):
        yield slice(start, start + len(part)), part
        start += len(part)


class TargetLogprobs(torch.autograd.Function):
    """With z the logits, t the target, p = softmax(z / T) and H = -sum(p log p), the gradients are

    d log p_t / dz_j = (1[j = t] - p_j) / T and dH / dz_j = -p_j (log p_j + H) / T.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target_ids, temperature, num_tokens):
        # Results go into tensors made beforehand; small ones between large temporaries fragment the heap.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        target_logprobs = hidden.new_empty(len(hidden), dtype=dtype)
        entropy = torch.empty_like(target_logprobs)
        for chunk, chunk_logits in logit_chunks(hidden, weight):
            for tokens, logits in softmax_parts(chunk, chunk_logits):
                logprobs = token_logprobs(logits, temperature, num_tokens)  # [tokens, num_tokens]
                target_logprobs[tokens] = logprobs.gather(-1, target_ids[tokens, None])[:, 0]
                entropy[tokens] = -torch.linalg.vecdot(logprobs.exp(), logprobs)
        ctx.save_for_backward(hidden, weight, target_ids, entropy)
        ctx.temperature = 1.0 if temperature == 0 else temperature  # as in `token_logprobs`
        ctx.num_tokens = num_tokens
        return target_logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        """From the loss's gradients g at log p_t and e at H, both [tokens], to those at hidden and weight."""
        hidden, weight, target_ids, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for chunk, chunk_logits in logit_chunks(hidden, weight):
            # 1. At the logits. These gradients take their place in memory.
            for tokens, logits in softmax_parts(chunk, chunk_logits):
                logprobs = token_logprobs(logits, ctx.temperature, ctx.num_tokens)
                target = target_ids[tokens, None]
                g = grad_logprobs[tokens, None]
                e = grad_entropy[tokens, None]
                # p_j (-e (log p_j + H) - g), and where j = t, g more
                grad_scaled = (logprobs + entropy[tokens, None]).mul_(-e).sub_(g).mul_(logprobs.exp())
                grad_scaled.scatter_add_(-1, target, g)
                logits[:, : ctx.num_tokens] = grad_scaled / ctx.temperature
                logits[:, ctx.num_tokens :] = 0
            grad_logits = chunk_logits.to(weight.dtype)

            # 2. Through the output head.
            torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, hidden[chunk])
        return grad_hidden, grad_weight, None, None, None

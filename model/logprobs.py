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
    """Of each token, in nats: its log-probability, and the entropy where it was chosen; [tokens]."""

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
    return max(1, CHUNK_LOGITS["cuda" if weight.device.type == "cuda" else "cpu"] // len(weight))


def logit_chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield some tokens and their logits [up to chunk_tokens, vocab], until all have had their turn.

    On a GPU they are the sampler's logits, see `unrounded_matmul`; on a CPU they are all in one buffer.
    """
    size = chunk_tokens(weight)
    buffer = hidden.new_empty(0 if hidden.is_cuda else min(size, len(hidden)), len(weight))
    for start in range(0, len(hidden), size):
        chunk = hidden[start : start + size]
        if hidden.is_cuda:
            logits = unrounded_matmul(chunk, weight.T)
        else:
            logits = torch.mm(chunk, weight.T, out=buffer[: len(chunk)])
        yield slice(start, start + len(chunk)), logits


def softmax_parts(tokens: slice, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Divide tokens and their logits [tokens, vocab] into parts for one softmax each."""
    size = rows_at_once(logits)
    for first in range(0, len(logits), size):
        part = logits[first : first + size]
        start = tokens.start + first
        yield slice(start, start + len(part)), part


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
        """Gradients of the loss at `hidden` and `weight`, from those at the results, [tokens]."""
        hidden, weight, target_ids, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for chunk, chunk_logits in logit_chunks(hidden, weight):
            # 1. The gradient at the logits, which takes their place in memory.
            for tokens, logits in softmax_parts(chunk, chunk_logits):
                logprobs = token_logprobs(logits, ctx.temperature, ctx.num_tokens)
                grad_scaled = grad_scaled_logits(
                    logprobs,
                    target_ids[tokens, None],
                    entropy[tokens, None],
                    grad_logprobs[tokens, None],
                    grad_entropy[tokens, None],
                )
                logits[:, : ctx.num_tokens] = grad_scaled / ctx.temperature
                logits[:, ctx.num_tokens :] = 0
            grad_logits = chunk_logits.to(weight.dtype)

            # 2. From there back through the output head.
            torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, hidden[chunk])
        return grad_hidden, grad_weight, None, None, None


def grad_scaled_logits(
    logprobs: Tensor, target_ids: Tensor, entropy: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor
) -> Tensor:
    """The loss's gradient at z / T, [tokens, num_tokens], by the formula above; all others are [tokens, 1].

    It is g (1[j = t] - p_j) - e p_j (log p_j + H) for gradients g at log p_t and e at H.
    """
    gradient = (logprobs + entropy).mul_(-grad_entropy).sub_(grad_logprobs)
    gradient *= logprobs.exp()
    return gradient.scatter_add_(-1, target_ids, grad_logprobs)

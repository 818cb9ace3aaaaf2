"""Log-probabilities of given tokens and the entropy beside them, from hidden states, without all logits at once.

With a vocabulary of 151,936, the logits of 8,192 tokens are 5 GB in float32, and training by the book holds three
copies. Here a few hundred tokens at a time go through the output head; backward computes their logits again.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from model.sampler import rows_at_once, token_logprobs

CHUNK_LOGITS = {"cpu": 2**25, "cuda": 2**26}


class TokenLogprobs(NamedTuple):
    """Of each token: the log-probability of its target, and the entropy of the distribution there, in nats; [tokens]."""

    logprobs: Tensor
    entropy: Tensor


def target_logprobs(hidden: Tensor, weight: Tensor, target_ids: Tensor, temperature: float, num_tokens: int) -> TokenLogprobs:
    """`token_logprobs(hidden @ weight.T)` at the targets, with its entropy; both differentiable.

    Args:
        hidden: [tokens, hidden], what the output head reads.
        weight: [vocab, hidden], the output head.
        target_ids: [tokens], below `num_tokens`.

    Returns:
        float32 (float64 for a float64 model).
    """
    return TokenLogprobs(*TargetLogprobs.apply(hidden, weight, target_ids, temperature, num_tokens))


def chunk_tokens(weight: Tensor) -> int:
    """How many tokens have their logits in memory at a time."""
    return max(1, CHUNK_LOGITS["cuda" if weight.device.type == "cuda" else "cpu"] // len(weight))


class TargetLogprobs(torch.autograd.Function):
    """With z the logits, p = softmax(z / T) and H its entropy, the gradients are

    d logp[target] / dz_j = (1[j = target] - p_j) / T        and        dH / dz_j = -p_j (log p_j + H) / T.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target_ids, temperature, num_tokens):
        # Results go into tensors made beforehand: small ones made between large temporaries would keep the C library
        # from giving out the temporaries' memory again.
        size, dtype = chunk_tokens(weight), torch.promote_types(hidden.dtype, torch.float32)
        logprobs, entropy = (hidden.new_empty(len(hidden), dtype=dtype) for _ in range(2))
        buffer = logits_buffer(hidden, weight, size)
        columns = (x.split(size) for x in (hidden, target_ids, logprobs, entropy))
        for chunk, *of_chunk in zip(*columns, strict=True):
            logits = torch.mm(chunk, weight.T, out=buffer[: len(chunk)])  # [at most size, vocab]
            at_once = rows_at_once(logits)
            for rows, targets, chosen, spread in zip(*(x.split(at_once) for x in (logits, *of_chunk)), strict=True):
                distribution = token_logprobs(rows, temperature, num_tokens)
                chosen.copy_(distribution.gather(-1, targets[:, None])[:, 0])
                spread.copy_(-torch.linalg.vecdot(distribution.exp(), distribution))
        ctx.save_for_backward(hidden, weight, target_ids, entropy)
        ctx.temperature, ctx.num_tokens = temperature, num_tokens
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, target_ids, entropy = ctx.saved_tensors
        size = chunk_tokens(weight)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        buffer = logits_buffer(hidden, weight, size)
        columns = (x.split(size) for x in (hidden, grad_hidden, target_ids, entropy, grad_logprobs, grad_entropy))
        for chunk, grad_chunk, *of_chunk in zip(*columns, strict=True):
            logits = torch.mm(chunk, weight.T, out=buffer[: len(chunk)])
            at_once = rows_at_once(logits)
            for rows, *of_rows in zip(*(x.split(at_once) for x in (logits, *of_chunk)), strict=True):
                distribution = token_logprobs(rows, ctx.temperature, ctx.num_tokens)
                rows[:, : ctx.num_tokens] = grad_logits(distribution, *of_rows) / (ctx.temperature or 1)
                rows[:, ctx.num_tokens :] = 0
            torch.mm(logits, weight, out=grad_chunk)
            if grad_weight is not None:
                grad_weight.addmm_(logits.T, chunk)
        return grad_hidden, grad_weight, None, None, None


def logits_buffer(hidden: Tensor, weight: Tensor, size: int) -> Tensor:
    return hidden.new_empty(min(size, len(hidden)), len(weight))


def grad_logits(distribution: Tensor, targets: Tensor, entropy: Tensor, on_logprob: Tensor, on_entropy: Tensor) -> Tensor:
    """The gradient of the logits over temperature, [rows, num_tokens], from those of the two results, [rows]."""
    gradient = distribution.exp()
    gradient *= (distribution + entropy[:, None]).mul_(-on_entropy[:, None]).sub_(on_logprob[:, None])
    return gradient.scatter_add_(-1, targets[:, None], on_logprob[:, None])

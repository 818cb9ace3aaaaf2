"""The two losses, as pure functions of tensors: [rows, time] as in `rl.batch.Batch`, advantages [rows]."""

import torch
from torch import Tensor

AGGREGATIONS = ("token", "sequence", "constant")


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.25,
    clip_high: float = 0.25,
    *,
    aggregation: str = "token",
    denominator: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """The clipped surrogate of GRPO, to minimise (Le 2025, section 2.2; arXiv:2402.03300, equation 3).

    Per token, with ratio = exp(logprobs - old_logprobs):

        -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) + kl_coef * k3

    For A < 0 a token that became likelier is pushed down without limit; one that became rarer by more than
    `clip_low` has no gradient. While every ratio is one, a token's loss is -A, without the KL term.

    Args:
        logprobs: of the policy in training; the only argument with a gradient.
        old_logprobs: of the policy that sampled.
        advantages: [rows], or [rows, time].
        mask: True where there is a completion token.
        aggregation, denominator: how the tokens become one number, see `aggregate`.
        ref_logprobs, kl_coef: a frozen reference, and the weight of the KL penalty towards it; k3 is an
            unbiased estimate of the divergence, never negative (http://joschu.net/blog/kl-approx.html).
    """
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    ratio = (logprobs - old_logprobs).exp()
    gain = ratio * advantages
    clipped_gain = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    per_token = -torch.minimum(gain, clipped_gain)
    if kl_coef:
        if ref_logprobs is None:
            raise ValueError("kl_coef needs ref_logprobs, the reference's log-probabilities")
        gap = ref_logprobs - logprobs
        per_token = per_token + kl_coef * (gap.exp() - gap - 1)
    return aggregate(per_token, mask, aggregation, denominator)


def sft_loss(logprobs: Tensor, mask: Tensor, denominator: float | None = None) -> Tensor:
    """Mean negative log-likelihood of the completion tokens, in nats."""
    return aggregate(-logprobs, mask, "token", denominator)


def aggregate(per_token: Tensor, mask: Tensor, aggregation="token", denominator=None) -> Tensor:
    """One number from [rows, time]; masked positions do not count, whatever they hold.

    - "token": sum over all tokens / number of tokens (DAPO, arXiv:2503.14476). All tokens weigh the same.
    - "sequence": mean over rows of each row's mean (the original GRPO). Tokens of long rows weigh less.
    - "constant": sum / (rows * longest possible completion) (Dr. GRPO, arXiv:2503.20783).

    `denominator` is that of the whole update where `mask` is a micro-batch of it (see `loss_denominator`):
    the losses, and so the gradients, of micro-batches then add up to the update's.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation must be one of {', '.join(AGGREGATIONS)}, not {aggregation!r}")
    if denominator is None:
        denominator = loss_denominator(mask.sum(1).tolist(), mask.shape[1], aggregation)
    per_token = per_token.masked_fill(~mask, 0.0)
    if aggregation == "sequence":
        per_token = per_token / mask.sum(1, keepdim=True).clamp(min=1)
    return per_token.sum() / denominator


def loss_denominator(lengths: list[int], max_length: int, aggregation: str) -> float:
    """The divisor of `aggregate` for completions of these lengths; never zero."""
    if aggregation == "token":
        denominator = sum(lengths)
    elif aggregation == "sequence":
        denominator = len(lengths)
    else:
        denominator = len(lengths) * max_length
    return float(max(1, denominator))


def clip_counts(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> tuple[int, int]:
    """Tokens that the clip leaves without gradient: (A < 0, ratio < 1 - low), (A > 0, ratio > 1 + high)."""
    ratio = (logprobs - old_logprobs).exp()
    below = (advantages[:, None] < 0) & (ratio < 1 - low) & mask
    above = (advantages[:, None] > 0) & (ratio > 1 + high) & mask
    return int(below.sum()), int(above.sum())

"""The two losses, as pure functions of tensors. Every tensor is [rows, time] as in `rl.batch.Batch`."""

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
    importance: Tensor | None = None,
) -> Tensor:
    """The clipped surrogate of GRPO (the paper's equation in section 2.2; arXiv:2402.03300, equation 3), to minimise.

    Per token, with ratio = exp(logprobs - old_logprobs):

        -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) + kl_coef * k3

    The minimum holds for A < 0 too: a bad token that became likelier is pushed down without limit, one that already
    became rarer by more than `clip_low` is left alone.

    Args:
        logprobs: of the policy being trained; the only argument that carries gradient.
        old_logprobs: of the policy that sampled.
        advantages: [rows], or [rows, time].
        mask: True where there is a completion token.
        aggregation, denominator: how tokens become one number, see `aggregate`.
        ref_logprobs, kl_coef: a frozen reference and the weight of the KL penalty towards it; k3 is an
            unbiased estimate of it that is never negative (http://joschu.net/blog/kl-approx.html). Its gradient, on
            policy, is that of KL(reference || policy).
        importance: a constant factor for each token's surrogate, see `truncated_importance`.

    Returns:
        A scalar. On the first update after sampling its value is near zero, since advantages sum to zero in a group and
        every ratio is one: watch the gradient norm and the reward, not this number.
    """
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = -torch.minimum(ratio * advantages, clipped * advantages)
    if importance is not None:
        per_token = importance * per_token
    if kl_coef:
        if ref_logprobs is None:
            raise ValueError("kl_coef needs ref_logprobs, the reference's log-probabilities")
        gap = ref_logprobs - logprobs
        per_token = per_token + kl_coef * (gap.exp() - gap - 1)
    return aggregate(per_token, mask, aggregation, denominator)


def truncated_importance(trainer_logprobs: Tensor, sampler_logprobs: Tensor, cap: float) -> Tensor:
    """min(trainer's probability / sampler's, cap) of each token, [rows, time].

    Tokens come from the sampler's distribution, the gradient wants them from the trainer's. Where the two differ, as
    with int8 weights whose activations only the sampler rounds, these weights correct for it; the cap bounds their
    variance (truncated importance sampling; Ionides 2008).
    """
    return (trainer_logprobs - sampler_logprobs).exp().clamp(max=cap)


def sft_loss(logprobs: Tensor, mask: Tensor, denominator: float | None = None) -> Tensor:
    """Mean negative log-likelihood of the completion tokens, in nats."""
    return aggregate(-logprobs, mask, "token", denominator)


def aggregate(per_token: Tensor, mask: Tensor, aggregation: str = "token", denominator: float | None = None) -> Tensor:
    """One number from [rows, time]; masked positions count for nothing, whatever they hold.

    - "token": sum over all tokens / number of tokens (DAPO, arXiv:2503.14476). Every token weighs the same.
    - "sequence": mean over rows of each row's mean (the original GRPO). Tokens of long completions weigh less.
    - "constant": sum / (rows * longest possible completion) (Dr. GRPO, arXiv:2503.20783).

    `denominator` is the divisor of the whole batch when `mask` holds only a micro-batch of it (see `loss_denominator`):
    losses, and so gradients, of micro-batches then add up to the whole batch's, however it was divided.
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
    """The divisor of `aggregate` for a batch with completions of these lengths; never zero."""
    if aggregation == "token":
        return float(max(1, sum(lengths)))
    return float(max(1, len(lengths) * (max_length if aggregation == "constant" else 1)))


def clip_counts(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float):
    """How many tokens the clip silenced, as ints (below, above).

    A token is silenced on the low side when A < 0 and ratio < 1 - low, on the high side when A > 0 and
    ratio > 1 + high: there the clipped term is the minimum, and it has no gradient.
    """
    ratio = (logprobs - old_logprobs).exp()
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    below = (advantages < 0) & (ratio < 1 - low) & mask
    above = (advantages > 0) & (ratio > 1 + high) & mask
    return int(below.sum()), int(above.sum())

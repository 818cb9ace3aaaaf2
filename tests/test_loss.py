"""The losses against a reference in plain Python floats, and the truth table of the clip by hand."""

import math

import numpy as np
import pytest
import torch

from rl import grpo_loss, sft_loss
from rl.loss import AGGREGATIONS, aggregate, clip_counts, loss_denominator

LENGTHS = [5, 1, 0, 3]  # one row is masked throughout
TIME = 5
MASK = torch.arange(TIME) < torch.tensor(LENGTHS)[:, None]
LOW, HIGH = 0.2, 0.45
EACH_AGGREGATION = pytest.mark.parametrize("aggregation", AGGREGATIONS)


def random_batch():
    """Log-probabilities of policy, sampler and reference, and advantages; masked positions hold garbage."""
    rng = np.random.default_rng(29)
    old = rng.normal(-2, 0.5, MASK.shape)
    logprobs = old + rng.normal(0, 0.5, MASK.shape)
    reference = old + rng.normal(0, 0.5, MASK.shape)
    advantages = rng.normal(0, 1, MASK.shape)
    return map(torch.tensor, (logprobs, old, reference, advantages))


def reference_loss(logprobs, old, reference, advantages, aggregation, denominator, kl_coef):
    """Value and gradient of the loss, token by token in Python floats, the derivative worked out by hand.

    d(-ratio * A) = -ratio * A where the unclipped term is the minimum, else nothing; d k3 = 1 - exp(gap).
    """
    rows = len(LENGTHS)
    divisor = denominator or {"token": sum(LENGTHS), "sequence": rows, "constant": rows * TIME}[aggregation]
    value = 0.0
    gradient = torch.zeros_like(logprobs)
    for row, length in enumerate(LENGTHS):
        weight = 1 / divisor / (max(length, 1) if aggregation == "sequence" else 1)
        for t in range(length):
            advantage = advantages[row, t].item()
            ratio = math.exp(logprobs[row, t] - old[row, t])
            gain = ratio * advantage
            clipped = min(max(ratio, 1 - LOW), 1 + HIGH) * advantage
            slope = -gain if gain <= clipped else 0.0
            gap = (reference[row, t] - logprobs[row, t]).item()
            k3 = math.exp(gap) - gap - 1
            value += weight * (kl_coef * k3 - min(gain, clipped))
            gradient[row, t] = weight * (kl_coef * (1 - math.exp(gap)) + slope)
    return value, gradient


@pytest.mark.parametrize("denominator", [None, 23.0])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("per_token", [False, True])
@EACH_AGGREGATION
def test_grpo_loss_and_gradient_equal_a_plain_reference(aggregation, per_token, kl_coef, denominator):
    logprobs, old, reference, advantages = random_batch()
    if not per_token:
        advantages = advantages[:, :1].expand(-1, TIME)
    options = {"aggregation": aggregation, "denominator": denominator, "kl_coef": kl_coef}
    value, gradient = reference_loss(logprobs, old, reference, advantages, **options)
    logprobs.requires_grad_()
    given = advantages if per_token else advantages[:, 0]
    loss = grpo_loss(logprobs, old, given, MASK, LOW, HIGH, ref_logprobs=reference, **options)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(logprobs.grad, gradient, rtol=1e-12, atol=1e-15)
    assert per_token or all(clip_counts(logprobs, old, given, MASK, LOW, HIGH))  # both sides are reached


TRUTH = [  # advantage, ratio, loss, gradient: worked by hand for a clip of 0.25 on either side
    (+1.0, 0.5, -0.50, -0.5),  # a good token that became rarer is pulled back
    (+1.0, 1.0, -1.00, -1.0),
    (+1.0, 1.5, -1.25, 0.0),  # a good token that became likelier by more than the clip has no gradient
    (-1.0, 0.5, +0.75, 0.0),  # nor has a bad token that became rarer by more than the clip
    (-1.0, 1.0, +1.00, +1.0),
    (-1.0, 1.5, +1.50, +1.5),  # a bad token that became likelier is pushed down without limit
]


@pytest.mark.parametrize(("advantage", "ratio", "value", "gradient"), TRUTH)
def test_clip_truth_table(advantage, ratio, value, gradient):
    logprobs = torch.tensor([[math.log(ratio)]], requires_grad=True)
    old = torch.zeros(1, 1)
    mask = old == 0
    loss = grpo_loss(logprobs, old, torch.tensor([advantage]), mask)  # by default, the clip is 0.25
    loss.backward()
    assert loss.item() == pytest.approx(value)
    assert logprobs.grad.item() == pytest.approx(gradient)


def test_clip_counts_keep_sides_apart_and_ignore_masked_tokens():
    ratio = torch.tensor([[0.7, 0.7, 1.3, 1.3, 1.5]] * 3)
    advantages = torch.tensor([-1.0, 1.0, 0.0])  # an advantage of zero has no gradient to clip
    mask = ratio > 0
    mask[0, 1] = mask[1, 4] = False
    for low, high, counts in ((0.25, 0.25, (1, 2)), (0.35, 0.25, (0, 2)), (0.25, 0.35, (1, 0))):
        assert clip_counts(ratio.log(), torch.zeros(3, 5), advantages, mask, low, high) == counts
    assert clip_counts(ratio, ratio, advantages, mask, 0.0, 0.0) == (0, 0)  # at the very edge of the range


@EACH_AGGREGATION
def test_masked_positions_count_for_nothing_even_if_nan(aggregation):
    values = torch.arange(MASK.numel(), dtype=torch.float64).reshape(MASK.shape)
    spoiled = values.masked_fill(~MASK, math.nan).requires_grad_()
    loss = aggregate(spoiled, MASK, aggregation)
    nothing = aggregate(spoiled, MASK & False, aggregation)
    assert loss.item() == aggregate(values, MASK, aggregation).item()
    assert nothing.item() == 0
    (loss + nothing).backward()
    assert torch.equal(spoiled.grad != 0, MASK)


@pytest.mark.parametrize(
    ("aggregation", "loss", "denominator"),
    [("token", 4.0, 4), ("sequence", 6.0, 2), ("constant", 16 / 6, 16)],
)
def test_each_aggregation_by_hand(aggregation, loss, denominator):
    """Rows [1, 2, 3] and [10]: 16 / 4 tokens; (2 + 10) / 2 rows; 16 / (2 rows x 3 positions)."""
    per_token = torch.tensor([[1.0, 2.0, 3.0], [10.0, -7.0, -7.0]])
    mask = per_token > 0
    assert aggregate(per_token, mask, aggregation).item() == pytest.approx(loss)
    assert loss_denominator([3, 1], 8, aggregation) == denominator
    assert loss_denominator([], 8, aggregation) == 1
    assert aggregate(per_token, mask).item() == 4  # over tokens, by default
    assert sft_loss(-per_token, mask).item() == 4
    assert sft_loss(-per_token, mask, denominator=32).item() == 0.5


def test_the_kl_penalty_has_the_expected_gradient_of_reverse_kl():
    """Over a whole vocabulary; that of k1 = -gap would be zero (docs/algorithm.md)."""
    logits, other = torch.randn(2, 1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logprobs = logits.requires_grad_().log_softmax(-1)
    probs = logprobs.detach().exp()
    reference = other.log_softmax(-1)
    options = {"ref_logprobs": reference, "kl_coef": 1.0, "denominator": 1}
    loss = grpo_loss(logprobs, logprobs.detach(), torch.zeros(1), probs > 0, **options)
    (slopes,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    (expected_gradient,) = torch.autograd.grad(logprobs, logits, probs * slopes)
    torch.testing.assert_close(expected_gradient, probs - reference.exp())


@pytest.mark.parametrize(
    ("options", "named"), [({"aggregation": "mean"}, "'mean'"), ({"kl_coef": 0.1}, "ref_logprobs")]
)
def test_bad_options_are_refused_with_the_offending_value(options, named):
    ones = torch.ones(1, 2)
    with pytest.raises(ValueError, match=named):
        grpo_loss(ones, ones, ones, ones.bool(), **options)

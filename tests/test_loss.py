"""The losses against a reference in plain Python floats, and the truth table of the clip by hand."""

import math

import numpy as np
import pytest
import torch

from rl import grpo_loss, sft_loss
from rl.loss import AGGREGATIONS, aggregate, clip_counts, loss_denominator

LENGTHS = [5, 1, 0, 3]  # one row is masked throughout
TIME = 5


def ragged_mask() -> torch.Tensor:
    return torch.arange(TIME)[None] < torch.tensor(LENGTHS)[:, None]


def random_batch(seed: int, per_token: bool):
    """Log-probabilities of policy, sampler and reference, and advantages; masked positions hold garbage."""
    rng = np.random.default_rng(seed)
    shape = (len(LENGTHS), TIME)
    old = torch.tensor(rng.normal(-2, 0.5, shape))
    logprobs = (old + torch.tensor(rng.normal(0, 0.5, shape))).requires_grad_()
    reference = old + torch.tensor(rng.normal(0, 0.5, shape))
    advantages = torch.tensor(rng.normal(0, 1, shape if per_token else shape[:1]))
    return logprobs, old, advantages, reference


def reference_loss(logprobs, old, advantages, reference, low, high, aggregation, denominator, kl_coef):
    """Value and gradient of the loss, token by token in Python floats, the derivative worked out by hand.

    d(-ratio * A) = -ratio * A where the unclipped term is the minimum, else nothing; d k3 = 1 - exp(gap).
    """
    tokens, rows = sum(LENGTHS), len(LENGTHS)
    divisor = denominator or {"token": tokens, "sequence": rows, "constant": rows * TIME}[aggregation]
    value, gradient = 0.0, [[0.0] * TIME for _ in LENGTHS]
    for row, length in enumerate(LENGTHS):
        for t in range(length):
            advantage = advantages[row][t] if isinstance(advantages[row], list) else advantages[row]
            ratio = math.exp(logprobs[row][t] - old[row][t])
            clipped = min(max(ratio, 1 - low), 1 + high)
            loss = -min(ratio * advantage, clipped * advantage)
            slope = -ratio * advantage if ratio * advantage <= clipped * advantage else 0.0
            gap = reference[row][t] - logprobs[row][t]
            loss += kl_coef * (math.exp(gap) - gap - 1)
            slope += kl_coef * (1 - math.exp(gap))
            weight = 1 / divisor / (length if aggregation == "sequence" else 1)
            value += loss * weight
            gradient[row][t] = slope * weight
    return value, gradient


@pytest.mark.parametrize("denominator", [None, 23.0], ids=["own", "given"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3], ids=["plain", "kl"])
@pytest.mark.parametrize("per_token", [False, True], ids=["rows", "rows-time"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_grpo_loss_and_gradient_equal_a_plain_reference(aggregation, per_token, kl_coef, denominator):
    logprobs, old, advantages, reference = random_batch(29, per_token)
    low, high = 0.2, 0.45
    options = dict(aggregation=aggregation, denominator=denominator, kl_coef=kl_coef)
    loss = grpo_loss(
        logprobs,
        old,
        advantages,
        ragged_mask(),
        low,
        high,
        ref_logprobs=reference if kl_coef else None,
        **options,
    )
    loss.backward()
    lists = (tensor.tolist() for tensor in (logprobs, old, advantages, reference))
    value, gradient = reference_loss(*lists, low, high, **options)
    assert loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(
        logprobs.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-12, atol=1e-15
    )
    if not per_token:
        assert all(clip_counts(logprobs, old, advantages, ragged_mask(), low, high)), (
            "both sides of the clip are reached"
        )


TRUTH = [  # advantage, ratio, loss, gradient: worked by hand for a clip of 0.25 on either side
    (+1.0, 0.5, -0.50, -0.5),  # a good token that became rarer is pulled back
    (+1.0, 1.0, -1.00, -1.0),
    (+1.0, 1.5, -1.25, 0.0),  # a good token that became likelier by more than the clip has no gradient
    (-1.0, 0.5, +0.75, 0.0),  # nor has a bad token that became rarer by more than the clip
    (-1.0, 1.0, +1.00, +1.0),
    (-1.0, 1.5, +1.50, +1.5),  # a bad token that became likelier is pushed down without limit
]


@pytest.mark.parametrize("advantage, ratio, value, gradient", TRUTH)
def test_clip_truth_table(advantage, ratio, value, gradient):
    logprobs = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    old, mask = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    advantages = torch.tensor([advantage], dtype=torch.float64)
    loss = grpo_loss(logprobs, old, advantages, mask, 0.25, 0.25)
    loss.backward()
    assert loss.item() == pytest.approx(value)
    assert logprobs.grad.item() == pytest.approx(gradient)
    expected = (int(gradient == 0 and advantage < 0), int(gradient == 0 and advantage > 0))
    assert clip_counts(logprobs, old, advantages, mask, 0.25, 0.25) == expected


def test_the_defaults_clip_at_a_quarter_and_average_over_tokens():
    """Ratios of 2 and 1/2, a row of one token and one of two: averaged by rows, the loss would be another."""
    logprobs = torch.tensor([[math.log(2), 0.0], [math.log(0.5), math.log(2)]])
    mask = torch.tensor([[1, 0], [1, 1]]).bool()
    for advantage, expected in ((1.0, [1.25, 0.5, 1.25]), (-1.0, [-2.0, -0.75, -2.0])):
        loss = grpo_loss(logprobs, torch.zeros(2, 2), torch.full((2,), advantage), mask)
        assert loss.item() == pytest.approx(-sum(expected) / 3)


def test_clip_counts_keep_sides_apart_and_ignore_masked_tokens():
    ratio = torch.tensor([[0.7, 0.7, 1.3, 1.3, 1.5]] * 3)
    advantages = torch.tensor([-1.0, 1.0, 0.0])  # an advantage of zero has no gradient to clip
    mask = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    for low, high, counts in ((0.25, 0.25, (1, 2)), (0.35, 0.25, (0, 2)), (0.25, 0.35, (1, 0))):
        assert clip_counts(ratio.log(), torch.zeros(3, 5), advantages, mask, low, high) == counts
    ones = torch.zeros(3, 5)
    assert clip_counts(ones, ones, advantages, mask, 0.0, 0.0) == (0, 0)  # at the very edge of the range


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_masked_positions_count_for_nothing_even_if_nan(aggregation):
    """A batch that is masked throughout is zero."""
    mask = ragged_mask()
    values = torch.arange(mask.numel(), dtype=torch.float64).reshape(mask.shape)
    spoiled = values.masked_fill(~mask, math.nan).requires_grad_()
    loss = aggregate(spoiled, mask, aggregation)
    assert loss.item() == aggregate(values, mask, aggregation).item()
    (loss + aggregate(spoiled, mask & False, aggregation)).backward()
    assert torch.equal(spoiled.grad != 0, mask)
    assert aggregate(spoiled, mask & False, aggregation).item() == 0


def test_each_aggregation_by_hand():
    """Rows [1, 2, 3] and [10]: 16 / 4 tokens; (2 + 10) / 2 rows; 16 / (2 rows x 3 positions)."""
    per_token = torch.tensor([[1.0, 2.0, 3.0], [10.0, -7.0, -7.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    for aggregation, expected, denominator in (
        ("token", 4.0, 4),
        ("sequence", 6.0, 2),
        ("constant", 16 / 6, 16),
    ):
        assert aggregate(per_token, mask, aggregation).item() == pytest.approx(expected)
        assert loss_denominator([3, 1], 8, aggregation) == denominator
        assert loss_denominator([], 8, aggregation) == 1
    assert aggregate(per_token, mask).item() == sft_loss(-per_token, mask).item() == 4.0
    assert sft_loss(-per_token, mask, denominator=32).item() == 0.5


def test_the_kl_penalty_has_the_expected_gradient_of_reverse_kl():
    """Over a whole vocabulary; that of k1 = -gap would be zero (docs/algorithm.md)."""
    logits, reference = torch.randn(2, 1, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logprobs = logits.requires_grad_().log_softmax(-1)
    probs, zero, mask = logprobs.detach().exp(), torch.zeros(1), torch.ones(1, 9, dtype=torch.bool)
    for towards in (reference.log_softmax(-1), logprobs.detach()):
        loss = grpo_loss(
            logprobs, logprobs.detach(), zero, mask, ref_logprobs=towards, kl_coef=1.0, denominator=1
        )
        (slopes,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
        (expected_gradient,) = torch.autograd.grad(logprobs, logits, probs * slopes, retain_graph=True)
        torch.testing.assert_close(expected_gradient, probs - towards.exp())


@pytest.mark.parametrize(
    "options, named", [({"aggregation": "mean"}, "'mean'"), ({"kl_coef": 0.1}, "ref_logprobs")]
)
def test_bad_options_are_refused_with_the_offending_value(options, named):
    ones = torch.ones(1, 2)
    with pytest.raises(ValueError, match=named):
        grpo_loss(ones, ones, ones, ones.bool(), **options)

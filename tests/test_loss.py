"""The losses against a reference in plain Python floats, and the truth table of the clip by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl import grpo_loss, sft_loss
from rl.loss import AGGREGATIONS, aggregate, clip_counts, loss_denominator

LENGTHS = [5, 1, 0, 3]  # one row is masked throughout
TIME = 5


def ragged_mask() -> torch.Tensor:
    return torch.arange(TIME)[None] < torch.tensor(LENGTHS)[:, None]


def random_batch(seed: int, per_token: bool):
    """Log-probabilities of a policy, of the sampler and of a reference, and advantages; masked positions hold garbage."""
    rng = np.random.default_rng(seed)
    shape = (len(LENGTHS), TIME)
    old = torch.tensor(rng.normal(-2, 0.5, shape))
    logprobs = (old + torch.tensor(rng.normal(0, 0.5, shape))).requires_grad_()
    reference = old + torch.tensor(rng.normal(0, 0.5, shape))
    advantages = torch.tensor(rng.normal(0, 1, shape if per_token else shape[:1]))
    return logprobs, old, advantages, reference


def reference_loss(logprobs, old, advantages, low, high, aggregation, denominator, reference, kl_coef):
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
    loss = grpo_loss(
        logprobs, old, advantages, ragged_mask(), low, high,
        aggregation=aggregation, denominator=denominator, ref_logprobs=reference if kl_coef else None, kl_coef=kl_coef,
    )  # fmt: skip
    loss.backward()
    value, gradient = reference_loss(
        logprobs.tolist(), old.tolist(), advantages.tolist(), low, high, aggregation, denominator,
        reference.tolist(), kl_coef,
    )  # fmt: skip
    assert loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(logprobs.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    if not per_token:
        assert all(clip_counts(logprobs, old, advantages, ragged_mask(), low, high)), "both sides of the clip are reached"


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


def test_the_defaults_are_a_clip_of_a_quarter_and_an_average_over_tokens():
    """Ratios of 2 and 1/2, a row of one token and one of two: averaged by rows, the loss would be another."""
    logprobs = torch.tensor([[math.log(2), 0.0], [math.log(0.5), math.log(2)]])
    mask = torch.tensor([[1, 0], [1, 1]]).bool()
    for advantage, expected in ((1.0, [1.25, 0.5, 1.25]), (-1.0, [-2.0, -0.75, -2.0])):
        loss = grpo_loss(logprobs, torch.zeros(2, 2), torch.full((2,), advantage), mask)
        assert loss.item() == pytest.approx(-sum(expected) / 3)


def test_clip_counts_keep_the_sides_apart_and_leave_masked_tokens_out():
    ratio = torch.tensor([[0.7, 0.7, 1.3, 1.3, 1.5]] * 3)
    advantages = torch.tensor([-1.0, 1.0, 0.0])  # an advantage of zero has no gradient to clip
    mask = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    for low, high, counts in ((0.25, 0.25, (1, 2)), (0.35, 0.25, (0, 2)), (0.25, 0.35, (1, 0))):
        assert clip_counts(ratio.log(), torch.zeros(3, 5), advantages, mask, low, high) == counts
    ones = torch.zeros(3, 5)
    assert clip_counts(ones, ones, advantages, mask, 0.0, 0.0) == (0, 0)  # at the very edge of the range


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_all_masked_batch_is_zero_and_masked_positions_count_for_nothing_even_if_nan(aggregation):
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
    assert aggregate(per_token, mask, "token").item() == aggregate(per_token, mask).item() == 4.0
    assert sft_loss(-per_token, mask).item() == 4.0 and sft_loss(-per_token, mask, denominator=32).item() == 0.5
    assert aggregate(per_token, mask, "sequence").item() == 6.0
    assert aggregate(per_token, mask, "constant").item() == pytest.approx(16 / 6)
    assert loss_denominator([3, 1], 8, "token") == 4
    assert loss_denominator([3, 1], 8, "sequence") == 2
    assert loss_denominator([3, 1], 8, "constant") == 16
    assert [loss_denominator([], 8, name) for name in AGGREGATIONS] == [1, 1, 1]


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=6))
def test_the_kl_penalty_is_never_negative_and_at_equality_it_and_its_gradient_are_zero(pairs):
    """The gradient of k1 = -gap would be one for every sampled token, and zero only in expectation."""
    logprobs, reference = torch.tensor(pairs, dtype=torch.float64).T[:, None]
    mask, zero = torch.ones_like(logprobs, dtype=torch.bool), torch.zeros(1, dtype=torch.float64)
    for towards in (reference, logprobs.clone()):
        policy = logprobs.clone().requires_grad_()
        loss = grpo_loss(policy, logprobs, zero, mask, ref_logprobs=towards, kl_coef=1.0)
        loss.backward()
        assert loss.item() >= 0
    assert loss.item() == 0 and not policy.grad.any()


def test_bad_options_are_refused_with_the_offending_value():
    ones, mask = torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="'mean'"):
        grpo_loss(ones, ones, ones, mask, aggregation="mean")
    with pytest.raises(ValueError, match="ref_logprobs"):
        grpo_loss(ones, ones, ones, mask, kl_coef=0.1)

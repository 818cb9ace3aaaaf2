"""Group advantages, worked by hand and by what must hold for any rewards."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl import group_advantages

REWARDS = st.floats(0, 1, allow_subnormal=False)
GROUPS = st.integers(1, 8).flatmap(
    lambda samples: st.lists(st.lists(REWARDS, min_size=samples, max_size=samples), min_size=1, max_size=4)
)


def test_advantages_divide_by_the_population_standard_deviation():
    """Rewards 1, 0, 0, 0: mean 1/4, variance 3/16 over n (1/4 over n - 1, which would give 1.4997)."""
    deviation = math.sqrt(3) / 4
    expected = [[0.75 / (deviation + 1e-4)] + [-0.25 / (deviation + 1e-4)] * 3]
    rewards = torch.tensor([[1, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-14)
    assert group_advantages(rewards)[0, 0].item() == pytest.approx(1.7316508, abs=1e-7)


def test_delta_is_added_to_the_standard_deviation_and_without_scaling_advantages_are_differences():
    rewards = torch.tensor([[1.0, 0.0], [0.5, 0.1]], dtype=torch.float64)
    expected = torch.tensor([[0.5 / 0.75, -0.5 / 0.75], [0.2 / 0.45, -0.2 / 0.45]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, delta=0.25), expected, rtol=0, atol=1e-15)
    rewards = torch.tensor([[1.0, 0.5, 0.0, 0.5], [1.0, 1.0, 1.0, 0.0]])
    expected = torch.tensor([[0.5, 0.0, -0.5, 0.0], [0.25, 0.25, 0.25, -0.75]])
    assert torch.equal(group_advantages(rewards, scale_by_std=False), expected)


@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [1, 3, 8, 16])
def test_equal_rewards_give_exactly_zero(samples, dtype, scale_by_std):
    """The mean of eight times 0.1 need not be 0.1, and the difference divided by delta is no longer small."""
    rewards = [0.0, 0.1, 0.3, 0.55, 0.7, 1 / 3, 1.0, -1.0, 2.0]
    groups = torch.tensor([[reward] * samples for reward in rewards], dtype=dtype)
    advantages = group_advantages(groups, scale_by_std=scale_by_std)
    assert torch.equal(advantages, torch.zeros(len(rewards), samples, dtype=dtype))


def test_whole_number_rewards_are_taken_as_floats_and_rewards_without_groups_are_refused():
    assert torch.equal(group_advantages(torch.tensor([[1, 0]])), group_advantages(torch.tensor([[1.0, 0.0]])))
    with pytest.raises(ValueError, match=r"\[3\]"):
        group_advantages(torch.tensor([1.0, 0.0, 0.0]))


@settings(deadline=None, derandomize=True)
@given(GROUPS)
def test_advantages_of_a_group_sum_to_zero_are_bounded_and_keep_the_order_of_the_rewards(rewards):
    advantages = group_advantages(torch.tensor(rewards, dtype=torch.float64))
    assert advantages.shape == (len(rewards), len(rewards[0]))
    assert advantages.sum(1).abs().max() < 1e-9
    # with n samples, the only one that differs lies sqrt(n - 1) standard deviations from the mean
    assert advantages.abs().max() <= math.sqrt(len(rewards[0]) - 1) + 1e-9
    for row, values in zip(rewards, advantages, strict=True):
        order = sorted(range(len(row)), key=row.__getitem__)
        assert all(values[a] <= values[b] for a, b in itertools.pairwise(order))

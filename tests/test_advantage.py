"""Group advantages, worked by hand; and zero where rewards are equal."""

import math

import pytest
import torch

from rl import group_advantages


@pytest.mark.parametrize(
    ("rewards", "options", "expected"),
    [
        # mean 1/4, variance 3/16 over n (1/4 over n - 1, which would give 1.4997)
        ([1, 0, 0, 0], {}, [0.75 / (math.sqrt(3 / 16) + 1e-4)] + [-0.25 / (math.sqrt(3 / 16) + 1e-4)] * 3),
        ([1, 0], {"delta": 0.25}, [0.5 / 0.75, -0.5 / 0.75]),
        ([0.5, 0.1], {"delta": 0.25}, [0.2 / 0.45, -0.2 / 0.45]),
        ([1, 0.5, 0, 0.5], {"scale_by_std": False}, [0.5, 0, -0.5, 0]),
        ([1, 1, 1, 0], {"scale_by_std": False}, [0.25, 0.25, 0.25, -0.75]),
    ],
)
def test_advantages_by_hand(rewards, options, expected):
    groups = torch.tensor([rewards, [0.7] * len(rewards)], dtype=torch.float64)
    advantages = group_advantages(groups, **options)
    assert advantages[0].tolist() == pytest.approx(expected, rel=0, abs=1e-14)
    assert not advantages[1].any()


@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("samples", [1, 3, 8, 16])
def test_equal_rewards_give_exactly_zero(samples, dtype, scale_by_std):
    """The mean of eight times 0.1 need not be 0.1, and the difference divided by delta is no longer small."""
    rewards = [0.0, 0.1, 0.3, 0.55, 0.7, 1 / 3, 1.0, -1.0, 2.0]
    groups = torch.tensor([[reward] * samples for reward in rewards], dtype=dtype)
    advantages = group_advantages(groups, scale_by_std=scale_by_std)
    assert torch.equal(advantages, torch.zeros(len(rewards), samples, dtype=dtype))

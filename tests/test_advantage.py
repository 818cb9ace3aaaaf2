"""Group advantages, worked by hand; and zero where rewards are equal."""

import pytest
import torch

from rl import group_advantages

STD = (3 / 16) ** 0.5  # of one 1 and three 0 over n; over n - 1, the variance would be 1/4


@pytest.mark.parametrize(
    ("rewards", "options", "expected"),
    [
        ([1, 0, 0, 0], {}, [0.75 / (STD + 1e-4)] + [-0.25 / (STD + 1e-4)] * 3),
        ([0.5, 0.1], {"delta": 0.25}, [0.2 / 0.45, -0.2 / 0.45]),
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
    rewards = torch.tensor([0.0, 0.1, 0.3, 0.55, 0.7, 1 / 3, 1.0, -1.0, 2.0], dtype=dtype)
    groups = rewards[:, None].expand(-1, samples)
    assert torch.equal(group_advantages(groups, scale_by_std=scale_by_std), torch.zeros_like(groups))


def test_whole_number_rewards_count_as_floats():
    assert torch.equal(group_advantages(torch.tensor([[1, 0]])), group_advantages(torch.tensor([[1.0, 0.0]])))


def test_a_vector_of_rewards_without_groups_is_refused():
    with pytest.raises(ValueError, match=r"\[3\]"):
        group_advantages(torch.tensor([1.0, 0.0, 0.0]))

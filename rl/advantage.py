"""The G and the R in GRPO: how much better a completion did than the others that answered the same prompt."""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, delta: float = 1e-4, scale_by_std: bool = True) -> Tensor:
    """(reward - group mean) / (group standard deviation + delta), the paper's A_i (section 2.2).

    `rewards`, which are floating, and result are [groups, samples]; the standard deviation is the
    population's. If all rewards of a group are equal, the result is exactly zero, not a rounding error over
    delta. Without `scale_by_std` it is the plain difference, as in Dr. GRPO (arXiv:2503.20783): dividing
    gives more weight to groups that are almost all right or almost all wrong.
    """
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if scale_by_std:
        std = rewards.std(dim=1, correction=0, keepdim=True)
        advantages = advantages / (std + delta)
    highest = rewards.amax(dim=1, keepdim=True)
    lowest = rewards.amin(dim=1, keepdim=True)
    return torch.where(highest > lowest, advantages, 0.0)

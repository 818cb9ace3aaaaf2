"""GRPO: sample groups of completions, compare each with its group, learn from the difference.

Unlike PPO, no critic: the group's other completions say what reward to expect (Le 2025, section 2.2). The
reward comes once, at the end, and is exact, so there is no GAE and, without `kl_coef`, no KL penalty.
"""

import math
import time
from collections import Counter
from dataclasses import dataclass
from threading import Event
from typing import Literal

import torch
from torch import Tensor

from data.task import AnyProblem, Task
from model import Qwen3, Tokenizer
from model.sampler import Cancelled
from rl.advantage import group_advantages
from rl.batch import Batch, Sample, completion_logprobs, logprobs_and_entropy
from rl.distributed import own_part, sum_counts, sum_gradients
from rl.loss import clip_counts, grpo_loss, loss_denominator
from rl.ranges import Count, CountOrZero, NonNegative, Positive, ZeroToOne
from rl.reward import RewardSettings
from rl.rollout import Groups, OnProgress, SamplingSettings, collect_rollouts
from rl.trainer import Trainer


@dataclass(frozen=True)
class GRPOStage:
    """GRPO on groups of completions."""

    kind: Literal["grpo"] = "grpo"
    steps: Count = 80  # Rollout batches
    prompts_per_step: Count = 32  # Groups in a rollout batch
    samples_per_prompt: Count = 8  # Completions in a group
    updates_per_step: Count = 2  # Optimizer steps, each on its own part of the groups

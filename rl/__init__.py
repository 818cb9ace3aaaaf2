"""Group-relative RL and supervised fine-tuning of a language model, on tasks with exact verdicts."""

from data import score
from data.task import Score
from rl.advantage import group_advantages
from rl.grpo import grpo_step
from rl.loss import grpo_loss, sft_loss

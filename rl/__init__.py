"""Group-relative reinforcement learning and supervised fine-tuning of a language model, on tasks with exact verdicts."""

from rl.advantage import group_advantages
from rl.loss import grpo_loss, sft_loss
from tasks import Score
from tasks.countdown import score

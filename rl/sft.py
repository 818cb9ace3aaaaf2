"""Supervised fine-tuning: raise the likelihood of given completions. Same batches and log-probabilities as GRPO."""

import numpy as np

from model import Qwen3
from rl.batch import Sample, completion_logprobs, make_batch, micro_batches
from rl.loss import sft_loss
from rl.optimizer import Optimizer


def sft_schedule(samples: list[Sample], batch_size: int, epochs: int, seed: int) -> list[list[Sample]]:
    """The batches of every step: each epoch goes once through the samples in an order of its own."""
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(samples))
        steps += [[samples[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    return steps


def sft_step(
    model: Qwen3,
    optimizer: Optimizer,
    samples: list[Sample],
    learning_rate: float,
    micro_batch_tokens: int,
    max_grad_norm: float = 1.0,
) -> dict[str, float]:
    """One optimizer step on `samples`: loss on the completions only, averaged over their tokens.

    Returns:
        `loss` in nats a token, `grad_norm` before clipping, and `tokens` learned from.
    """
    tokens = sum(len(sample.completion_ids) for sample in samples)
    total = 0.0
    for micro in micro_batches(samples, micro_batch_tokens):
        batch = make_batch(micro, model.device)
        loss = sft_loss(completion_logprobs(model, batch), batch.mask, tokens)
        loss.backward()
        total += loss.item()
    return {"loss": total, "grad_norm": optimizer.step(learning_rate, max_grad_norm), "tokens": tokens}

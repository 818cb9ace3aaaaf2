"""Supervised fine-tuning: raise the likelihood of given completions. Same batches and log-probabilities as GRPO."""

import numpy as np

from rl.batch import Batch, Sample, completion_logprobs
from rl.learner import Learner
from rl.loss import sft_loss


def sft_schedule(samples: list[Sample], batch_size: int, epochs: int, seed: int) -> list[list[Sample]]:
    """The batches of every step: each epoch goes once through the samples in an order of its own."""
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(samples))
        steps += [[samples[i] for i in order[start : start + batch_size]] for start in range(0, len(order), batch_size)]
    return steps


def sft_step(learner: Learner, samples: list[Sample], learning_rate: float) -> dict[str, float]:
    """One optimizer step on `samples`: loss on the completions only, averaged over their tokens.

    Returns:
        `loss` in nats a token, `grad_norm` before clipping, and `tokens` learned from; `skipped_updates` is 1 and loss and
        norm 0 if they were not finite, see `Learner.step`.
    """
    tokens = sum(len(sample.completion_ids) for sample in samples)

    def backward(batch: Batch) -> dict[str, float]:
        loss = sft_loss(completion_logprobs(learner.model, batch), batch.mask, tokens)
        loss.backward()
        return {"loss": loss.item()}

    loss = learner.accumulate(learner.workers.share(samples), backward)["loss"]
    norm = learner.step(learning_rate)
    if norm is None:
        return {"loss": 0.0, "grad_norm": 0.0, "skipped_updates": 1, "tokens": tokens}
    return {"loss": loss, "grad_norm": norm, "skipped_updates": 0, "tokens": tokens}

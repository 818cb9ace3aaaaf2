"""Supervised fine-tuning: raise the likelihood of given completions, through the same batches as GRPO."""

import math
from collections import Counter
from dataclasses import dataclass
from threading import Event
from typing import Annotated, Literal

import numpy as np
from annotated_types import Interval

from rl.batch import Batch, Sample, completion_logprobs
from rl.distributed import own_part, sum_counts, sum_gradients
from rl.loss import sft_loss
from rl.ranges import Count, Positive
from rl.trainer import Trainer

WORKED = "worked"  # as a stage's traces


@dataclass(frozen=True)
class SFTStage:
    """Fine-tuning on correct traces."""

    kind: Literal["sft"] = "sft"
    epochs: Annotated[int, Interval(ge=1, le=1000)] = 2  # Passes over the traces
    batch_size: Count = 64  # Traces per optimizer step
    learning_rate: Positive = 1e-5  # Peak; falls linearly to zero over the stage
    max_traces: Count = 2400  # At most so many, the latest; a file of yours is taken whole
    traces_per_problem: Count = 2  # At most so many rollouts of one problem; the shortest
    traces: str | None = None
    """Traces to imitate. None: the correct rollouts of the stage before. "worked": solutions that the task
    itself writes, a cold start. Else a JSONL file of yours, with a problem and a completion in each line."""


def sft_schedule(samples: list[Sample], batch_size: int, epochs: int, seed: int) -> list[list[Sample]]:
    """The samples of every step: each epoch goes once through all of them, in its own order."""
    steps = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(samples))
        for start in range(0, len(order), batch_size):
            steps.append([samples[i] for i in order[start : start + batch_size]])
    return steps


def sft_step(
    trainer: Trainer, samples: list[Sample], learning_rate: float, cancel: Event | None = None
) -> dict[str, float]:
    """One optimizer step on `samples`: loss on the completions only, averaged over their tokens.

    Returns `loss` in nats per token, `grad_norm` before clipping, `tokens`, and `skipped_updates`: 1 if the
    update was not finite; loss and norm are NaN then. Cancelled: `cancel` was set before the update.
    """
    # 1. The gradient, one micro-batch of this rank's samples at a time.
    tokens = sum(len(sample.completion_ids) for sample in samples)

    def learn(batch: Batch) -> Counter:
        logprobs = completion_logprobs(trainer.model, batch)
        loss = sft_loss(logprobs, batch.mask, denominator=tokens)
        loss.backward()
        return Counter(loss=loss.item())

    sums = sum_counts(trainer.for_each_micro_batch(own_part(samples), learn, cancel))
    sum_gradients(trainer.optimizer.parameters.values())

    # 2. The optimizer's step.
    grad_norm = trainer.optimizer.step(learning_rate, skip=not math.isfinite(sums["loss"]))
    taken = math.isfinite(grad_norm)
    return {
        "loss": sums["loss"] if taken else math.nan,
        "grad_norm": grad_norm,
        "skipped_updates": int(not taken),
        "tokens": tokens,
    }

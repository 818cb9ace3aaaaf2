"""What GRPO and SFT share: a gradient summed over micro-batches that fit into memory, and the optimizer's step."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from model import Qwen3
from rl.batch import Batch, Sample, make_batch, micro_batches
from rl.optimizer import Optimizer
from rl.recipe import Recipe


@dataclass
class Learner:
    """A policy in training.

    Attributes:
        micro_batch_tokens: tokens in one forward and backward; halved for good whenever memory runs out.
        reference: the frozen policy of the KL penalty, if there is one.
        skipped_in_a_row: updates left out since the last one taken, as a loss, log-probability or gradient was not finite.
        faulty: the samples of updates left out; of those, where the gradient was not the first to be so, its micro-batch's only.
    """

    model: Qwen3
    optimizer: Optimizer
    recipe: Recipe
    micro_batch_tokens: int
    reference: Qwen3 | None = None
    skipped_in_a_row: int = 0
    faulty: list[Sample] = field(default_factory=list)
    _samples: list[Sample] = field(default_factory=list)  # of the gradient so far
    _not_finite: list[Sample] = field(default_factory=list)  # those of them in a micro-batch with such a loss or log-probability

    def accumulate(self, samples: list[Sample], backward: Callable[[Batch], dict[str, float]]) -> Counter[str]:
        """Call `backward` on micro-batches of `samples`, which adds to the gradient; the sums of what it returns.

        Out of memory, everything begins again in micro-batches of half the size, the gradient so far dropped: what comes
        out does not depend on how often that happened. A single sample that does not fit is an error.

        Raises:
            torch.OutOfMemoryError, or on a CPU RuntimeError: there is nothing left to divide.
        """
        while True:
            micros = micro_batches(samples, self.micro_batch_tokens)
            totals: Counter[str] = Counter()
            self._samples, self._not_finite = samples, []
            try:
                for micro in micros:
                    found = backward(make_batch(micro, self.model.device))
                    totals.update(found)
                    self._not_finite += [] if all(map(math.isfinite, found.values())) else micro
                return totals
            except RuntimeError as error:
                if not out_of_memory(error) or len(micros) == len(samples):
                    raise
            # Here, and not in the handler, where the error still holds on to the failed forward's tensors.
            self.optimizer.clear_gradients()
            self.micro_batch_tokens //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def step(self, learning_rate: float) -> float | None:
        """Update the weights by the gradient and clear it; the gradient's norm before clipping.

        None if a loss, a log-probability or the gradient was not finite: then nothing is updated, and `faulty` has the samples.
        """
        if self._not_finite:
            self.optimizer.clear_gradients()
            norm = math.nan
        else:
            norm = self.optimizer.step(learning_rate, self.recipe.optimizer.max_grad_norm)
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            return norm
        self.skipped_in_a_row += 1
        self.faulty += self._not_finite or self._samples
        return None


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate; on a CPU that has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)

"""What GRPO and SFT share: a gradient summed over micro-batches that fit into memory, and the optimizer's step."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from model import Qwen3
from rl.batch import Batch, Sample, make_batch, micro_batches
from rl.optimizer import Optimizer
from rl.recipe import Recipe
from rl.sharding import is_divided, sharding_of
from rl.workers import ALONE, Workers


@dataclass
class Learner:
    """A policy in training.

    Attributes:
        micro_batch_tokens: tokens in one forward and backward; halved for good whenever memory runs out.
        workers: the processes that learn together, each from its own samples.
        reference: the frozen policy of the KL penalty, if there is one.
        skipped_in_a_row: updates left out since the last one taken, as a loss, log-probability or gradient was not finite.
        faulty: the samples of updates left out; where a loss was not finite, those of its micro-batch only.
    """

    model: Qwen3
    optimizer: Optimizer
    recipe: Recipe
    micro_batch_tokens: int
    workers: Workers = ALONE
    reference: Qwen3 | None = None
    skipped_in_a_row: int = 0
    faulty: list[Sample] = field(default_factory=list)
    _samples: list[Sample] = field(default_factory=list)  # of the gradient so far
    _not_finite: list[Sample] = field(default_factory=list)  # those of them in a micro-batch that was not finite

    def batches(self, samples: list[Sample]) -> Iterator[tuple[list[Sample], Batch]]:
        """Micro-batches of `samples`, as (samples, batch).

        Processes that gather a divided model together need equally many: who has fewer gets empty ones at the end.
        """
        micros = micro_batches(samples, self.micro_batch_tokens)
        count = max(self.workers.gather(len(micros))) if sharding_of(self.model) else len(micros)
        for micro in micros + [[]] * (count - len(micros)):
            yield micro, make_batch(micro, self.model.device)

    def accumulate(self, samples: list[Sample], backward: Callable[[Batch], dict[str, float]]) -> Counter[str]:
        """Call `backward` on micro-batches of `samples`, which adds to the gradient; the sums of what it returns, over all
        processes.

        Out of memory, everything begins again in micro-batches of half the size, the gradient so far dropped: what comes
        out does not depend on how often that happened. A single sample that does not fit is an error.

        Raises:
            torch.OutOfMemoryError, or on a CPU RuntimeError: there is nothing left to divide.
        """
        while True:
            totals: Counter[str] = Counter()
            self._samples, self._not_finite = samples, []
            try:
                for micro, batch in self.batches(samples):
                    found = backward(batch)
                    totals.update(found)
                    self._not_finite += [] if all(map(math.isfinite, found.values())) else micro
                break
            except RuntimeError as error:
                smallest = len(micro_batches(samples, self.micro_batch_tokens)) == len(samples)
                if not out_of_memory(error) or smallest or sharding_of(self.model):  # the others would not begin again
                    raise
            # Here, and not in the handler, where the error still holds on to the failed forward's tensors.
            self.optimizer.clear_gradients()
            self.micro_batch_tokens //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return self.workers.sum(totals)

    def step(self, learning_rate: float) -> float | None:
        """Update the weights by the gradient and clear it; the gradient's norm before clipping.

        None if a loss, a log-probability or the gradient was not finite: then nothing is updated, and `faulty` has the samples.
        """
        if self.workers.any(bool(self._not_finite)):
            self.optimizer.clear_gradients()
            norm = math.nan
        else:
            self.workers.add_gradients(p for p in self.optimizer.parameters.values() if not is_divided(p))
            norm = self.optimizer.step(learning_rate, self.recipe.optimizer.max_grad_norm)
        if math.isfinite(norm):
            self.skipped_in_a_row = 0
            return norm
        self.skipped_in_a_row += 1
        faulty = [sample for part in self.workers.gather(self._not_finite) for sample in part]
        self.faulty += faulty or [sample for part in self.workers.gather(self._samples) for sample in part]
        return None


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate; on a CPU that has no class of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)

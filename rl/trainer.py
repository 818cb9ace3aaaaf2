"""A model in training; micro-batches are halved when memory runs out."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event

import torch

from model import Qwen3
from model.sampler import Cancelled
from rl.batch import Batch, Sample, make_batch, micro_batches
from rl.distributed import cancelled_together
from rl.optimizer import Optimizer


@dataclass
class Trainer:
    """A model, its optimizer, and the size of a micro-batch, which changes memory and speed but no result."""

    model: Qwen3
    optimizer: Optimizer
    micro_batch_tokens: int = 8192  # in one forward and backward; halved if memory runs out

    def for_each_micro_batch(
        self, samples: list[Sample], function: Callable[[Batch], Counter], cancel: Event | None = None
    ) -> Counter:
        """Call `function` with each micro-batch of `samples`, and add up what it returns.

        If memory runs out, all starts again with micro-batches of half the size, unless each was one sample
        already. Cancelled: `cancel` was set, here or on another rank.
        """
        while True:
            self.optimizer.clear_gradients()  # those of an attempt that did not end
            parts = micro_batches(samples, self.micro_batch_tokens)
            sums: Counter = Counter()
            try:
                with cancelled_together():
                    for part in parts:
                        if cancel is not None and cancel.is_set():
                            raise Cancelled
                        sums.update(function(make_batch(part, self.model.device)))
                return sums
            except RuntimeError as error:
                each_is_one_sample = len(parts) == len(samples)
                if each_is_one_sample or not is_lack_of_memory(error):
                    raise
            # Outside the handler, where the error no longer holds the tensors of the failed forward.
            self.micro_batch_tokens //= 2
            torch.cuda.empty_cache()  # which does nothing where there is no GPU


def is_lack_of_memory(error: RuntimeError) -> bool:
    on_cpu = "can't allocate memory" in str(error)
    return on_cpu or isinstance(error, torch.OutOfMemoryError)

"""Samples to tensors: the one place that shifts tokens against their targets and masks what has no loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model import Qwen3, token_logprobs


@dataclass(frozen=True)
class Sample:
    """One completion to learn from.

    Prompt and completion are joined as ids: the ids of the joined text may differ from the joined ids.

    Attributes:
        old_logprobs: log-probability of each completion id when it was sampled; None for SFT.
        advantage: of the whole completion within its group; 0 for SFT.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    old_logprobs: list[float] | None = None
    advantage: float = 0.0

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Batch:
    """Samples as tensors, padded on the right.

    Position t of every [rows, time] tensor speaks of the prediction of `target_ids[:, t]` from `input_ids[:, : t + 1]`.
    The mask is made from lengths, never from ids: Qwen3-Base pads with the id that also ends its completions.

    Attributes:
        input_ids, target_ids: [rows, time], int64; targets are the inputs one step later.
        mask: [rows, time], bool; True where the target belongs to the completion, its stop id included.
        old_logprobs: [rows, time], float32; zero outside the mask.
        advantages: [rows], float32.
    """

    input_ids: Tensor
    target_ids: Tensor
    mask: Tensor
    old_logprobs: Tensor
    advantages: Tensor


def make_batch(samples: list[Sample], device="cpu") -> Batch:
    """Pad `samples` to their longest and shift them."""
    time = max(len(sample) for sample in samples)
    token_ids = torch.zeros(len(samples), time, dtype=torch.int64)
    mask = torch.zeros(len(samples), time, dtype=torch.bool)
    old_logprobs = torch.zeros(len(samples), time)
    for row, sample in enumerate(samples):
        start, end = len(sample.prompt_ids), len(sample)
        token_ids[row, :end] = torch.tensor(sample.prompt_ids + sample.completion_ids)
        mask[row, start:end] = True
        if sample.old_logprobs is not None:
            old_logprobs[row, start:end] = torch.tensor(sample.old_logprobs)
    advantages = torch.tensor([sample.advantage for sample in samples])
    tensors = (token_ids[:, :-1], token_ids[:, 1:], mask[:, 1:], old_logprobs[:, 1:], advantages)
    return Batch(*(tensor.to(device) for tensor in tensors))


def micro_batches(samples: list[Sample], token_budget: int) -> list[list[Sample]]:
    """Share `samples` out so that rows x longest row, padding included, stays within `token_budget` a micro-batch.

    Samples of like length go together, longest first: little padding, and the largest micro-batch comes first, so
    that a budget too large for the memory fails at once. A sample longer than the budget goes alone.
    """
    batches: list[list[Sample]] = []
    for sample in sorted(samples, key=len, reverse=True):
        if batches and len(batches[-1][0]) * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


def completion_logprobs(model: Qwen3, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Log-probability of each completion token under `model`, [rows, time] float32; zero outside the mask.

    The same `token_logprobs` as in the sampler, at the same temperature. Only completion positions go through the
    output head: the logits are [completion tokens, vocab], never [rows, time, vocab].
    """
    hidden = model.model(batch.input_ids)  # [rows, time, hidden]
    logits = model.lm_head(hidden[batch.mask])  # [completion tokens, vocab]
    logprobs = token_logprobs(logits, temperature, model.num_tokens)
    chosen = logprobs.gather(-1, batch.target_ids[batch.mask][:, None])[:, 0]
    return torch.zeros_like(batch.old_logprobs).masked_scatter(batch.mask, chosen)

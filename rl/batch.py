"""Samples to tensors: the one place that shifts tokens against their targets, and masks what has no loss."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model import PackedGroup, PackedGroups, Qwen3, TokenLogprobs, target_logprobs
from rl.optimizer import Optimizer


@dataclass(frozen=True)
class Sample:
    """One completion to learn from. Prompt and completion are joined as ids, not as text."""

    prompt_ids: list[int]
    completion_ids: list[int]
    old_logprobs: list[float] | None = None  # of each completion id when it was sampled; None for SFT
    advantage: float = 0.0  # of the completion within its group; 0 for SFT

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Batch:
    """Samples as tensors: one stream of tokens for the decoder; for the loss, rows of completion tokens.

    A shared prompt stands once in the stream, without its last id: that predicts the first id of every
    completion, so it begins each sample's own branch. A completion's last id predicts nothing and is left
    out. The mask is made from lengths, never from ids: Qwen3-Base pads with an id that also ends completions.
    """

    input_ids: Tensor  # [1, tokens], int64
    layout: PackedGroups  # which token of the stream attends to which
    logit_positions: Tensor  # [rows, time], int64; position in the stream that predicts the target
    target_ids: Tensor  # [rows, time], int64; the completions, padded on the right
    mask: Tensor  # [rows, time], bool; True where there is a target, the stop token included
    old_logprobs: Tensor  # [rows, time], float32; zero outside the mask
    advantages: Tensor  # [rows], float32


def make_batch(samples: list[Sample], device="cpu") -> Batch:
    """Pack `samples` into a stream; rows keep their order."""
    # 1. The mask, from the lengths.
    lengths = torch.tensor([len(sample.completion_ids) for sample in samples])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]  # [rows, time]

    # 2. The stream: of each group first the shared prefix, then its branches in padded blocks.
    logit_positions = torch.zeros(mask.shape, dtype=torch.int64)
    stream: list[int] = []
    layout = []
    for members in prompt_groups(samples):
        group = packed_group([samples[row] for row in members])
        layout.append(group)
        stream += samples[members[0]].prompt_ids[: group.prefix]
        rows = iter(members)
        for count, longest in group.blocks():
            for _, row in zip(range(count), rows, strict=False):
                branch = (samples[row].prompt_ids + samples[row].completion_ids[:-1])[group.prefix :]
                end = len(stream) + len(branch)
                logit_positions[row, : lengths[row]] = torch.arange(end - lengths[row], end)
                stream += branch + [0] * (longest - len(branch))

    # 3. The targets, and what goes with them.
    targets = [torch.tensor(sample.completion_ids) for sample in samples]
    old_logprobs = [
        torch.tensor(sample.old_logprobs or [0.0] * len(sample.completion_ids)) for sample in samples
    ]
    advantages = torch.tensor([sample.advantage for sample in samples])
    padded = (pad_sequence(rows, batch_first=True) for rows in (targets, old_logprobs))
    tensors = (torch.tensor([stream]), logit_positions, *padded, mask, advantages)
    input_ids, logit_positions, target_ids, old, mask, advantages = (x.to(device) for x in tensors)
    return Batch(input_ids, PackedGroups(layout, device), logit_positions, target_ids, mask, old, advantages)


def prompt_groups(samples: list[Sample]) -> list[list[int]]:
    """Indices of samples that share a prompt, longest first; the others form one group."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(range(len(samples)), key=lambda index: -len(samples[index])):
        by_prompt.setdefault(tuple(samples[index].prompt_ids), []).append(index)
    groups = [members for members in by_prompt.values() if len(members) > 1]
    singles = [members[0] for members in by_prompt.values() if len(members) == 1]
    return groups + [singles] if singles else groups


def packed_group(samples: list[Sample]) -> PackedGroup:
    """The layout of samples behind one prefix: what their prompts share, without the last id of a prompt."""
    common = os.path.commonprefix([sample.prompt_ids for sample in samples])
    prefix = min(len(common), min(len(sample.prompt_ids) for sample in samples) - 1)
    return PackedGroup(prefix, [len(sample) - 1 - prefix for sample in samples])


def stream_tokens(samples: list[Sample]) -> int:
    """Tokens of the stream of `samples`, padding included."""
    groups = ([samples[row] for row in members] for members in prompt_groups(samples))
    return sum(packed_group(group).num_tokens() for group in groups)


def micro_batches(samples: list[Sample], token_budget: int) -> list[list[Sample]]:
    """Divide `samples` so that the stream of each micro-batch has at most `token_budget` tokens.

    Samples of one prompt stay together if they fit; a sample longer than the budget goes alone. The largest
    part comes first, so that a budget too large for the memory fails at once.
    """
    parts: list[list[Sample]] = []
    for members in prompt_groups(samples):
        part: list[Sample] = []
        for sample in (samples[row] for row in members):
            if part and stream_tokens([*part, sample]) > token_budget:
                parts.append(part)
                part = []
            part.append(sample)
        parts.append(part)
    batches: list[list[Sample]] = []
    for part in sorted(parts, key=stream_tokens, reverse=True):
        if batches and stream_tokens(batches[-1] + part) <= token_budget:
            batches[-1] += part
        else:
            batches.append(part)
    return batches


def halve_on_oom(
    add_gradient: Callable, optimizer: Optimizer, model: Qwen3, samples: list, *arguments
) -> Counter:
    """`add_gradient(model, micro-batches, *arguments)`; on OOM, halve the micro-batch if it has two."""
    while True:
        try:
            micros = micro_batches(samples, optimizer.micro_batch_tokens)
            return add_gradient(model, (make_batch(micro, model.device) for micro in micros), *arguments)
        except RuntimeError as error:
            on_cpu = "can't allocate memory" in str(error)
            if not (isinstance(error, torch.OutOfMemoryError) or on_cpu) or len(micros) == len(samples):
                raise
        # Outside the handler, where the error no longer holds the tensors of the failed forward.
        optimizer.clear_gradients()
        optimizer.micro_batch_tokens //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def score_completions(model: Qwen3, batch: Batch, temperature: float = 1.0) -> TokenLogprobs:
    """Log-probability of each completion token, and the entropy there; [rows, time], zero outside the mask.

    As in the sampler, but only completion positions go through the output head, a few at a time.
    """
    hidden = model.model(batch.input_ids, batch.layout)[0]  # [tokens, hidden]
    hidden = hidden.index_select(0, batch.logit_positions[batch.mask])  # [completion tokens, hidden]
    targets = batch.target_ids[batch.mask]
    scored = target_logprobs(hidden, model.lm_head.weight, targets, temperature, model.num_tokens)
    return TokenLogprobs(*(x.new_zeros(batch.mask.shape).masked_scatter(batch.mask, x) for x in scored))


def completion_logprobs(model: Qwen3, batch: Batch, temperature: float = 1.0) -> Tensor:
    """The log-probabilities of `score_completions`."""
    return score_completions(model, batch, temperature).logprobs

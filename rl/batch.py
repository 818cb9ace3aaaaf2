"""Samples to tensors: the one place that shifts tokens against their targets and masks what has no loss."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from model import PackedGroup, PackedGroups, Qwen3, TokenLogprobs, target_logprobs


@dataclass(frozen=True)
class Sample:
    """One completion to learn from.

    Prompt and completion are joined as ids: the ids of the joined text may differ from the joined ids.

    Attributes:
        old_logprobs: log-probability of each completion id when it was sampled; None for SFT.
        advantage: of the whole completion within its group; 0 for SFT.
        recomputed_logprobs: the same as `old_logprobs` by the trainer's forward; None where the sampler's are taken.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    old_logprobs: list[float] | None = None
    advantage: float = 0.0
    recomputed_logprobs: list[float] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Batch:
    """Samples as tensors: one stream of tokens for the decoder, and a row a sample for the loss.

    In the stream a prompt that several samples share stands once, without its last id: that one predicts the first id
    of every completion, so it begins each sample's own branch. The last id of a completion predicts nothing
    and is left out. A position of the [rows, time] tensors speaks of one completion id. The mask is made from lengths,
    never from ids: Qwen3-Base pads with the id that also ends its completions.

    Attributes:
        input_ids: [1, tokens], int64; `layout` says which token sees which.
        places: [rows, time], int64; where in the stream the target is predicted.
        target_ids: [rows, time], int64: the completions, padded on the right.
        mask: [rows, time], bool; True where there is a target, the stop id included.
        old_logprobs, recomputed_logprobs: [rows, time], float32; zero outside the mask. The second equals the first
            where a sample has none.
        advantages: [rows], float32.
    """

    input_ids: Tensor
    layout: PackedGroups
    places: Tensor
    target_ids: Tensor
    mask: Tensor
    old_logprobs: Tensor
    recomputed_logprobs: Tensor
    advantages: Tensor


def make_batch(samples: list[Sample], device="cpu") -> Batch:
    """Pack `samples` into a stream; their rows keep the order in which they are given.

    Of no samples a batch of one token and no target: for a process that has to take part in a forward, with no loss.
    """
    given, samples = bool(samples), samples or [Sample([0], [0])]
    lengths = torch.tensor([len(sample.completion_ids) for sample in samples])
    shape = (len(samples), int(lengths.max()))
    mask = (torch.arange(shape[1]) < lengths[:, None]) & given
    places, target_ids = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
    old_logprobs, recomputed_logprobs = torch.zeros(shape), torch.zeros(shape)
    stream: list[int] = []
    layout = []
    for members in groups_of(samples):
        group = packed_group([samples[row] for row in members])
        layout.append(group)
        stream += samples[members[0]].prompt_ids[: group.prefix]
        rows = iter(members)
        for count, longest in group.blocks():
            for _, row in zip(range(count), rows, strict=False):
                sample = samples[row]
                branch = (sample.prompt_ids + sample.completion_ids[:-1])[group.prefix :]
                end = len(stream) + len(branch)
                places[row, : lengths[row]] = torch.arange(end - lengths[row], end)
                stream += branch + [0] * (longest - len(branch))
    for row, sample in enumerate(samples):
        target_ids[row, : lengths[row]] = torch.tensor(sample.completion_ids)
        if sample.old_logprobs is not None:
            old_logprobs[row, : lengths[row]] = torch.tensor(sample.old_logprobs)
            recomputed = sample.recomputed_logprobs or sample.old_logprobs
            recomputed_logprobs[row, : lengths[row]] = torch.tensor(recomputed)
    advantages = torch.tensor([sample.advantage for sample in samples])
    tensors = (places, target_ids, mask, old_logprobs, recomputed_logprobs, advantages)
    packed = PackedGroups(layout, device)
    return Batch(torch.tensor([stream], device=device), packed, *(tensor.to(device) for tensor in tensors))


def groups_of(samples: list[Sample]) -> list[list[int]]:
    """Samples that go behind one prefix, as indices, longest first: those of one prompt; all whose prompt is no one else's."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index in sorted(range(len(samples)), key=lambda index: -len(samples[index])):
        by_prompt.setdefault(tuple(samples[index].prompt_ids), []).append(index)
    groups = [members for members in by_prompt.values() if len(members) > 1]
    singles = [members[0] for members in by_prompt.values() if len(members) == 1]
    return groups + [singles] if singles else groups


def packed_group(samples: list[Sample]) -> PackedGroup:
    """The layout of samples behind one prefix: what their prompts have in common, short of a prompt's last id."""
    common = os.path.commonprefix([sample.prompt_ids for sample in samples])
    prefix = min(len(common), min(len(sample.prompt_ids) for sample in samples) - 1)
    return PackedGroup(prefix, [len(sample) - 1 - prefix for sample in samples])


def stream_tokens(samples: list[Sample]) -> int:
    """Tokens that `samples` take in a stream, padding included."""
    return sum(packed_group([samples[row] for row in members]).num_tokens() for members in groups_of(samples))


def micro_batches(samples: list[Sample], token_budget: int) -> list[list[Sample]]:
    """Share `samples` out so that the stream of each micro-batch stays within `token_budget` tokens.

    Samples of one prompt stay together if they fit; the largest part comes first, so that a budget too large for the
    memory fails at once. A sample longer than the budget goes alone.
    """
    parts: list[list[Sample]] = []
    for members in groups_of(samples):
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


def score_completions(model: Qwen3, batch: Batch, temperature: float = 1.0) -> TokenLogprobs:
    """Log-probability of each completion token under `model`, and the entropy there; [rows, time], zero outside the mask.

    The same `token_logprobs` as in the sampler, at the same temperature. Only completion positions go through the
    output head, a few hundred at a time.
    """
    hidden = model.model(batch.input_ids, batch.layout)[0]  # [tokens, hidden]
    hidden = hidden.index_select(0, batch.places[batch.mask])  # [completion tokens, hidden]
    targets = batch.target_ids[batch.mask]
    found = target_logprobs(hidden, model.lm_head.weight, targets, temperature, model.num_tokens)
    return TokenLogprobs(*(x.new_zeros(batch.mask.shape).masked_scatter(batch.mask, x) for x in found))


def completion_logprobs(model: Qwen3, batch: Batch, temperature: float = 1.0) -> Tensor:
    """The first of what `score_completions` gives."""
    return score_completions(model, batch, temperature).logprobs

"""Samples to tensors: the one place that shifts tokens against their targets, and masks what has no loss."""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from model import PackedGroup, PackedGroups, Qwen3, TokenLogprobs, target_logprobs


@dataclass(frozen=True)
class Sample:
    """One completion to learn from. Prompt and completion are joined as ids, not as text."""

    prompt_ids: list[int]
    completion_ids: list[int]
    old_logprobs: list[float] = field(default_factory=list)  # of each completion id; empty for SFT
    advantage: float = 0.0  # of the completion within its group; 0 for SFT

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Batch:
    """Samples as tensors: one stream of tokens for the decoder; for the loss, rows of completion tokens.

    A shared prompt occurs once in the stream, without its last id: that predicts the first id of every
    completion, so it begins each sample's own branch. A completion's last id predicts nothing and is left
    out. For the prompt 1 2 and its completions 3 4 5 and 3 6:

        stream             1 | 2 3 4 | 2 3
        logit_positions    1 2 3   and   4 5
        target_ids         3 4 5   and   3 6

    The mask is made from lengths, never from ids: Qwen3-Base pads with an id that also ends completions.
    """

    input_ids: Tensor  # [1, tokens], int64
    layout: PackedGroups  # which token of the stream attends to which
    logit_positions: Tensor  # [rows, time], int64; position in the stream that predicts the target
    target_ids: Tensor  # [rows, time], int64; the completions, padded on the right
    mask: Tensor  # [rows, time], bool; True where there is a target, the stop token included
    old_logprobs: Tensor  # [rows, time], float32; zero outside the mask; of SFT [rows, 0]
    advantages: Tensor  # [rows], float32


def make_batch(samples: list[Sample], device="cpu") -> Batch:
    """Pack `samples` into a stream; rows keep their order."""
    # 1. The mask, from the lengths.
    lengths = [len(sample.completion_ids) for sample in samples]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]  # [rows, time]

    # 2. The stream: of each group first the shared prefix, then its branches in padded blocks.
    stream: list[int] = []
    layout: list[PackedGroup] = []
    logit_positions = [torch.empty(0)] * len(samples)  # of each row
    for members in packing_groups(samples):
        group = packed_group([samples[row] for row in members])
        layout.append(group)
        stream += samples[members[0]].prompt_ids[: group.prefix_length]
        padded_lengths = [length for rows, length in group.blocks() for _ in range(rows)]
        for row, padded_length in zip(members, padded_lengths, strict=True):
            inputs = samples[row].prompt_ids + samples[row].completion_ids[:-1]
            branch = inputs[group.prefix_length :]
            end = len(stream) + len(branch)
            logit_positions[row] = torch.arange(end - lengths[row], end)
            stream += branch
            stream += [0] * (padded_length - len(branch))

    # 3. The targets, and what goes with them.
    target_ids = [torch.tensor(sample.completion_ids) for sample in samples]
    old_logprobs = [torch.tensor(sample.old_logprobs) for sample in samples]
    advantages = [sample.advantage for sample in samples]
    return Batch(
        input_ids=torch.tensor([stream], device=device),
        layout=PackedGroups(layout, device),
        logit_positions=pad_sequence(logit_positions, batch_first=True).to(device),
        target_ids=pad_sequence(target_ids, batch_first=True).to(device),
        mask=mask.to(device),
        old_logprobs=pad_sequence(old_logprobs, batch_first=True).to(device),
        advantages=torch.tensor(advantages, device=device),
    )


def packing_groups(samples: list[Sample]) -> list[list[int]]:
    """Indices of samples that share a prompt, longest first; the others form one group."""
    longest_first = sorted(range(len(samples)), key=lambda row: len(samples[row]), reverse=True)
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for row in longest_first:
        prompt = tuple(samples[row].prompt_ids)
        by_prompt.setdefault(prompt, []).append(row)
    groups = [members for members in by_prompt.values() if len(members) > 1]
    alone = [members[0] for members in by_prompt.values() if len(members) == 1]
    if alone:
        groups.append(alone)
    return groups


def packed_group(samples: list[Sample]) -> PackedGroup:
    """The layout of samples behind their common prefix, which leaves each prompt its last id."""
    prompts = [sample.prompt_ids for sample in samples]
    shortest = min(len(prompt) for prompt in prompts)
    prefix_length = min(common_length(prompts), shortest - 1)
    return PackedGroup(prefix_length, [len(sample) - 1 - prefix_length for sample in samples])


def common_length(prompts: list[list[int]]) -> int:
    """How many ids all `prompts` begin with. In sorted order, the first and the last differ the earliest."""
    first = min(prompts)
    last = max(prompts)
    length = min(len(first), len(last))
    while first[:length] != last[:length]:
        length -= 1
    return length


def stream_tokens(samples: list[Sample]) -> int:
    """Tokens of the stream of `samples`, padding included."""
    tokens = 0
    for members in packing_groups(samples):
        group = packed_group([samples[row] for row in members])
        tokens += group.stream_tokens()
    return tokens


def micro_batches(samples: list[Sample], token_budget: int) -> list[list[Sample]]:
    """Divide `samples` so that the stream of each micro-batch has at most `token_budget` tokens.

    Samples of one prompt stay together if they fit; a sample longer than the budget goes alone. The largest
    part comes first, so that a budget too large for the memory fails at once.
    """
    parts: list[list[Sample]] = []
    for members in packing_groups(samples):
        parts += joined([[samples[row]] for row in members], token_budget)
    parts.sort(key=stream_tokens, reverse=True)
    return joined(parts, token_budget)


def joined(parts: list[list[Sample]], token_budget: int) -> list[list[Sample]]:
    """Put neighbours together for as long as their stream has at most `token_budget` tokens."""
    batches: list[list[Sample]] = []
    for part in parts:
        if batches and stream_tokens(batches[-1] + part) <= token_budget:
            batches[-1] += part
        else:
            batches.append(part)
    return batches


def logprobs_and_entropy(model: Qwen3, batch: Batch, temperature: float = 1.0) -> TokenLogprobs:
    """Log-probability of each completion token, and the entropy there; [rows, time], zero outside the mask.

    As in the sampler, but only completion positions go through the output head, a few at a time.
    """
    hidden = model.model(batch.input_ids, cache=batch.layout)[0]  # [tokens, hidden]
    hidden = hidden.index_select(0, batch.logit_positions[batch.mask])  # [completion tokens, hidden]
    targets = batch.target_ids[batch.mask]
    found = target_logprobs(hidden, model.lm_head.weight, targets, temperature, model.num_tokens)
    return TokenLogprobs(
        logprobs=in_rows(found.logprobs, batch.mask), entropy=in_rows(found.entropy, batch.mask)
    )


def in_rows(values: Tensor, mask: Tensor) -> Tensor:
    """One value per completion token to [rows, time]."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def completion_logprobs(model: Qwen3, batch: Batch, temperature: float = 1.0) -> Tensor:
    """The log-probabilities of `logprobs_and_entropy`."""
    return logprobs_and_entropy(model, batch, temperature).logprobs


score_completions = logprobs_and_entropy  # its earlier name, which tests/test_frozen.py keeps

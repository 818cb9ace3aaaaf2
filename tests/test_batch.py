"""Samples to batches, the one place that shifts and masks; log-probabilities of sampler and trainer."""

from unittest import mock

import numpy as np
import pytest
import torch
from helpers import assert_close, gradients, largest, largest_gap, ragged_samples, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import FAMILIES, SHAPES, reference_model, same_weights

import rl.batch
from model import PackedGroup
from rl.batch import (
    Sample,
    completion_logprobs,
    make_batch,
    micro_batches,
    packed_group,
    packing_groups,
    stream_tokens,
)

PAD = 0  # what make_batch fills with


def test_shift_and_mask_by_hand():
    """Prompt 5 6 with completions 7 0 and 1 2 3 4, and prompt 9 with completion 7: the shared prompt stands
    once.

    The id 0, which ends a completion here, has a loss, and the padding with the same id has none.
    """
    samples = [Sample([5, 6], [7, PAD], [-0.7, -0.8], 1.5), Sample([9], [7], [-0.1], 0.5)]
    batch = make_batch([*samples, Sample([5, 6], [1, 2, 3, 4], [-1, -2, -3, -4], -0.5)])
    # prefix 5; then 6 1 2 3, which predict 1 2 3 4; then 6 7, which predict 7 0; and 9, which predicts 7
    assert batch.input_ids.tolist() == [[5, 6, 1, 2, 3, 6, 7, 9]]
    assert batch.layout.positions.tolist() == [[0, 1, 2, 3, 4, 1, 2, 0]]
    assert batch.logit_positions.tolist() == [[5, 6, 0, 0], [7, 0, 0, 0], [1, 2, 3, 4]]
    assert batch.target_ids.tolist() == [[7, PAD, PAD, PAD], [7, PAD, PAD, PAD], [1, 2, 3, 4]]
    assert batch.mask.tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    torch.testing.assert_close(
        batch.old_logprobs, torch.tensor([[-0.7, -0.8, 0, 0], [-0.1, 0, 0, 0], [-1, -2, -3, -4]])
    )
    assert batch.advantages.tolist() == [1.5, 0.5, -0.5]
    sft = make_batch([Sample([1], [2, 3])])
    assert not sft.old_logprobs.any()
    assert not sft.advantages.any()
    assert sft.mask.all()


GROUPS = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 30), min_size=1, max_size=6)), min_size=1, max_size=5
)


def grouped_samples(shapes, vocab: int = 48, seed: int = 0) -> list[Sample]:
    """For each (prompt length, completion lengths) samples of one random prompt, all of them shuffled."""
    rng = np.random.default_rng(seed)
    samples = []
    for prompt_length, lengths in shapes:
        prompt = rng.integers(0, vocab, prompt_length).tolist()
        samples += [
            Sample(prompt, rng.integers(0, vocab, n).tolist(), rng.normal(-4, 1, n).tolist(), 1.0)
            for n in lengths
        ]
    return [samples[i] for i in rng.permutation(len(samples))]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(0, 10_000), GROUPS)
def test_shared_prompts_change_neither_loss_nor_gradient(seed, shapes):
    """Against every sample alone in a plain forward, in float64."""
    model = random_model(dtype=torch.float64)
    samples = grouped_samples(shapes, seed=seed)
    weights = [torch.linspace(-1, 2, len(sample.completion_ids), dtype=torch.float64) for sample in samples]
    batch = make_batch(samples)
    logprobs = completion_logprobs(model, batch)
    loss = sum(
        (row[mask] * weight).sum() for row, mask, weight in zip(logprobs, batch.mask, weights, strict=True)
    )
    loss.backward()
    packed = gradients(model)
    plain = 0
    for sample, weight in zip(samples, weights, strict=True):
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        found = model(ids)[0, len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
        plain = plain + (found.gather(-1, torch.tensor(sample.completion_ids)[:, None])[:, 0] * weight).sum()
    plain.backward()
    assert abs(loss.item() - plain.item()) < 1e-9
    assert largest_gap(packed, gradients(model)) < 1e-9 < largest(packed)


def test_prompts_that_begin_alike_share_their_beginning():
    """The last id of a prompt predicts, so it belongs to the branch.

    The stream has the shared beginning once.
    """
    prompt = list(range(1, 21))
    for samples, tokens in (
        ([Sample(prompt, [n, n + 1, n + 2]) for n in range(16)], 19 + 16 * 3),
        ([Sample([n, *prompt], [n, n + 1, n + 2]) for n in range(16)], 16 * 23),
        ([Sample([1, 2, 3, 4], [5, 6]), Sample([1, 2, 7], [8]), Sample([1, 2, 7, 9, 9], [8])], 2 + 3 + 1 + 3),
        ([Sample([1, 2], [5, 6]), Sample([1, 2, 7, 9], [8])], 1 + 2 + 3),
    ):
        assert make_batch(samples).input_ids.shape == (1, tokens)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_completion_logprobs_equal_those_of_transformers(temperature, tied, family):
    """Ids past `num_tokens`, which take no part, are cut off transformers' logits by hand.

    The padding id is sampled too.
    """
    theirs = reference_model(family=family, vocab_size=48, hidden_size=48, tie_word_embeddings=tied)
    ours = same_weights(theirs)
    ours.num_tokens = 40
    samples = [*ragged_samples(5, vocab=40), Sample([5, 6], [PAD, 7, PAD, PAD])]
    batch = make_batch(samples)
    logprobs = completion_logprobs(ours, batch, temperature)
    for row, sample in enumerate(samples):
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        with torch.no_grad():
            expected = (theirs(ids).logits[0, :-1, :40].double() / temperature).log_softmax(-1)
        expected = expected[torch.arange(len(expected)), ids[0, 1:]][len(sample.prompt_ids) - 1 :].float()
        assert_close(logprobs[row][batch.mask[row]], expected, atol=2e-5)
    assert not logprobs[~batch.mask].any()


@pytest.mark.parametrize("name", ["grouped_tied", "qwen2", "qwen2_tied", "llama", "smollm2"])
def test_packed_gradients_equal_those_of_transformers(name):
    theirs = reference_model(**SHAPES[name])
    ours = same_weights(theirs)
    samples = grouped_samples([(5, [4, 1, 7]), (3, [2, 2]), (1, [6])], vocab=83)
    batch = make_batch(samples)
    completion_logprobs(ours, batch)[batch.mask].sum().backward()
    packed = gradients(ours)
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        logprobs = theirs(ids).logits[0, len(sample.prompt_ids) - 1 : -1].log_softmax(-1)
        logprobs.gather(-1, torch.tensor(sample.completion_ids)[:, None]).sum().backward()
    plain = gradients(theirs)
    assert packed.keys() == plain.keys()
    for parameter, expected in plain.items():
        assert (packed[parameter] - expected).norm() <= 1e-3 * expected.norm(), parameter


def test_only_completion_tokens_go_through_the_output_head(monkeypatch):
    head = mock.Mock(wraps=rl.batch.target_logprobs)
    monkeypatch.setattr(rl.batch, "target_logprobs", head)
    completion_logprobs(random_model(), make_batch([Sample([5] * 20, [7, 8, 9]), Sample([1], [2])]))
    assert [len(call.args[0]) for call in head.call_args_list] == [4]


@settings(deadline=None, derandomize=True)
@given(GROUPS, st.integers(1, 600))
def test_micro_batches_keep_every_sample_within_the_budget(shapes, budget):
    """They are hardly padded, too."""
    samples = grouped_samples(shapes)
    batches = micro_batches(samples, budget)
    assert sorted(map(id, samples)) == sorted(id(sample) for batch in batches for sample in batch)
    for batch in batches:
        tokens = make_batch(batch).input_ids.shape[1]
        assert tokens == stream_tokens(batch)
        assert len(batch) == 1 or tokens <= budget
        used = sum(len(sample) - 1 for sample in batch)
        for members in packing_groups(batch):
            used -= (len(members) - 1) * packed_group([batch[row] for row in members]).prefix_length
        assert used <= tokens < used / 0.95 + 1e-9


def test_branches_of_nearly_equal_length_are_one_block():
    assert PackedGroup(3, [100, 99, 98, 97, 50, 50, 49, 2]).blocks() == [(4, 100), (3, 50), (1, 2)]
    assert PackedGroup(3, [100, 99, 98, 97, 50, 50, 49, 2]).num_tokens() == 3 + 400 + 150 + 2


def test_a_group_that_fits_is_not_divided():
    """The micro-batch with the largest part comes first."""
    samples = [Sample([1] * 6, [2] * 9) for _ in range(8)]
    for budget, expected in ((77, [8]), (76, [7, 1]), (41, [4, 4]), (23, [2, 2, 2, 2]), (14, [1] * 8)):
        assert [len(batch) for batch in micro_batches(samples, budget)] == expected
    samples = [Sample([1] * 2, [2] * 2), Sample([2] * 20, [2] * 20), Sample([3] * 3, [2] * 3)]
    assert [[len(sample) for sample in batch] for batch in micro_batches(samples, 8)] == [[40], [6, 4]]
    assert micro_batches([], 12) == []

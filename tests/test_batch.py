"""Samples to batches, the one place that shifts and masks; log-probabilities of sampler and trainer."""

from unittest import mock

import numpy as np
import pytest
import torch
from helpers import assert_close, gradients, largest, largest_gap, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import SHAPES, logprobs_after, reference_model, same_weights

import rl.batch
from model import PackedGroup
from rl.batch import Sample, completion_logprobs, make_batch, micro_batches, stream_tokens

PAD = 0  # what make_batch fills with


def test_shift_and_mask_by_hand():
    """The shared prompt comes once. An id 0 that ends a completion has a loss; padding with it has none."""
    samples = [
        Sample([5, 6], [7, PAD], [-0.7, -0.8], 1.5),
        Sample([9], [7], [-0.1], 0.5),
        Sample([5, 6], [1, 2, 3], [-1, -2, -3], -0.5),
    ]
    batch = make_batch(samples)
    # prefix 5; then 6 1 2, which predict 1 2 3; then 6 7, which predict 7 0; and 9, which predicts 7
    assert batch.input_ids.tolist() == [[5, 6, 1, 2, 6, 7, 9]]
    assert batch.layout.positions.tolist() == [[0, 1, 2, 3, 1, 2, 0]]
    assert batch.logit_positions.tolist() == [[4, 5, 0], [6, 0, 0], [1, 2, 3]]
    assert batch.target_ids.tolist() == [[7, PAD, PAD], [7, PAD, PAD], [1, 2, 3]]
    assert batch.mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    assert torch.equal(batch.old_logprobs, torch.tensor([[-0.7, -0.8, 0], [-0.1, 0, 0], [-1, -2, -3]]))
    assert batch.advantages.tolist() == [1.5, 0.5, -0.5]


def test_a_batch_for_sft_has_neither_old_logprobs_nor_advantages():
    batch = make_batch([Sample([1], [2, 3])])
    assert not batch.old_logprobs.any()
    assert not batch.advantages.any()
    assert batch.mask.all()


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=4)
GROUPS = st.lists(st.tuples(st.integers(1, 6), LENGTHS), min_size=1, max_size=4)


def grouped_samples(shapes, seed: int = 0) -> list[Sample]:
    """For each (prompt length, completion lengths) samples of one random prompt, all of them shuffled."""
    rng = np.random.default_rng(seed)
    samples = []
    for prompt_length, lengths in shapes:
        prompt = rng.integers(0, 40, prompt_length).tolist()
        for length in lengths:
            completion = rng.integers(0, 40, length).tolist()
            samples.append(Sample(prompt, completion))
    rng.shuffle(samples)
    return samples


@settings(deadline=None, derandomize=True, max_examples=12)
@given(st.integers(0, 10_000), GROUPS)
def test_shared_prompts_change_neither_loss_nor_gradient(seed, shapes):
    """Against every sample alone in a plain forward, in float64."""
    model = random_model(dtype=torch.float64)
    samples = grouped_samples(shapes, seed)
    batch = make_batch(samples)
    weights = torch.linspace(-1, 2, batch.mask.shape[1], dtype=torch.float64)
    loss = (completion_logprobs(model, batch) * weights).sum()
    loss.backward()
    packed = gradients(model)
    plain = 0
    for sample in samples:
        logprobs = logprobs_after(model, sample.prompt_ids, sample.completion_ids)
        plain = plain + (logprobs * weights[: len(logprobs)]).sum()
    plain.backward()
    assert abs(loss.item() - plain.item()) < 1e-9
    assert largest_gap(packed, gradients(model)) < 1e-9 < largest(packed)


def test_prompts_that_begin_alike_share_their_beginning():
    """The last id of a prompt predicts, so it belongs to the branch."""
    assert stream_tokens([Sample([1] * 20, [2] * 3)] * 16) == 19 + 16 * 3
    short, long, other = Sample([1, 2], [5, 6]), Sample([1, 2, 7, 9], [8]), Sample([2, 2], [5])
    assert stream_tokens([short, long]) == 1 + 2 + 3
    assert stream_tokens([short, other]) == 3 + 2


@pytest.mark.parametrize(
    ("name", "temperature"), [("grouped_tied", 1.0), ("one_kv_head", 0.7), ("qwen2", 1.3), ("llama", 0.7)]
)
def test_completion_logprobs_and_gradients_equal_transformers(name, temperature):
    """Ids past `num_tokens` take no part. The padding id is sampled too."""
    theirs = reference_model(**SHAPES[name])
    ours = same_weights(theirs)
    ours.num_tokens = 40
    samples = grouped_samples([(5, [4, 1, 7]), (3, [2, 2]), (1, [6])])
    samples.append(Sample([5, 6], [PAD, 7, PAD, PAD]))
    batch = make_batch(samples)
    logprobs = completion_logprobs(ours, batch, temperature)
    logprobs.sum().backward()
    for row, sample in enumerate(samples):
        expected = logprobs_after(theirs, sample.prompt_ids, sample.completion_ids, temperature, 40)
        expected.sum().backward()
        assert_close(logprobs[row, batch.mask[row]].double(), expected, atol=2e-5)
    assert not logprobs[~batch.mask].any()
    packed = gradients(ours)
    plain = gradients(theirs)
    assert packed.keys() == plain.keys()
    for parameter, expected in plain.items():
        assert (packed[parameter] - expected).norm() <= 1e-3 * expected.norm(), parameter


def test_only_completion_tokens_go_through_the_output_head(monkeypatch):
    head = mock.Mock(wraps=rl.batch.target_logprobs)
    monkeypatch.setattr(rl.batch, "target_logprobs", head)
    samples = [Sample([5] * 20, [7, 8, 9]), Sample([1], [2])]
    completion_logprobs(random_model(), make_batch(samples))
    assert len(head.call_args.args[0]) == 4


@settings(deadline=None, derandomize=True, max_examples=40)
@given(GROUPS, st.integers(1, 150))
def test_micro_batches_keep_every_sample_within_the_budget(shapes, budget):
    samples = grouped_samples(shapes)
    batches = micro_batches(samples, budget)
    assert sorted(map(id, samples)) == sorted(id(sample) for batch in batches for sample in batch)
    for batch in batches:
        tokens = make_batch(batch).input_ids.numel()
        assert tokens == stream_tokens(batch)
        assert len(batch) == 1 or tokens <= budget


def test_branches_of_nearly_equal_length_are_one_block():
    group = PackedGroup(3, [100, 99, 98, 97, 50, 50, 49, 2])
    assert group.blocks() == [(4, 100), (3, 50), (1, 2)]
    assert group.stream_tokens() == 3 + 400 + 150 + 2


@pytest.mark.parametrize(("budget", "expected"), [(77, [8]), (76, [7, 1]), (41, [4, 4]), (14, [1] * 8)])
def test_a_group_that_fits_is_not_divided(budget, expected):
    samples = [Sample([1] * 6, [2] * 9)] * 8
    assert [len(batch) for batch in micro_batches(samples, budget)] == expected


def test_the_micro_batch_with_the_largest_part_comes_first():
    short, long = Sample([1], [2]), Sample([1] * 20, [2])
    assert micro_batches([short, short, long], 8) == [[long], [short, short]]
    assert micro_batches([], 12) == []

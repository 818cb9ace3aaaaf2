"""The one place that shifts and masks, and the log-probabilities that sampler and trainer must agree on."""

import numpy as np
import pytest
import torch
from helpers import gradients, largest, largest_gap, ragged_samples, random_model, rollouts
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_model, same_weights

from model import generate
from rl import sft_loss
from rl.batch import Sample, completion_logprobs, make_batch, micro_batches
from rl.grpo import group_samples

PAD = 0  # what make_batch fills with


def test_shift_and_mask_by_hand():
    """Prompt 5 6 with completion 7 8, beside prompt 9 with completion 1 2 3 4."""
    batch = make_batch([Sample([5, 6], [7, 8], [-0.7, -0.8], 1.5), Sample([9], [1, 2, 3, 4], [-1, -2, -3, -4], -0.5)])
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 1, 2, 3]]
    assert batch.target_ids.tolist() == [[6, 7, 8, PAD], [1, 2, 3, 4]]
    assert batch.mask.tolist() == [[False, True, True, False], [True, True, True, True]]
    torch.testing.assert_close(batch.old_logprobs, torch.tensor([[0, -0.7, -0.8, 0], [-1, -2, -3, -4]]))
    assert batch.advantages.tolist() == [1.5, -0.5]
    dtypes = [tensor.dtype for tensor in vars(batch).values()]
    assert dtypes == [torch.int64, torch.int64, torch.bool, torch.float32, torch.float32]


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_masked_targets_are_the_completions_and_nothing_else(seed, count):
    samples = ragged_samples(count, seed)
    batch = make_batch(samples)
    for row, sample in enumerate(samples):
        assert batch.target_ids[row][batch.mask[row]].tolist() == sample.completion_ids
        np.testing.assert_allclose(batch.old_logprobs[row][batch.mask[row]], sample.old_logprobs, rtol=1e-6)
        end = len(sample) - 1
        assert batch.input_ids[row, :end].tolist() == (sample.prompt_ids + sample.completion_ids)[:-1]
    assert not batch.old_logprobs[~batch.mask].any()


def test_sft_samples_have_no_old_logprobs():
    batch = make_batch([Sample([1], [2, 3])])
    assert not batch.old_logprobs.any() and not batch.advantages.any() and batch.mask.all()


def test_the_first_eos_is_learned_and_padding_is_not_trap_pad_is_eos():
    """Completions that end with the id that also pads: masked by id, EOS would never get gradient."""
    model = random_model(dtype=torch.float64)
    short, long = Sample([5, 6], [7, PAD]), Sample([9, 3], [1, 2, 3, 4, 5, PAD])
    batch = make_batch([short, long])
    assert batch.mask.sum(1).tolist() == [2, 6]
    assert batch.target_ids[0][batch.mask[0]].tolist() == [7, PAD]

    def gradient(samples):
        batch = make_batch(samples)
        sft_loss(completion_logprobs(model, batch), batch.mask, denominator=1.0).backward()
        return gradients(model)

    both, alone, other = gradient([short, long]), gradient([short]), gradient([long])
    assert largest_gap(both, {name: alone[name] + other[name] for name in both}) < 1e-6  # padding adds nothing
    without_eos = gradient([Sample([5, 6], [7])])
    assert largest_gap(alone, without_eos) > 0.01 * largest(alone)  # EOS adds something


def test_a_sampled_pad_id_keeps_its_logprob_trap_ignore_index():
    model = random_model()
    batch = make_batch([Sample([5, 6], [PAD, 7, PAD, PAD]), Sample([5], [1])])
    logprobs = completion_logprobs(model, batch)
    plain = model(batch.input_ids).log_softmax(-1).gather(-1, batch.target_ids[..., None])[..., 0]
    assert (batch.mask & (batch.target_ids == PAD)).sum() == 3
    torch.testing.assert_close(logprobs[batch.mask], plain[batch.mask], rtol=0, atol=1e-5)
    assert (logprobs[batch.mask] < -0.01).all() and not logprobs[~batch.mask].any()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_completion_logprobs_equal_a_plain_log_softmax_of_transformers(temperature, tied):
    """Ids past `num_tokens` have no text and take no part; in transformers' logits they are cut off by hand."""
    theirs = reference_model(vocab_size=48, tie_word_embeddings=tied)
    ours = same_weights(theirs)
    ours.num_tokens = 40
    samples = ragged_samples(5, vocab=40)
    batch = make_batch(samples)
    logprobs = completion_logprobs(ours, batch, temperature)
    for row, sample in enumerate(samples):
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        with torch.no_grad():
            expected = (theirs(ids).logits[0, :-1, :40].double() / temperature).log_softmax(-1)
        expected = expected[torch.arange(len(expected)), ids[0, 1:]][len(sample.prompt_ids) - 1 :].float()
        torch.testing.assert_close(logprobs[row][batch.mask[row]], expected, rtol=0, atol=2e-5)
    assert not logprobs[~batch.mask].any()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_ratio_on_a_fresh_rollout_batch_is_one_trap_scored_at_another_temperature(temperature):
    """Sampler with its cache and trainer with its padding give the same number for each token, at their temperature.

    The model puts most of its mass on ids past its last token, so a trainer that forgot to cut them off would show.
    """
    model = random_model(std=0.5, tie_word_embeddings=False)
    model.num_tokens = 40
    with torch.no_grad():
        model.lm_head.weight[40:] *= 4
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [4]]
    completions = generate(
        model, prompts, num_samples=8, max_new_tokens=12, temperature=temperature, stop_token_ids=[0, 1, 2, 3], seed=3
    )
    groups = rollouts(completions, [[1.0, 0.0, 0.1, 0.3] * 2] * 4, prompts)
    samples = [sample for group in group_samples(groups) for sample in group]
    lengths = {len(sample.completion_ids) for sample in samples}
    assert len(lengths) > 3 and max(id_ for sample in samples for id_ in sample.completion_ids) < 40

    def largest_difference(**options):
        gaps = []
        for micro in micro_batches(samples, 60):
            batch = make_batch(micro)
            gap = completion_logprobs(model, batch, **options) - batch.old_logprobs
            gaps.append(gap.abs().max().item())
        return max(gaps)

    assert largest_difference(temperature=temperature) < 1e-4
    assert largest_difference(temperature=1.7 - temperature) > 0.1
    model.num_tokens = 48
    assert largest_difference(temperature=temperature) > 0.1


def test_no_logits_are_made_for_prompts_and_padding_trap_out_of_memory():
    model = random_model()
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    completion_logprobs(model, make_batch([Sample([5] * 20, [7, 8, 9]), Sample([1], [2])]))
    assert seen == [(4, 48)]


SAMPLES = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), max_size=20)


@settings(deadline=None, derandomize=True)
@given(SAMPLES, st.integers(1, 200))
def test_micro_batches_lose_no_sample_and_keep_to_the_budget(shapes, budget):
    samples = [Sample([number] * prompt, [number] * completion) for number, (prompt, completion) in enumerate(shapes)]
    batches = micro_batches(samples, budget)
    assert sorted(sample.prompt_ids[0] for batch in batches for sample in batch) == list(range(len(samples)))
    for batch in batches:
        assert batch and (len(batch) == 1 or len(batch) * max(map(len, batch)) <= budget)
    if batches:
        assert max(map(len, batches[0])) == max(map(len, samples))  # the largest row comes first


def test_a_sample_longer_than_the_budget_goes_alone():
    samples = [Sample([1] * 2, [2] * 2), Sample([1] * 20, [2] * 20), Sample([1] * 3, [2] * 3)]
    assert [[len(sample) for sample in batch] for batch in micro_batches(samples, 12)] == [[40], [6, 4]]
    assert micro_batches([], 12) == []


def test_samples_share_a_micro_batch_as_long_as_they_fit():
    samples = [Sample([1], [2] * 9) for _ in range(8)]
    for budget, expected in ((80, [8]), (79, [7, 1]), (40, [4, 4]), (20, [2, 2, 2, 2]), (10, [1] * 8)):
        assert [len(batch) for batch in micro_batches(samples, budget)] == expected

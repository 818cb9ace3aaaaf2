"""Micro-batches that halve when memory runs out: the gradient is the same, and only memory errors are taken for such."""

import copy
import resource

import pytest
import torch
from helpers import gradients, largest, largest_gap, learner, ragged_samples, random_model, rollouts

from model import generate
from rl import sft_loss
from rl.batch import completion_logprobs, score_completions
from rl.grpo import group_samples, grpo_update
from rl.learner import out_of_memory
from lab.recipe import GRPOStage

SAMPLES = ragged_samples(12, seed=3)
MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
]


def backward_with_room_for(model, room: int, error: Exception, tried: list[int]):
    """A backward that fails, half done, on more tokens than `room`."""

    def backward(batch):
        tokens = batch.input_ids.shape[1]
        tried.append(tokens)
        loss = sft_loss(completion_logprobs(model, batch), batch.mask, 100.0)
        loss.backward()
        if tokens > room:
            raise error
        return {"loss": loss.item(), "tokens": int(batch.mask.sum())}

    return backward


@pytest.mark.parametrize("error", MEMORY_ERRORS, ids=["cuda", "cpu"])
def test_out_of_memory_halves_the_micro_batches_and_leaves_the_same_gradient(error):
    """Micro-batches fail with their gradient already added, the second as well as the first: none of it may stay."""
    model = random_model(dtype=torch.float64)
    expected = learner(model, 10_000).accumulate(SAMPLES, backward_with_room_for(model, 10_000, error, []))
    whole = gradients(model)
    pupil, tried = learner(model, 120), []
    found = pupil.accumulate(SAMPLES, backward_with_room_for(model, 40, error, tried))
    assert pupil.micro_batch_tokens == 30 and [tokens > 40 for tokens in tried[:3]] == [True, True, False]
    assert found == pytest.approx(expected) and found["tokens"] == sum(len(s.completion_ids) for s in SAMPLES)
    assert largest_gap(gradients(model), whole) < 1e-12 < largest(whole)
    # The size that worked is where the next update begins.
    tried.clear()
    pupil.accumulate(SAMPLES, backward_with_room_for(model, 40, error, tried))
    assert max(tried) <= 40


def test_one_sample_too_large_is_an_error():
    model, tried = random_model(), []
    with pytest.raises(torch.OutOfMemoryError):
        learner(model, 120).accumulate(SAMPLES, backward_with_room_for(model, 3, MEMORY_ERRORS[0], tried))
    assert len(tried) < 12


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    model, tried = random_model(), []
    with pytest.raises(RuntimeError, match="a bug"):
        learner(model, 120).accumulate(SAMPLES, backward_with_room_for(model, 40, RuntimeError("a bug"), tried))
    assert len(tried) == 1


def test_what_torch_raises_on_a_cpu_is_recognised():
    """An allocation that the system refuses: the address space is limited for a moment."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**35, hard))
    try:
        with pytest.raises(RuntimeError) as caught:
            torch.empty(2**37, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert out_of_memory(caught.value)


def test_an_update_goes_on_after_out_of_memory(monkeypatch):
    model = random_model()
    twin = copy.deepcopy(model)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8]]
    completions = generate(model, prompts, num_samples=4, max_new_tokens=8, stop_token_ids=[0, 1, 2], seed=1)
    groups = rollouts(completions, [[1.0, 0.0, 0.1, 0.1]] * 3, prompts)
    stage = GRPOStage(updates_per_step=3, prompts_per_step=3)
    expected = grpo_update(learner(twin, 1000), group_samples(groups), stage, 1e-3)

    pupil = learner(model, 100)

    def failing(decoder, batch, temperature):
        if batch.input_ids.shape[1] > 20:
            raise MEMORY_ERRORS[0]
        return score_completions(decoder, batch, temperature)

    monkeypatch.setattr("rl.grpo.score_completions", failing)
    found = grpo_update(pupil, group_samples(groups), stage, 1e-3)
    assert found.pop("micro_batch_tokens") == 12 and expected.pop("micro_batch_tokens") == 1000
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    ours, theirs = (dict(m.named_parameters()) for m in (model, twin))
    assert largest_gap(ours, theirs) < 1e-6

"""Log-probabilities and entropy, from a few logits at a time, are those of the plain way."""

import copy

import pytest
import torch
from helpers import assert_close, gradients, largest, largest_gap, random_model
from hypothesis import given, settings
from hypothesis import strategies as st

import model.logprobs
import model.sampler
from model import target_logprobs, token_logprobs

VOCAB, NUM_TOKENS, HIDDEN = 50, 43, 12


def inputs(tokens: int, seed: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (
        torch.randn(n, HIDDEN, generator=generator, dtype=dtype).requires_grad_() for n in (tokens, VOCAB)
    )
    targets = torch.randint(NUM_TOKENS, (tokens,), generator=generator)
    on_logprobs, on_entropy = torch.randn(2, tokens, generator=generator, dtype=dtype)
    return hidden, weight, targets, on_logprobs, on_entropy


def plain_way(hidden, weight, targets, temperature, num_tokens=NUM_TOKENS):
    distribution = (hidden @ weight.T)[:, :num_tokens].div(temperature).log_softmax(-1)
    return distribution[torch.arange(len(targets)), targets], -(distribution.exp() * distribution).sum(-1)


@settings(deadline=None, derandomize=True)
@given(
    st.integers(0, 40),
    st.integers(0, 1000),
    st.sampled_from([1.0, 0.7, 2.5]),
    st.integers(1, 9),
    st.integers(1, 5),
)
def test_values_and_gradients_are_those_of_the_plain_way(tokens, seed, temperature, chunk, at_once):
    """In float64, in chunks of any size; with a gradient on both results and on one only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.logprobs.CHUNK_LOGITS, "cpu", chunk * VOCAB)
        patch.setattr(model.sampler, "CPU_LOGITS", at_once * VOCAB)
        hidden, weight, targets, on_logprobs, on_entropy = inputs(tokens, seed)
        expected = plain_way(hidden, weight, targets, temperature)
        found = target_logprobs(hidden, weight, targets, temperature, NUM_TOKENS)
        for ours, plain in zip(found, expected, strict=True):
            assert_close(ours, plain, atol=1e-10)
        for uses in ((on_logprobs, on_entropy), (on_logprobs, 0 * on_entropy), (0 * on_logprobs, on_entropy)):
            losses = (sum((x * use).sum() for x, use in zip(pair, uses)) for pair in (found, expected))
            grads = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for loss in losses)
            for ours, plain in zip(*grads, strict=True):
                assert_close(ours, plain, atol=1e-10)


def test_bfloat16_gives_float32_results_and_bfloat16_gradients():
    hidden, weight, targets, on_logprobs, _ = inputs(9, 0, torch.bfloat16)
    logprobs, entropy = target_logprobs(hidden, weight, targets, 1.0, NUM_TOKENS)
    expected = token_logprobs(hidden @ weight.T, 1.0, NUM_TOKENS)
    assert torch.equal(logprobs, expected.gather(-1, targets[:, None])[:, 0])
    assert entropy.dtype == torch.float32
    (logprobs * on_logprobs.float()).sum().backward()
    exact = inputs(9, 0, torch.bfloat16)[:2]
    doubles = [x.detach().double().requires_grad_() for x in exact]
    (plain_way(*doubles, targets, 1.0)[0] * on_logprobs.double()).sum().backward()
    for ours, plain in zip((hidden, weight), doubles, strict=True):
        assert ours.grad.dtype == torch.bfloat16
        torch.testing.assert_close(
            ours.grad.double(), plain.grad, rtol=0.02, atol=0.02 * plain.grad.abs().max().item()
        )


def test_never_more_than_a_chunk_of_logits_exists(monkeypatch):
    """Of all tensors made in forward and backward; those with HIDDEN rows are the weights, transposed."""
    monkeypatch.setitem(model.logprobs.CHUNK_LOGITS, "cpu", 4 * VOCAB)
    hidden, weight, targets, *_ = inputs(30, 0)
    sizes = []

    class Recording(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (VOCAB,) and len(result) != HIDDEN:
                sizes.append(result.shape[0])
            return result

    with Recording():
        target_logprobs(hidden, weight, targets, 1.0, NUM_TOKENS).logprobs.sum().backward()
    assert max(sizes) == 4


def test_a_frozen_output_head_gets_no_gradient():
    hidden, weight, targets, *_ = inputs(5, 0)
    target_logprobs(hidden, weight.detach(), targets, 1.0, NUM_TOKENS).logprobs.sum().backward()
    (expected,) = torch.autograd.grad(plain_way(hidden, weight, targets, 1.0)[0].sum(), hidden)
    assert_close(hidden.grad, expected, atol=1e-12)
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_activation_checkpointing_changes_memory_alone(dtype):
    """It keeps less, and the gradients are the same."""
    plain = random_model(dtype=dtype, num_hidden_layers=6)
    lean = copy.deepcopy(plain)
    lean.model.checkpoint_activations = True
    ids = torch.randint(48, (3, 17), generator=torch.Generator().manual_seed(0))
    held = []  # bytes kept for backward
    for decoder in (plain, lean):
        storages = {}

        def keep(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = decoder(ids).log_softmax(-1)[..., 5].sum()
        loss.backward()
        held.append(sum(storages.values()))
    ours, theirs = gradients(plain), gradients(lean)
    assert largest_gap(ours, theirs) < 1e-6 * largest(ours)
    assert held[1] < 0.6 * held[0]

"""Log-probabilities and entropy, from a few logits at a time, are those of the plain way."""

import copy
from functools import partial

import pytest
import torch
from helpers import gradients, kept_for_backward, largest, largest_gap, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import model.logprobs
import model.sampler
from model import target_logprobs, token_logprobs

VOCAB, NUM_TOKENS, HIDDEN = 50, 43, 12


def inputs(tokens, dtype=torch.float64):
    """Hidden states, the output head, and targets."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(NUM_TOKENS, (tokens,), generator=generator)


def plain_way(hidden, weight, targets, temperature=1.0):
    distribution = (hidden @ weight.T)[:, :NUM_TOKENS].div(temperature).log_softmax(-1)
    entropy = -(distribution.exp() * distribution).sum(-1)
    return distribution.gather(-1, targets[:, None])[:, 0], entropy


@settings(deadline=None, derandomize=True, max_examples=40)
@given(
    tokens=st.integers(0, 40),
    temperature=st.sampled_from([1.0, 0.7, 2.5]),
    chunk=st.integers(1, 9),
    at_once=st.integers(1, 5),
    parts=st.sampled_from([(1, 2), (1, 0), (0, 1)]),
)
def test_values_and_gradients_are_those_of_the_plain_way(tokens, temperature, chunk, at_once, parts):
    """In float64, in chunks of any size; with a gradient on both results or on one only."""
    hidden, weight, targets = inputs(tokens)
    slopes = torch.linspace(-1, 2, tokens, dtype=torch.float64)

    def gradient(logprobs, entropy):
        loss = ((parts[0] * logprobs + parts[1] * entropy) * slopes).sum()
        return torch.autograd.grad(loss, (hidden, weight))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.logprobs.CHUNK_LOGITS, "cpu", chunk * VOCAB)
        patch.setattr(model.sampler, "CPU_LOGITS", at_once * VOCAB)
        expected = plain_way(hidden, weight, targets, temperature)
        found = target_logprobs(hidden, weight, targets, temperature, NUM_TOKENS)
        torch.testing.assert_close(tuple(found), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(gradient(*found), gradient(*expected), rtol=0, atol=1e-10)


def test_bfloat16_gives_float32_results_and_bfloat16_gradients():
    hidden, weight, targets = inputs(9, dtype=torch.bfloat16)
    logprobs, entropy = target_logprobs(hidden, weight, targets, 1.0, NUM_TOKENS)
    expected = token_logprobs(hidden @ weight.T, 1.0, NUM_TOKENS)
    assert torch.equal(logprobs, expected.gather(-1, targets[:, None])[:, 0])
    assert entropy.dtype == torch.float32
    logprobs.sum().backward()
    doubles = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    plain_way(*doubles, targets)[0].sum().backward()
    for ours, plain in zip((hidden, weight), doubles):
        assert ours.grad.dtype == torch.bfloat16
        assert (ours.grad - plain.grad).norm() < 0.01 * plain.grad.norm()


def test_never_more_than_a_chunk_of_logits_exists(monkeypatch):
    """Of all tensors made in forward and backward; those with HIDDEN rows are the weights, transposed."""
    monkeypatch.setitem(model.logprobs.CHUNK_LOGITS, "cpu", 4 * VOCAB)
    hidden, weight, targets = inputs(30)
    sizes = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (VOCAB,) and len(result) != HIDDEN:
                sizes.append(len(result))
            return result

    with Recording():
        target_logprobs(hidden, weight, targets, 1.0, NUM_TOKENS).logprobs.sum().backward()
    assert max(sizes) == 4


def test_activation_checkpointing_changes_memory_alone():
    """It keeps less, and the gradients are the same."""
    plain = random_model(num_hidden_layers=6)
    lean = copy.deepcopy(plain)
    lean.model.checkpoint_activations = True
    ids = torch.arange(48).view(3, 16)
    kept, found = [], []
    for decoder in (plain, lean):
        kept.append(sum(kept_for_backward(partial(decoder, ids)).values()))
        decoder(ids).log_softmax(-1)[..., 5].sum().backward()
        found.append(gradients(decoder))
    assert largest_gap(*found) < 1e-6 * largest(found[0])
    assert kept[1] < 0.6 * kept[0]

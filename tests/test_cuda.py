"""Model, batch, loss, optimizer and checkpoint on a CUDA device, where there is one, as on the CPU."""

import math
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import PROMPTS, gradients, ragged_samples, random_model
from torch import nn

import lab.check
import lab.decoding
from lab.check import UPDATES, decoding, training, updates
from lab.decoding import Row, check_decoding
from model import ModelError, load_model
from model.cache import BLOCK
from model.quantize import quantized
from rl.batch import logprobs_and_entropy, make_batch
from rl.loss import grpo_loss

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TOLERANCE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_CUDA)])
def device(request) -> torch.device:
    return torch.device(request.param)


def test_a_batch_its_loss_and_gradient_are_those_of_the_cpu(device):
    def learned(place):
        model = random_model().to(place)
        batch = make_batch(ragged_samples(7), place)
        logprobs, entropy = logprobs_and_entropy(model, batch, temperature=0.8)
        loss = grpo_loss(logprobs, batch.old_logprobs, batch.advantages, batch.mask)
        (loss + entropy.mean()).backward()
        return [tensor.cpu() for tensor in (logprobs, loss, *gradients(model).values())]

    torch.testing.assert_close(learned(device), learned("cpu"), **TOLERANCE)


@pytest.fixture
def shallow(monkeypatch):
    """The check with the first layer of the bundled model alone."""

    def load_shallow(*arguments):
        model, tokenizer = load_model(*arguments)
        model.config = model.model.config = replace(model.config, num_hidden_layers=1)
        del model.model.layers[1:]
        return model, tokenizer

    monkeypatch.setattr(lab.check, "load_model", load_shallow)
    monkeypatch.setattr(lab.decoding, "NEW_TOKENS", 24)
    monkeypatch.setitem(BLOCK, "cuda", 16)


@pytest.mark.parametrize("part", [decoding, training, updates])
def test_the_check_finds_nothing_wrong(device, part, shallow):
    rows = list(part("tiny", device))
    assert rows
    assert not any(row.wrong for row in rows), rows


def not_a_number(logits, *arguments):
    return torch.full_like(logits, math.nan)


def of_other_weights(linear):
    return quantized(nn.Linear(*linear.weight.T.shape))


@pytest.mark.parametrize(
    ("part", "target", "broken", "noticed"),
    [
        (training, "model.packed.causal_lower_right", lambda *sizes: None, "training"),
        (updates, "rl.optimizer.round_stochastically", lambda x, key: x.bfloat16(), "stochastic"),
        (updates, "model.quantize.quantized", of_other_weights, "int8"),
        (decoding, "lab.decoding.token_logprobs", not_a_number, "decoding"),
        (decoding, "model.cache.unrounded_matmul", lambda a, b: torch.zeros_like(a @ b), "decoding"),
    ],
)
def test_the_check_names_what_is_broken(part, target, broken, noticed, shallow, monkeypatch):
    monkeypatch.setattr(target, broken)
    monkeypatch.setattr(lab.check, "UPDATES", [update for update in UPDATES if noticed in update.name])
    wrong = [row.what for row in part("tiny", torch.device("cpu")) if row.wrong]
    assert noticed in " ".join(wrong)


def failing(source, device):
    yield Row("first", "0.1 apart")
    yield Row("second", "7 apart", wrong=True)


def raising(source, device):
    raise RuntimeError("no kernel image\nfor this device")


def test_the_check_shows_a_table_and_fails_with_the_wrong_rows(monkeypatch, capsys):
    monkeypatch.setattr(lab.check, "PARTS", (failing, raising))
    with pytest.raises(SystemExit, match="wrong on this device: second; raising"):
        lab.check.main(device="cpu")
    shown = capsys.readouterr().out
    assert "tiny on CPU, torch" in shown
    assert "7 apart" in shown
    assert "RuntimeError: no kernel image" in shown


@pytest.fixture
def on_gpu(monkeypatch):
    """`check_decoding` of a model on a simulated GPU: (said, still with graphs?) for these comparisons."""

    def check(*rows):
        compared = mock.Mock(side_effect=rows)
        monkeypatch.setattr(lab.decoding, "decoding_row", compared)
        model = SimpleNamespace(device=torch.device("cuda"), graphed=True)
        said = check_decoding(model, PROMPTS)
        assert compared.call_count == len(rows)
        return said, model.graphed

    return check


GOOD, BAD = Row("decoding", "0 apart"), Row("decoding", "9 apart", wrong=True)


def test_a_run_on_a_gpu_compares_its_decoding(on_gpu):
    said, graphed = on_gpu(GOOD)
    assert "the same" in said
    assert graphed


@pytest.mark.parametrize(
    ("fault", "reason"), [(BAD, "9 apart"), (RuntimeError("no capturing\nmore"), "no capturing")]
)
def test_where_graphs_fail_a_run_goes_on_without_and_says_so(on_gpu, fault, reason):
    """Also where they disagree with plain forwards."""
    said, graphed = on_gpu(fault, GOOD)
    assert "without CUDA graphs" in said
    assert reason in said
    assert not graphed


def test_decoding_that_is_wrong_without_graphs_ends_the_run(on_gpu):
    with pytest.raises(ModelError, match="9 apart.*make check"):
        on_gpu(BAD, BAD)
    with pytest.raises(torch.OutOfMemoryError):
        on_gpu(torch.OutOfMemoryError("full"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_decoding_is_compared_in_other_dtypes_too(dtype, monkeypatch):
    monkeypatch.setattr(lab.decoding, "NEW_TOKENS", 12)
    assert not lab.decoding.decoding_row(random_model(dtype=dtype), PROMPTS).wrong

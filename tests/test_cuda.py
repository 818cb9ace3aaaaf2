"""Model, batch, loss, optimizer and checkpoint on a CUDA device, where there is one, as on the CPU.

Without a device, fake tensors show that decoding mixes no devices and never waits.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import optimizer_for, ragged_samples, random_model, weights
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import lab.check
import lab.decoding
from lab.check import UPDATES, decoding, training, updates
from lab.decoding import Row, check_decoding
from model import KVCache, ModelError, generate, load_model
from model.quantize import quantized
from model.sampler import DecodeBatch, TokenChoice, random_uniforms, sample_completion
from rl.batch import completion_logprobs, logprobs_and_entropy, make_batch
from rl.loss import grpo_loss

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [2, 7], [1, 8, 2]]
TOLERANCE = dict(rtol=1e-3, atol=1e-3)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_CUDA)])
def device(request) -> torch.device:
    return torch.device(request.param)


def test_logits_are_those_of_the_cpu_with_and_without_a_cache(device):
    ids = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 7, 1, 8, 2, 8]])
    expected, model = random_model()(ids), random_model().to(device)
    torch.testing.assert_close(model(ids.to(device)).cpu(), expected, **TOLERANCE)
    cache = KVCache(model.config, 2, 6, device, model.dtype)
    parts = [model(part, cache) for part in ids.to(device).split([3, 1, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1).cpu(), expected, **TOLERANCE)


@pytest.mark.parametrize("choice", [TokenChoice(), TokenChoice(0.7, 5, 0.9), TokenChoice(0)])
def test_decoding_gives_what_plain_sampling_gives(device, choice):
    """Over two blocks of the cache, and with rows that finish at many lengths."""
    model, stops, length = random_model(std=0.2).to(device), (0, 17), 80
    options = dict(max_new_tokens=length, stop_token_ids=stops, seed=3)
    groups = generate(model, PROMPTS, num_samples=4, **options, **vars(choice))
    uniforms = random_uniforms(PROMPTS, 4, length, 3).to(device)
    for prompt, group, rows in zip(PROMPTS, groups, uniforms, strict=True):
        for completion, row in zip(group, rows, strict=True):
            ids, logprobs = zip(*sample_completion(model, prompt, row, stops, choice))
            assert (completion.token_ids, completion.finished) == (list(ids), ids[-1] in stops)
            assert completion.logprobs == pytest.approx(logprobs, abs=1e-3)


def test_a_batch_its_loss_and_gradient_are_those_of_the_cpu(device):
    def learned(place) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        model = random_model().to(place)
        batch = make_batch(ragged_samples(7), place)
        logprobs, entropy = logprobs_and_entropy(model, batch, temperature=0.8)
        loss = grpo_loss(logprobs, batch.old_logprobs, batch.advantages, batch.mask)
        (loss + entropy.mean()).backward()
        return logprobs.cpu(), loss.cpu(), {name: p.grad.cpu() for name, p in model.named_parameters()}

    torch.testing.assert_close(learned(device), learned("cpu"), **TOLERANCE)


@pytest.mark.parametrize("rounding", ["masters", "stochastic"])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_move_weights_as_on_the_cpu(device, dtype, kind, rounding):
    """After five updates, in the mean over all weights: single ones are rounded by chance."""
    moved = {}
    for place in (device, "cpu"):
        model = random_model(dtype=dtype, hidden_size=64, vocab_size=128).to(place)
        before, optimizer = weights(model), optimizer_for(model, kind=kind, rounding=rounding)
        batch = make_batch(ragged_samples(5), place)
        for _ in range(5):
            completion_logprobs(model, batch)[batch.mask].mean().neg().backward()
            optimizer.step(0.02)
        moved[place] = torch.cat(
            [(new - before[name]).flatten().float().cpu() for name, new in weights(model).items()]
        )
    assert float((moved[device] - moved["cpu"]).norm() / moved["cpu"].norm()) < 0.1


@pytest.mark.parametrize("part", [decoding, training, updates])
def test_the_check_finds_nothing_wrong(device, part):
    rows = list(part("tiny", device))
    assert rows and not any(row.wrong for row in rows), rows


def not_a_number(logits, *arguments):
    return torch.full_like(logits, math.nan)


BROKEN = {  # a part of the check, what is broken, and the rows that have to notice
    "no causal mask": (training, "model.packed.causal_lower_right", lambda *sizes: None, ["training"]),
    "small updates lost": (
        updates,
        "rl.optimizer.round_stochastically",
        lambda x, key: x.bfloat16(),
        ["stochastic"],
    ),
    "int8 weights off": (
        updates,
        "model.quantize.quantized",
        lambda linear: quantized(nn.Linear(*linear.weight.T.shape)),
        ["int8"],
    ),
    "log-probabilities are NaN": (decoding, "lab.decoding.token_logprobs", not_a_number, ["decoding"]),
    "nothing attended to": (
        decoding,
        "model.cache.unrounded_matmul",
        lambda a, b: torch.zeros_like(a @ b),
        ["decoding"],
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_check_names_what_is_broken(what, monkeypatch):
    part, target, broken, rows = BROKEN[what]
    monkeypatch.setattr(target, broken)
    if part is updates:
        monkeypatch.setattr(lab.check, "UPDATES", [update for update in UPDATES if rows[0] in update.name])
    wrong = [row.what for row in part("tiny", torch.device("cpu")) if row.wrong]
    assert wrong and all(name in " ".join(wrong) for name in rows), wrong


def test_the_check_shows_a_table_and_fails_with_the_wrong_rows(monkeypatch, capsys):
    def failing(source, device):
        yield Row("first", "0.1 apart")
        yield Row("second", "7 apart", wrong=True)

    def raising(source, device):
        raise RuntimeError("no kernel image\nfor this device")

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

    def check(*rows: Row | Exception) -> tuple[str, bool]:
        left = list(rows)

        def compared(model, prompts) -> Row:
            row = left.pop(0)
            if isinstance(row, Exception):
                raise row
            return row

        monkeypatch.setattr(lab.decoding, "decoding_row", compared)
        model = SimpleNamespace(device=torch.device("cuda"), graphed=True)
        said = check_decoding(model, PROMPTS)
        assert not left
        return said, model.graphed

    return check


GOOD, BAD = Row("decoding", "0 apart"), Row("decoding", "9 apart", wrong=True)


def test_a_run_on_a_gpu_compares_its_decoding(on_gpu):
    said, graphed = on_gpu(GOOD)
    assert "the same" in said
    assert graphed


@pytest.mark.parametrize(
    "fault, reason",
    [(BAD, "9 apart"), (RuntimeError("not permitted while capturing\nmore"), "not permitted")],
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


def test_decoding_mixes_no_devices_and_waits_for_nothing():
    """A batch made on the CPU becomes one of fake GPU tensors; over two blocks of the cache."""
    if torch.version.cuda is None:
        pytest.skip("torch is a CPU build, in which fake tensors cannot be a GPU's")

    def moved(x):
        if isinstance(x, list):
            return [moved(item) for item in x]
        if not isinstance(x, Tensor):
            return x
        on_gpu = torch.empty(x.shape, dtype=x.dtype, device="cuda")
        return nn.Parameter(on_gpu) if isinstance(x, nn.Parameter) else on_gpu

    model, _ = load_model("tiny", dtype=torch.bfloat16)
    with torch.inference_mode():
        batch = DecodeBatch(model, PROMPTS, torch.rand(3, 2, 80), torch.tensor([0]), TokenChoice(1.0, 5, 0.9))
        batch.start()
        with FakeTensorMode():
            for module in model.modules():
                module._parameters.update({name: moved(p) for name, p in module._parameters.items()})
            for part in (batch, batch.cache):
                vars(part).update({name: moved(value) for name, value in vars(part).items()})
            for count in range(1, 80):
                batch.cache.reserve(count)
                batch.step()  # a wait for the device would raise
            assert batch.logprobs.dtype == torch.float32
            assert batch.token_ids.is_cuda
            with pytest.raises(DataDependentOutputException):
                batch.drop(torch.zeros(6, dtype=torch.bool, device="cuda"), 0.5)  # which has to wait

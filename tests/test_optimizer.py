"""AdamW over float32 masters: torch's own arithmetic, no small update lost, and a state that resumes where it stopped."""

import copy

import pytest
import torch
from helpers import gradients, largest_gap, ragged_samples, random_model
from safetensors.torch import load_file, save_file

import rl.optimizer
from rl.learner import Learner
from rl.optimizer import OPTIMIZERS, Optimizer, round_stochastically
from lab.recipe import Recipe
from rl.sft import sft_step

SAMPLES = ragged_samples(4)
WIDE = {"vocab_size": 320, "hidden_size": 32}  # matrices of 4096 elements and more: 8-bit moments


def learn(model, optimizer, steps: int, rate: float = 3e-3) -> list[float]:
    pupil = Learner(model, optimizer, Recipe(), 1000)
    return [sft_step(pupil, SAMPLES, rate)["loss"] for _ in range(steps)]


def masters(optimizer) -> dict[str, torch.Tensor]:
    """The masters in the shapes of their parameters."""
    return {
        name: torch.cat(optimizer.masters[name]).detach().view(parameter.shape)
        for name, parameter in optimizer.parameters.items()
    }


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def random_gradients(model, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_float32_steps_equal_torch_adamw_with_its_gradient_clipping(weight_decay):
    """Several steps with a rate that changes, and gradients on both sides of the clip."""
    ours, theirs = random_model(), random_model()
    optimizer = Optimizer(ours, weight_decay=weight_decay)
    plain = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    clipped = []
    for step, (rate, scale) in enumerate([(1e-2, 1.0), (5e-3, 1e-4), (2e-2, 0.3), (1e-3, 1e-3), (1e-2, 10.0)]):
        random_gradients(ours, step, scale)
        random_gradients(theirs, step, scale)
        norm = optimizer.step(rate, max_grad_norm=1.0)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        plain.param_groups[0]["lr"] = rate
        plain.step()
        assert norm == pytest.approx(expected.item(), rel=1e-5)
        clipped.append(norm > 1)
        assert largest_gap(weights(ours), weights(theirs)) < 2e-6
    assert set(clipped) == {True, False}


def test_without_a_maximum_norm_nothing_is_scaled():
    ours, theirs = random_model(), random_model()
    optimizer, plain = Optimizer(ours), torch.optim.AdamW(theirs.parameters(), 1e-2, (0.9, 0.95), 1e-8, 0.0)
    for step, scale in enumerate((1.0, 100.0)):  # of the second step Adam feels the scale
        random_gradients(ours, step, scale)
        random_gradients(theirs, step, scale)
        optimizer.step(1e-2, max_grad_norm=None)
        plain.step()
    assert largest_gap(weights(ours), weights(theirs)) < 2e-6


def test_a_step_clears_the_gradients_and_returns_their_norm():
    model = random_model()
    random_gradients(model, 0, 1.0)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    optimizer = Optimizer(model)
    assert optimizer.step(1e-3) == pytest.approx(expected, rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())
    before = weights(model)
    assert optimizer.step(1e-3) == 0.0
    assert largest_gap(weights(model), before) == 0


def test_tied_weights_are_one_parameter():
    tied = random_model()
    optimizer = Optimizer(tied)
    assert "model.embed_tokens.weight" in optimizer.parameters and "lm_head.weight" not in optimizer.parameters
    untied = Optimizer(random_model(tie_word_embeddings=False))
    assert untied.parameters.keys() - optimizer.parameters.keys() == {"lm_head.weight"}
    learn(tied, optimizer, 2)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_frozen_parameters_are_left_alone():
    model = random_model()
    model.model.norm.weight.requires_grad_(False)
    before = weights(model)
    optimizer = Optimizer(model)
    assert "model.norm.weight" not in optimizer.masters  # nor does it cost memory
    learn(model, optimizer, 2)
    still = [name for name, after in weights(model).items() if torch.equal(after, before[name])]
    assert still == ["model.norm.weight"]


def test_bfloat16_weights_move_as_far_as_float32_ones_trap_small_updates_round_to_nothing():
    """At 1e-6 a bfloat16 weight near 0.25 cannot move in one step; its master moves as a float32 weight does."""
    low, full = random_model(dtype=torch.bfloat16), random_model()
    full.load_state_dict(low.state_dict())
    start = weights(full)
    optimizer = Optimizer(low)
    learn(low, optimizer, 20, rate=1e-6)
    learn(full, Optimizer(full), 20, rate=1e-6)

    def displacement(tensors):
        return torch.cat([(tensors[name].detach() - start[name]).abs().flatten() for name in start]).mean().item()

    assert displacement(masters(optimizer)) == pytest.approx(displacement(weights(full)), rel=0.05)
    assert displacement(weights(full)) > 2e-6
    assert all(master.dtype == torch.float32 for master in masters(optimizer).values())


def test_bfloat16_weights_are_their_masters_rounded_and_get_there_by_small_steps():
    """Four hundred steps of 1e-5 one way: a weight of 1, with spacing 0.004 below it, moves only by way of its master."""
    model = random_model(dtype=torch.bfloat16)
    optimizer = Optimizer(model)
    norm = model.model.norm.weight
    assert (norm == 1).all()
    for step in range(400):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-5, max_grad_norm=None)
        if step == 0:
            assert (norm == 1).all()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, masters(optimizer)[name].bfloat16())
    master = masters(optimizer)["model.norm.weight"]
    torch.testing.assert_close(master, torch.full((16,), 1 - 4e-3), rtol=0, atol=1e-5)
    assert (norm == 1 - 2**-8).all()


def test_the_share_of_weights_that_moved_is_the_last_steps_trap_learning_rate_below_the_precision():
    """Counted again from copies; of a step without gradients it is zero, and float32 weights have none."""
    model = random_model(dtype=torch.bfloat16)
    optimizer = Optimizer(model)
    shares = []
    for rate in (1e-6, 1e-2):
        before = weights(model)
        learn(model, optimizer, 1, rate)
        changed = sum(int((after != before[name]).sum()) for name, after in weights(model).items())
        assert optimizer.moved_share == changed / sum(parameter.numel() for parameter in model.parameters())
        shares.append(optimizer.moved_share)
    assert shares[0] < 0.05 and shares[1] > 0.5
    optimizer.step(1e-2)
    assert optimizer.moved_share == 0
    full = random_model()
    optimizer = Optimizer(full)
    learn(full, optimizer, 1)
    assert optimizer.moved_share is None


def test_stochastic_rounding_loses_no_small_update_and_keeps_no_copy():
    """Twenty steps of 1e-6 on 50,000 weights: along the way that float32 weights take, the mean displacement is theirs."""
    low = random_model(dtype=torch.bfloat16, std=0.02, hidden_size=64, intermediate_size=128)
    full = random_model(std=0.02, hidden_size=64, intermediate_size=128)
    full.load_state_dict(low.state_dict())
    start = weights(full)
    optimizer = Optimizer(low, rounding="stochastic")
    learn(low, optimizer, 20, rate=1e-6)
    learn(full, Optimizer(full), 20, rate=1e-6)
    moved = {name: (weights(low)[name].float() - start[name]).flatten() for name in start}
    expected = {name: (weights(full)[name] - start[name]).flatten() for name in start}
    along = torch.cat([moved[name] * expected[name].sign() for name in start]).mean()
    displacement = torch.cat([expected[name].abs() for name in start]).mean()
    assert along.item() == pytest.approx(displacement.item(), rel=0.05) and displacement > 2e-6
    assert not any(name.endswith("|master") for name, _ in optimizer.state_tensors())
    assert sum(master.numel() for pieces in optimizer.masters.values() for master in pieces) == 0


def test_rounding_by_chance_has_the_right_expectation_and_only_the_two_neighbours():
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(100, generator=generator), torch.tensor([0.0, 1.0, -2.0, 1 + 2**-10, 3e38, 1e-30])])
    rounded = torch.stack([round_stochastically(x, f"{n}") for n in range(4000)])
    exact = x.double().numpy()
    below = torch.from_numpy((x.view(torch.int32) & -(2**16)).view(torch.float32).numpy())  # towards zero
    step = (below.view(torch.int32) + 2**16).view(torch.float32) - below
    assert rounded.dtype == torch.bfloat16
    assert ((rounded.float() == below) | (rounded.float() == below + step)).all()
    deviation = (rounded.double().mean(0).numpy() - exact) / step.abs().clamp(min=1e-45).numpy()
    assert abs(deviation).max() < 4.5 / 2 / 4000**0.5  # of a coin thrown 4,000 times
    assert (rounded[:, 101] == 1).all() and (rounded[:, 100] == 0).all()
    assert torch.equal(round_stochastically(x, "a"), round_stochastically(x, "a"))


def test_every_step_rounds_by_chances_of_its_own():
    """The same small update four hundred times: with the same chances each time, some weights would take all and some none."""
    model = random_model(dtype=torch.bfloat16, hidden_size=64)
    optimizer = Optimizer(model, rounding="stochastic")
    norm = model.model.norm.weight  # 64 ones, with spacing 2^-8 below: 1e-5 is 0.26 % of a step
    for _ in range(400):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-5, max_grad_norm=None)
    taken = ((1 - norm.detach().float()) / 2**-8).round()
    assert taken.mean().item() == pytest.approx(400 * 1e-5 * 2**8, abs=0.5)  # 1.02 steps, Poisson: deviation 0.13
    assert 0 < (taken == 0).sum() < 50 and taken.max() <= 6


def test_stochastic_rounding_is_for_bfloat16():
    with pytest.raises(ValueError, match="bfloat16.*float16"):
        Optimizer(random_model(dtype=torch.float16), rounding="stochastic")
    with pytest.raises(ValueError, match="masters, stochastic.*'nearest'"):
        Optimizer(random_model(), rounding="nearest")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_a_parameter_in_pieces_is_updated_as_if_whole(kind, dtype, monkeypatch):
    """8-bit moments share their scales in blocks of 256, which pieces of 4,096 do not cut."""
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    whole = random_model(dtype=dtype, vocab_size=384, hidden_size=32)
    divided = copy.deepcopy(whole)
    learn(whole, Optimizer(whole, kind, weight_decay=0.1), 3)
    monkeypatch.setattr(rl.optimizer, "PIECE", 4096)
    optimizer = Optimizer(divided, kind, weight_decay=0.1)
    assert [piece.numel() for piece in optimizer.masters["model.embed_tokens.weight"]] == [4096] * 3
    learn(divided, optimizer, 3)
    assert largest_gap(weights(divided), weights(whole)) == 0


def test_float32_weights_have_no_second_copy():
    model = random_model()
    optimizer = Optimizer(model)
    assert all(optimizer.masters[name][0].data_ptr() == p.data_ptr() for name, p in model.named_parameters())
    learn(model, optimizer, 1)
    assert not any(name.endswith("|master") for name, _ in optimizer.state_tensors())


@pytest.mark.parametrize("kind", ["adamw8bit", "paged_adamw8bit"])
@pytest.mark.filterwarnings("ignore:.*aged")
def test_eight_bit_optimizers_lower_the_loss_on_a_cpu(kind):
    pytest.importorskip("bitsandbytes")
    model = random_model(**WIDE)
    optimizer = Optimizer(model, kind)
    losses = learn(model, optimizer, 8, rate=1e-2)
    assert losses[-1] < 0.7 * losses[0]
    moments = {name: tensor.dtype for name, tensor in optimizer.state_tensors()}
    assert moments["model.embed_tokens.weight|0|state1"] == torch.uint8
    assert moments["model.norm.weight|0|state1"] == torch.float32  # small tensors stay exact


@pytest.mark.parametrize("rounding", ["masters", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_a_saved_state_continues_bit_for_bit(kind, dtype, rounding, tmp_path, monkeypatch):
    """Through a safetensors file, into a model and an optimizer of another life; without the state, steps differ."""
    if kind == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(rl.optimizer, "PIECE", 4096)
    model = random_model(dtype=dtype, **WIDE)
    optimizer = Optimizer(model, kind, weight_decay=0.1, rounding=rounding)
    learn(model, optimizer, 3)
    save_file({name: tensor.contiguous() for name, tensor in optimizer.state_tensors()}, tmp_path / "state.safetensors")
    resumed, forgetful = copy.deepcopy(model), copy.deepcopy(model)
    losses = learn(model, optimizer, 3)

    second = Optimizer(resumed, kind, weight_decay=0.1, rounding=rounding)
    second.load_state_tensors(load_file(tmp_path / "state.safetensors"))
    assert learn(resumed, second, 3) == losses
    assert largest_gap(weights(resumed), weights(model)) == 0
    first, again = dict(optimizer.state_tensors()), dict(second.state_tensors())
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) and first[name].dtype == again[name].dtype for name in first)

    learn(forgetful, Optimizer(forgetful, kind, weight_decay=0.1, rounding=rounding), 3)
    assert largest_gap(weights(forgetful), weights(model)) > 1e-3


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match=f"{', '.join(OPTIMIZERS)}.*'sgd'"):
        Optimizer(random_model(), "sgd")


def test_gradients_of_a_bfloat16_model_are_summed_into_the_norm_in_float32():
    model = random_model(dtype=torch.bfloat16)
    random_gradients(model, 0, 1.0)
    expected = torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm().item()
    assert Optimizer(model).step(1e-3) == pytest.approx(expected, rel=1e-5)
    assert all((gradient == 0).all() for gradient in gradients(model).values())

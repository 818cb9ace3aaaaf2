"""AdamW one piece at a time: torch's arithmetic, no small update lost, and a state that resumes exactly."""

import copy
import math

import pytest
import torch
from helpers import largest_gap, optimizer_for, ragged_samples, random_model, weights
from safetensors.torch import load_file, save_file

import rl.optimizer
from lab.checkpoint import load_state_tensors, state_tensors
from rl.optimizer import round_stochastically
from rl.sft import sft_step
from rl.trainer import Trainer

SAMPLES = ragged_samples(4)
KINDS = pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
WIDE = {"vocab_size": 320, "hidden_size": 32}  # matrices of 4,096 elements and more: 8-bit moments


def learn(model, optimizer, steps: int, rate: float = 3e-3) -> list[float]:
    trainer = Trainer(model, optimizer)
    return [sft_step(trainer, SAMPLES, rate)["loss"] for _ in range(steps)]


def state_of(optimizer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in state_tensors(optimizer)}


def random_gradients(model, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)


def test_float32_steps_equal_torchs_adamw_with_clipping():
    """Several steps with a rate that changes, and gradients on both sides of the clip."""
    ours, theirs = random_model(), random_model()
    optimizer = optimizer_for(ours)
    plain = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    clipped = []
    for step, (rate, scale) in enumerate(
        [(1e-2, 1.0), (5e-3, 1e-4), (2e-2, 0.3), (1e-3, 1e-3), (1e-2, 10.0)]
    ):
        random_gradients(ours, step, scale)
        random_gradients(theirs, step, scale)
        norm = optimizer.step(rate)
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        plain.param_groups[0]["lr"] = rate
        plain.step()
        assert norm == pytest.approx(expected.item(), rel=1e-5)
        clipped.append(norm > 1)
        assert largest_gap(weights(ours), weights(theirs)) < 2e-6
        assert all(parameter.grad is None for parameter in ours.parameters())
    assert set(clipped) == {True, False}
    assert all(
        optimizer.pieces[name][0].master.data_ptr() == p.data_ptr() for name, p in ours.named_parameters()
    )  # no copy
    before = weights(ours)
    assert optimizer.step(1e-3) == 0.0  # without gradients nothing moves, though Adam's momentum would
    assert largest_gap(weights(ours), before) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, None], ids=str)
def test_a_step_that_is_skipped_changes_nothing(bad):
    model = random_model()
    optimizer = optimizer_for(model)
    learn(model, optimizer, 1)
    before, state = weights(model), state_of(optimizer)
    for count in (1, 2):
        random_gradients(model, 0, 1.0)
        if bad is not None:
            model.lm_head.weight.grad[3, 2] = bad
        assert math.isnan(optimizer.step(1e-2, skip=bad is None))
        assert optimizer.skipped_in_a_row == count
        assert all(p.grad is None for p in model.parameters())
    assert largest_gap(weights(model), before) == 0 == largest_gap(state_of(optimizer), state)
    learn(model, optimizer, 1)
    assert optimizer.skipped_in_a_row == 0


def test_tied_weights_are_one_parameter_and_frozen_ones_stay():
    model, untied = random_model(), random_model(tie_word_embeddings=False)
    model.model.norm.weight.requires_grad_(False)
    before, optimizer = weights(model), optimizer_for(model)
    assert optimizer_for(untied).parameters.keys() - optimizer.parameters.keys() == {
        "lm_head.weight",
        "model.norm.weight",
    }
    assert optimizer.pieces.keys() == optimizer.parameters.keys()  # frozen weights cost no memory
    learn(model, optimizer, 2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert [name for name, after in weights(model).items() if torch.equal(after, before[name])] == [
        "model.norm.weight"
    ]


@pytest.mark.parametrize("rounding", ["masters", "stochastic"])
def test_bfloat16_weights_move_as_far_as_float32_ones(rounding):
    """At a rate of 1e-6, weights that are rounded to nearest would not move at all."""
    shape = dict(std=0.02, hidden_size=64, intermediate_size=128)
    low, full = random_model(dtype=torch.bfloat16, **shape), random_model(**shape)
    full.load_state_dict(low.state_dict())
    start = weights(full)
    optimizer = optimizer_for(low, rounding=rounding)
    learn(low, optimizer, 20, rate=1e-6)
    learn(full, optimizer_for(full), 20, rate=1e-6)
    expected = {name: after - start[name] for name, after in weights(full).items()}
    moved = weights(low)
    if rounding == "masters":
        masters = {}
        for name, pieces in optimizer.pieces.items():
            masters[name] = torch.cat([piece.master for piece in pieces]).detach().view(start[name].shape)
        assert all(torch.equal(moved[name], master.bfloat16()) for name, master in masters.items())
        moved = masters
    else:  # no copy is kept, in memory or in a checkpoint
        assert not any(len(piece.master) for pieces in optimizer.pieces.values() for piece in pieces)
        assert not any("|master" in name for name in state_of(optimizer))
    along = torch.cat(
        [((moved[name].float() - start[name]) * expected[name].sign()).flatten() for name in start]
    )
    displacement = torch.cat([difference.abs().flatten() for difference in expected.values()]).mean().item()
    assert along.mean().item() == pytest.approx(displacement, rel=0.05)
    assert displacement > 2e-6


def test_stochastic_rounding_gives_neighbours_of_the_right_mean():
    """It is for bfloat16 only."""
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [torch.randn(100, generator=generator), torch.tensor([0.0, 1.0, -2.0, 1 + 2**-10, 3e38, 1e-30])]
    )
    rounded = torch.stack([round_stochastically(x, f"{n}") for n in range(4000)])
    exact = x.double().numpy()
    below = torch.from_numpy((x.view(torch.int32) & -(2**16)).view(torch.float32).numpy())  # towards zero
    step = (below.view(torch.int32) + 2**16).view(torch.float32) - below
    assert rounded.dtype == torch.bfloat16
    assert ((rounded.float() == below) | (rounded.float() == below + step)).all()
    deviation = (rounded.double().mean(0).numpy() - exact) / step.abs().clamp(min=1e-45).numpy()
    assert abs(deviation).max() < 4.5 / 2 / 4000**0.5  # of a coin thrown 4,000 times
    assert (rounded[:, 101] == 1).all()
    assert (rounded[:, 100] == 0).all()
    assert torch.equal(round_stochastically(x, "a"), round_stochastically(x, "a"))
    with pytest.raises(ValueError, match="bfloat16.*float16"):
        optimizer_for(random_model(dtype=torch.float16), rounding="stochastic")


def test_every_step_and_every_piece_draws_its_own_random_numbers(monkeypatch):
    model, keys = random_model(dtype=torch.bfloat16), []

    def rounded(x, key):
        keys.append(key)
        return x.bfloat16()

    monkeypatch.setattr(rl.optimizer, "PIECE", 256)
    optimizer = optimizer_for(model, rounding="stochastic")
    monkeypatch.setattr(rl.optimizer, "round_stochastically", rounded)
    learn(model, optimizer, 3)
    assert len(set(keys)) == len(keys) == 3 * sum(map(len, optimizer.pieces.values())) > 100


@DTYPES
@KINDS
def test_a_parameter_in_pieces_is_updated_as_in_one(kind, dtype, monkeypatch):
    """8-bit moments share their scales in blocks of 256, which pieces of 4,096 do not cut."""
    whole = random_model(dtype=dtype, vocab_size=384, hidden_size=32)
    divided = copy.deepcopy(whole)
    learn(whole, optimizer_for(whole, kind=kind), 3)
    monkeypatch.setattr(rl.optimizer, "PIECE", 4096)
    optimizer = optimizer_for(divided, kind=kind)
    assert [piece.weights.numel() for piece in optimizer.pieces["model.embed_tokens.weight"]] == [4096] * 3
    learn(divided, optimizer, 3)
    assert largest_gap(weights(divided), weights(whole)) == 0


def test_the_eight_bit_optimizer_lowers_the_loss_on_a_cpu():
    model = random_model(**WIDE)
    optimizer = optimizer_for(model, kind="adamw8bit")
    losses = learn(model, optimizer, 8, rate=1e-2)
    assert losses[-1] < 0.7 * losses[0]
    state = state_of(optimizer)
    assert state["model.embed_tokens.weight|0|state1"].dtype == torch.uint8
    assert state["model.norm.weight|0|state1"].dtype == torch.float32  # small tensors stay exact


@pytest.mark.parametrize("rounding", ["masters", "stochastic"])
@DTYPES
@KINDS
def test_a_saved_state_continues_bit_for_bit(kind, dtype, rounding, tmp_path, monkeypatch):
    """Through a safetensors file, into a new model and a new optimizer; without the state, steps differ."""
    monkeypatch.setattr(rl.optimizer, "PIECE", 4096)
    options = dict(kind=kind, rounding=rounding)
    model = random_model(dtype=dtype, **WIDE)
    optimizer = optimizer_for(model, **options)
    learn(model, optimizer, 3)
    save_file(state_of(optimizer), tmp_path / "state.safetensors")
    resumed, forgetful = copy.deepcopy(model), copy.deepcopy(model)
    losses = learn(model, optimizer, 3)

    second = optimizer_for(resumed, **options)
    load_state_tensors(second, load_file(tmp_path / "state.safetensors"))
    assert learn(resumed, second, 3) == losses
    assert largest_gap(weights(resumed), weights(model)) == 0
    assert largest_gap(state_of(second), state_of(optimizer)) == 0

    learn(forgetful, optimizer_for(forgetful, **options), 3)
    assert largest_gap(weights(forgetful), weights(model)) > 1e-3

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
BF16 = torch.bfloat16
WIDE = {"vocab_size": 384, "hidden_size": 32}  # matrices of 4,096 elements and more: 8-bit moments
EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


def learn(model, optimizer, steps, rate=3e-3) -> list[float]:
    trainer = Trainer(model, optimizer)
    return [sft_step(trainer, SAMPLES, rate)["loss"] for _ in range(steps)]


def state_of(optimizer):
    return {name: tensor.clone() for name, tensor in state_tensors(optimizer)}


def random_gradients(model, scale):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


def test_float32_steps_equal_torchs_adamw_with_clipping():
    """Several steps with a rate that changes, and gradients on both sides of the clip."""
    ours, theirs = random_model(), random_model()
    optimizer = optimizer_for(ours)
    plain = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    norms = []
    for rate, scale in [(1e-2, 1.0), (5e-3, 1e-4), (2e-2, 0.3), (1e-3, 1e-3)]:
        random_gradients(ours, scale)
        random_gradients(theirs, scale)
        norms.append(optimizer.step(rate))
        expected = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        plain.param_groups[0]["lr"] = rate
        plain.step()
        assert norms[-1] == pytest.approx(expected.item(), rel=1e-5)
        assert largest_gap(weights(ours), weights(theirs)) < 2e-6
    assert min(norms) < 1 < max(norms)
    [piece] = optimizer.pieces[NORM]
    assert piece.master.data_ptr() == ours.model.norm.weight.data_ptr()  # no copy


def test_a_step_without_gradients_moves_nothing():
    """Adam's momentum would."""
    model = random_model()
    optimizer = optimizer_for(model)
    learn(model, optimizer, 1)
    assert all(parameter.grad is None for parameter in model.parameters())
    before = weights(model)
    assert optimizer.step(1e-3) == 0.0
    assert largest_gap(weights(model), before) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_step_that_is_skipped_changes_nothing(bad):
    model = random_model()
    optimizer = optimizer_for(model)
    learn(model, optimizer, 1)
    before, state = weights(model), state_of(optimizer)
    for count in (1, 2):
        random_gradients(model, 1.0)
        if bad is not None:
            model.lm_head.weight.grad[3, 2] = bad
        assert math.isnan(optimizer.step(1e-2, skip=bad is None))
        assert optimizer.skipped_in_a_row == count
        assert all(parameter.grad is None for parameter in model.parameters())
    assert largest_gap(weights(model), before) == 0
    assert largest_gap(state_of(optimizer), state) == 0
    learn(model, optimizer, 1)
    assert optimizer.skipped_in_a_row == 0


def test_tied_weights_are_one_parameter_and_frozen_ones_stay():
    """Frozen weights cost no memory."""
    model = random_model()
    model.model.norm.weight.requires_grad_(False)
    before = weights(model)
    optimizer = optimizer_for(model)
    assert optimizer.pieces.keys() == before.keys() - {NORM}
    assert "lm_head.weight" not in before
    learn(model, optimizer, 2)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    after = weights(model)
    assert [name for name in after if torch.equal(after[name], before[name])] == [NORM]


@pytest.mark.parametrize("rounding", ["masters", "stochastic"])
def test_bfloat16_weights_move_as_far_as_float32_ones(rounding):
    """At a rate of 1e-6, weights that are rounded to nearest would not move at all."""
    shape = {"std": 0.02, "hidden_size": 64, "intermediate_size": 128}
    low, full = random_model(dtype=BF16, **shape), random_model(**shape)
    full.load_state_dict(low.state_dict())
    start = weights(full)
    optimizer = optimizer_for(low, rounding=rounding)
    learn(low, optimizer, 12, rate=1e-6)
    learn(full, optimizer_for(full), 12, rate=1e-6)
    along = distance = 0.0
    for name, rounded in weights(low).items():
        [piece] = optimizer.pieces[name]
        exact = piece.master.detach().view_as(rounded) if rounding == "masters" else rounded.float()
        assert torch.equal(exact.bfloat16(), rounded)
        expected = full.get_parameter(name).detach() - start[name]
        distance += expected.abs().sum().item()
        along += ((exact - start[name]) * expected.sign()).sum().item()
    assert along == pytest.approx(distance, rel=0.05)
    assert distance > 2e-6 * low.num_parameters()


def test_stochastic_rounding_keeps_no_copy_of_the_weights():
    """Neither in memory nor in a checkpoint."""
    optimizer = optimizer_for(random_model(dtype=BF16), rounding="stochastic")
    assert not any(len(piece.master) for pieces in optimizer.pieces.values() for piece in pieces)
    assert not any("|master" in name for name in state_of(optimizer))
    with pytest.raises(ValueError, match=r"bfloat16.*float16"):
        optimizer_for(random_model(dtype=torch.float16), rounding="stochastic")


def test_stochastic_rounding_gives_neighbours_of_the_right_mean():
    drawn = torch.randn(100, generator=torch.Generator().manual_seed(0))
    x = torch.cat([drawn, torch.tensor([0.0, 1.0, -2.0, 1 + 2**-10, 3e38])])
    rounded = torch.stack([round_stochastically(x, str(number)) for number in range(2000)])
    assert rounded.dtype == BF16
    below = (x.view(torch.int32) & -(2**16)).view(torch.float32)  # towards zero
    step = (below.view(torch.int32) + 2**16).view(torch.float32) - below
    ups = (rounded.double() - below) / step
    assert torch.equal(ups, (ups != 0).double())
    chances = (x.double() - below) / step
    assert (ups.mean(0) - chances).abs().max() < 4.5 / 2 / 2000**0.5  # of a coin thrown 2,000 times
    assert torch.equal(round_stochastically(x, "a"), round_stochastically(x, "a"))


def test_every_step_and_every_piece_draws_its_own_random_numbers(monkeypatch):
    keys = []

    def rounded(x, key):
        keys.append(key)
        return x.bfloat16()

    monkeypatch.setattr(rl.optimizer, "PIECE", 256)
    monkeypatch.setattr(rl.optimizer, "round_stochastically", rounded)
    model = random_model(dtype=BF16)
    optimizer = optimizer_for(model, rounding="stochastic")
    learn(model, optimizer, 3)
    assert len(set(keys)) == len(keys) == 3 * sum(map(len, optimizer.pieces.values())) > 100


@pytest.mark.parametrize(("kind", "dtype"), [("adamw", torch.float32), ("adamw8bit", BF16)])
def test_a_parameter_in_pieces_is_updated_as_in_one(kind, dtype, monkeypatch):
    """8-bit moments share their scales in blocks of 256, which pieces of 4,096 do not cut."""
    whole = random_model(dtype=dtype, **WIDE)
    divided = copy.deepcopy(whole)
    learn(whole, optimizer_for(whole, kind=kind), 3)
    monkeypatch.setattr(rl.optimizer, "PIECE", 4096)
    optimizer = optimizer_for(divided, kind=kind)
    assert [piece.weights.numel() for piece in optimizer.pieces[EMBEDDING]] == [4096] * 3
    learn(divided, optimizer, 3)
    assert largest_gap(weights(divided), weights(whole)) == 0
    if kind == "adamw8bit":
        assert state_of(optimizer)[f"{EMBEDDING}|0|state1"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("kind", "dtype", "rounding"),
    [
        ("adamw", torch.float32, "masters"),
        ("adamw", BF16, "masters"),
        ("adamw", BF16, "stochastic"),
        ("adamw8bit", BF16, "masters"),
    ],
)
def test_a_saved_state_continues_bit_for_bit(kind, dtype, rounding, tmp_path, monkeypatch):
    """Through a safetensors file, into a new model and a new optimizer."""
    monkeypatch.setattr(rl.optimizer, "PIECE", 4096)
    options = {"kind": kind, "rounding": rounding}
    model = random_model(dtype=dtype, **WIDE)
    optimizer = optimizer_for(model, **options)
    learn(model, optimizer, 3)
    save_file(state_of(optimizer), tmp_path / "state.safetensors")
    resumed = copy.deepcopy(model)
    losses = learn(model, optimizer, 3)

    second = optimizer_for(resumed, **options)
    load_state_tensors(second, load_file(tmp_path / "state.safetensors"))
    assert learn(resumed, second, 3) == losses
    assert largest_gap(weights(resumed), weights(model)) == 0
    assert largest_gap(state_of(second), state_of(optimizer)) == 0

"""Adapters and int8 weights: LoRA's arithmetic, a base that never moves, and plain checkpoints."""

import sys
from unittest import mock

import pytest
import torch
import transformers
from helpers import assert_close, largest_gap, optimizer_for, ragged_samples, random_model, trainer_for
from reference import TINY, TINY_TOKENS, random_ids, reference_model, same_weights
from torch import nn

from model import ModelError, Tokenizer, load_model, save_model
from model.quantize import (
    LoRALinear,
    adapter_state,
    adapters,
    add_adapters,
    load_adapter_state,
    plain_state,
    quantized,
)
from rl.sft import sft_step

IDS = random_ids(3, 11, high=48)
BF16 = torch.bfloat16
BASES = pytest.mark.parametrize("int8", [False, True])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, BF16])
SEVEN = {*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))}


def fill(model, std=0.3):
    """Adapters that do something: a new one adds zero."""
    generator = torch.Generator().manual_seed(7)
    for tensor in adapter_state(model).values():
        tensor.normal_(std=std, generator=generator)
    return model


def copies(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def frozen(model):
    """Copies of everything in a model that is no adapter, int8 weights and their scales included."""
    return {name: tensor for name, tensor in copies(model.state_dict()).items() if "lora_" not in name}


def same(a, b) -> bool:
    alike = [torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a]
    return a.keys() == b.keys() and all(alike)


def error(found, expected) -> float:
    """Relative, over the whole tensor."""
    return float((found.detach().double() - expected).norm() / expected.norm())


def projection(in_size, out_size, rank, alpha, int8, dtype=torch.float32) -> LoRALinear:
    torch.manual_seed(0)
    base = nn.Linear(in_size, out_size, bias=False, dtype=dtype)
    layer = LoRALinear(quantized(base) if int8 else base, rank, alpha)
    nn.init.normal_(layer.lora_b)
    return layer


@BASES
@pytest.mark.parametrize("leading", [(), (3,), (2, 1, 3, 2)], ids=str)
def test_a_projection_is_x_times_w_plus_alpha_over_rank_b_a(leading, int8):
    """Against one plain float64 matrix: output, merged weight, and the gradients of x, A and B."""
    layer = projection(7, 5, rank=3, alpha=4.0, int8=int8)
    base = layer.base
    weight = base.weight.detach().double()
    if int8:
        weight *= base.state.SCB[:, None] / 127
    ours = [torch.randn(*leading, 7).requires_grad_(), layer.lora_a, layer.lora_b]
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    x, lora_a, lora_b = theirs
    merged = weight + 4 / 3 * lora_b @ lora_a
    expected = x @ merged.T
    found = layer(ours[0])
    assert found.dtype == torch.float32
    assert_close(found.double(), expected, atol=1e-5)
    assert_close(layer.merged().double(), merged.detach(), atol=1e-5)
    found.sin().sum().backward()
    expected.sin().sum().backward()
    for mine, plain in zip(ours, theirs):
        assert_close(mine.grad.double(), plain.grad, atol=1e-4)


@DTYPES
@BASES
def test_every_way_of_calling_a_projection_gives_its_product(int8, dtype):
    """With and without gradients, under inference mode, after `eval` and `train`."""
    layer = projection(64, 96, 4, 8.0, int8, dtype)
    x = torch.randn(2, 5, 64).to(dtype)
    x[..., 7] *= 50  # int8 activations would lose most of the other 63
    expected = x.double() @ layer.merged().double().T
    tolerance = 1e-6 if dtype == torch.float32 else 6e-3
    with torch.inference_mode():
        assert error(layer(x), expected) < tolerance
    x.requires_grad_()
    for training in (True, False):
        trained = layer.train(training)(x)
        assert trained.dtype == dtype
        assert trained.requires_grad
        assert error(trained, expected) < tolerance


def test_int8_weights_are_rows_over_their_largest_magnitude():
    linear = nn.Linear(24, 40, bias=False)
    weight = torch.randn(40, 24).half().float()
    weight[3] = 0
    linear.weight.data = weight.clone()
    made = quantized(linear)
    scales = weight.abs().amax(1)
    assert made.weight.dtype == torch.int8
    assert torch.equal(made.state.SCB, scales)
    merged = LoRALinear(made, 1, 1.0).merged()
    assert ((merged - weight).abs() <= scales[:, None] / 254 * 1.001).all()  # rounded to the nearest
    assert not made(torch.ones(2, 24))[:, 3].any()


@BASES
def test_all_seven_projections_and_nothing_else_get_adapters(int8):
    """The seven of every layer."""
    model = random_model()
    bases = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert add_adapters(model, 3, 6.0, int8) is model
    found = dict(adapters(model))
    assert found.keys() == {f"model.layers.{layer}.{name}" for layer in range(2) for name in SEVEN}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == adapter_state(model).keys()
    assert trained == {f"{name}.lora_{side}" for name in found for side in "ab"}
    for name, part in found.items():
        assert part.lora_a.dtype == part.lora_b.dtype == torch.float32
        assert (part.base is bases[name]) == (not int8)


@DTYPES
@BASES
@torch.no_grad()
def test_new_adapters_change_nothing(int8, dtype):
    """The weights in int8 are rounded."""
    model = random_model(dtype=dtype)
    expected = model(IDS)
    add_adapters(model, 4, 32.0, int8)
    gap = error(model(IDS), expected.double())
    if int8:
        assert 0 < gap < 0.1
    else:
        assert gap <= (0 if dtype == torch.float32 else 0.02)


def test_adapters_and_int8_weights_follow_the_seed_and_the_base():
    """Drawn matrices have the scale of their input's size."""

    def drawn(int8, seed):
        return add_adapters(random_model(hidden_size=64, dtype=BF16), 8, 8.0, int8, seed)

    first = drawn(True, 1)
    assert same(first.state_dict(), drawn(True, 1).state_dict())
    assert same(adapter_state(first), adapter_state(drawn(False, 1)))
    _, other = next(adapters(drawn(True, 2)))
    (_, query), (_, key), *_ = adapters(first)
    assert not torch.equal(query.lora_a, other.lora_a)
    assert not torch.equal(query.lora_a, key.lora_a)
    assert query.lora_a.std().item() * 64**0.5 == pytest.approx(1, abs=0.1)


def test_an_int8_projection_holds_a_byte_per_weight():
    """Each row has one scale besides. A first call adds nothing."""
    layer = projection(24, 40, 2, 2.0, int8=True)
    layer(torch.ones(2, 24))
    base = layer.base
    held = [base.weight.data, base.weight.CB, base.weight.SCB, *vars(base.state).values(), *base.buffers()]
    storages = [tensor.untyped_storage() for tensor in held if torch.is_tensor(tensor)]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    assert sum(sizes.values()) == 40 * 24 + 4 * 40


def test_bitsandbytes_is_imported_for_int8_only():
    without = {name: module for name, module in sys.modules.items() if name != "bitsandbytes"}
    with mock.patch.dict(sys.modules, without | {"bitsandbytes": None}):  # whose import fails
        plain_state(add_adapters(random_model(), 2, 2.0, int8=False))
        with pytest.raises(ImportError):
            add_adapters(random_model(), 2, 2.0, int8=True)


@DTYPES
def test_int8_weights_are_silent(dtype, caplog, capfd, recwarn):
    caplog.set_level("WARNING", logger="bitsandbytes")
    add_adapters(random_model(dtype=dtype), 2, 2.0, int8=True).eval()(IDS)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not recwarn.list


@pytest.mark.parametrize(("rank", "alpha"), [(0, 1.0), (2, 0.0), (2, -1.0), (2, float("nan"))])
def test_a_senseless_rank_or_alpha_is_refused(rank, alpha):
    """The model is left as it was."""
    model = random_model()
    with pytest.raises(ValueError, match=f"not {rank} and {alpha}"):
        add_adapters(model, rank, alpha, int8=False)
    assert not any(adapters(model))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_adapters_are_not_added_twice():
    with pytest.raises(ValueError, match="already"):
        add_adapters(add_adapters(random_model(), 2, 2.0, int8=False), 2, 2.0, int8=False)


@pytest.mark.parametrize(("int8", "dtype"), [(False, torch.float32), (True, BF16)])
def test_adapters_learn_and_the_base_stays_bit_identical(int8, dtype):
    model = add_adapters(random_model(dtype=dtype), 4, 8.0, int8)
    before, trainer = frozen(model), trainer_for(model)
    samples = ragged_samples(4)
    losses = [sft_step(trainer, samples, 5e-2)["loss"] for _ in range(6)]
    assert losses[-1] < 0.75 * losses[0]
    assert same(frozen(model), before)
    assert all(part.lora_b.any() for _, part in adapters(model))


@BASES
@torch.no_grad()
def test_the_base_with_saved_adapters_is_the_same_model(int8):
    """An optimizer goes on from them."""
    model = fill(add_adapters(random_model(), 3, 5.0, int8))
    again = add_adapters(random_model(), 3, 5.0, int8, seed=5)
    optimizer = optimizer_for(again)
    load_adapter_state(again, copies(adapter_state(model)))
    assert torch.equal(again(IDS), model(IDS))
    for name, matrix in adapter_state(model).items():
        [piece] = optimizer.pieces[name]
        assert torch.equal(piece.master.view_as(matrix), matrix)


NAME, STRANGER = "model.layers.1.mlp.down_proj.lora_b", "model.layers.2.mlp.down_proj.lora_b"


@pytest.mark.parametrize(
    ("changes", "named"),
    [({STRANGER: torch.ones(16, 3)}, STRANGER), ({NAME: torch.ones(16, 2)}, NAME), ({NAME: None}, NAME)],
)
def test_adapters_that_do_not_fit_are_named_and_not_loaded(changes, named):
    model = add_adapters(random_model(), 3, 5.0, int8=False)
    before = copies(adapter_state(model))
    given = {name: tensor + 1 for name, tensor in before.items()} | changes
    if given[named] is None:
        del given[named]
    with pytest.raises(ModelError, match=f"adapter {named}"):
        load_adapter_state(model, given)
    assert same(adapter_state(model), before)


@DTYPES
@BASES
def test_the_plain_state_is_the_merged_weights(int8, dtype):
    """A merged weight is rounded once: base and update are added in float32."""
    base = random_model(dtype=dtype)
    before = plain_state(base)
    assert same(before, base.state_dict())
    model = fill(add_adapters(base, 3, 5.0, int8))
    parts = dict(adapters(model))
    merged = plain_state(model)
    assert merged.keys() == before.keys()
    for name, tensor in before.items():
        part = parts.get(name.removesuffix(".weight"))
        assert torch.equal(merged[name], part.merged().to(dtype) if part else tensor), name


@pytest.mark.parametrize(
    ("int8", "family", "tied"), [(False, "qwen3", True), (True, "qwen3", False), (True, "qwen2", True)]
)
@torch.no_grad()
def test_a_saved_adapted_model_is_a_plain_checkpoint(int8, family, tied, tmp_path):
    """It gives the adapted model's logits, here and in transformers."""
    reference = reference_model(family=family, vocab_size=TINY_TOKENS, tie_word_embeddings=tied)
    model = fill(add_adapters(same_weights(reference), 4, 8.0, int8), std=0.1)
    expected = model(IDS)
    assert error(expected, reference(IDS).logits.double()) > 0.1  # the adapters are not small
    save_model(tmp_path, model, Tokenizer(TINY))
    assert torch.equal(model(IDS), expected)  # saving has changed nothing
    ours, _ = load_model(tmp_path)
    assert type(ours.model.layers[0].self_attn.q_proj) is nn.Linear
    assert largest_gap(plain_state(ours), plain_state(model)) == 0
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(theirs(IDS).logits, expected, atol=1e-4)

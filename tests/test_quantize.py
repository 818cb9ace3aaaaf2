"""Adapters and int8 weights: LoRA's arithmetic, a base that never moves, and plain checkpoints."""

import pytest
import torch
import transformers
from helpers import (
    assert_close,
    largest_gap,
    optimizer_for,
    ragged_samples,
    random_model,
    run_command,
    trainer_for,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import TINY, TINY_TOKENS, random_ids, reference_model, same_weights
from torch import nn

from model import ModelError, Qwen3, Tokenizer, load_model, save_model
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
SAMPLES = ragged_samples(4)
BASES = pytest.mark.parametrize("int8", [False, True])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SEVEN = {*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))}


def fill(model: Qwen3, std: float = 0.3) -> Qwen3:
    """Adapters that do something: a new one adds zero."""
    generator = torch.Generator().manual_seed(7)
    for tensor in adapter_state(model).values():
        tensor.normal_(std=std, generator=generator)
    return model


def frozen(model: Qwen3) -> dict[str, torch.Tensor]:
    """Copies of everything in a model that is no adapter, int8 weights and their scales included."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, over the whole tensor."""
    return float((found.detach().double() - expected).norm() / expected.norm())


def projection(
    in_size: int, out_size: int, rank: int, alpha: float, int8: bool, dtype=torch.float32
) -> LoRALinear:
    base = nn.Linear(in_size, out_size, bias=False, dtype=dtype)
    layer = LoRALinear(quantized(base) if int8 else base, rank, alpha)
    nn.init.normal_(layer.lora_b)
    return layer


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5)),
    st.lists(st.integers(1, 3), max_size=4), st.floats(0.1, 64), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_a_projection_is_x_times_w_plus_alpha_over_rank_b_a(sizes, leading, alpha, int8, seed):
    """Against one plain float64 matrix: output, merged weight, and the gradients of x, A and B."""
    in_size, out_size, rank = sizes
    torch.manual_seed(seed)
    layer = projection(in_size, out_size, rank, alpha, int8)
    base = layer.base.requires_grad_(False)
    weight = base.state.CB * base.state.SCB.double()[:, None] / 127 if int8 else base.weight.double()
    x, grad = torch.randn(*leading, in_size), torch.randn(*leading, out_size)
    ours = [x.clone().requires_grad_(), layer.lora_a, layer.lora_b]
    theirs = [tensor.detach().double().requires_grad_() for tensor in ours]
    expected_weight = weight + alpha / rank * theirs[2] @ theirs[1]
    expected = theirs[0] @ expected_weight.T
    found = layer(ours[0])
    assert found.shape == expected.shape
    assert found.dtype == x.dtype
    close = {"rtol": 1e-4, "atol": 1e-4 * max(1.0, alpha / rank), "check_dtype": False}
    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(layer.merged(), expected_weight.detach(), **close)
    found.backward(grad)
    expected.backward(grad.double())
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, **close)


@DTYPES
@BASES
def test_every_way_of_calling_a_projection_gives_its_product(int8, dtype):
    """With and without gradients, under inference mode, after `eval` and `train`."""
    torch.manual_seed(0)
    layer = projection(64, 96, 4, 8.0, int8, dtype)
    x = torch.randn(2, 5, 64).to(dtype)
    x[..., 7] *= 50  # int8 activations would lose most of the other 63
    expected = x.double() @ layer.merged().double().T
    tolerance = 1e-6 if dtype == torch.float32 else 6e-3
    with torch.inference_mode():
        assert layer(x).dtype == dtype
        assert error(layer(x), expected) < tolerance
    for training in (True, False):
        trained = layer.train(training)(x.requires_grad_())
        assert trained.requires_grad
        assert error(trained, expected) < tolerance


def test_int8_weights_are_rows_over_their_largest_magnitude():
    weight = 0.02 * torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    weight = weight.half().float()
    linear = nn.Linear(24, 40, bias=False)
    linear.weight.data = weight.clone()
    made = quantized(linear)
    scales = weight.abs().amax(1)
    assert made.weight.dtype == torch.int8
    assert torch.equal(made.state.SCB, scales)
    expected = (weight.double() / scales.double().clamp(min=1e-9)[:, None] * 127).round()
    assert (made.weight - expected).abs().max() <= 1
    assert (made.weight == expected).double().mean() > 0.99
    layer = LoRALinear(made, 1, 1.0)
    assert ((layer.merged() - weight).abs() <= scales[:, None] / 254 * 1.001).all()
    assert error(layer.merged(), weight) < 0.01
    assert torch.equal(made(torch.ones(2, 24))[:, 3], torch.zeros(2))


@BASES
def test_all_seven_projections_and_nothing_else_get_adapters(int8):
    """The seven of every layer."""
    model = random_model(num_hidden_layers=3)
    before = dict(model.named_parameters())
    bases = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert add_adapters(model, 3, 6.0, int8) is model
    found = dict(adapters(model))
    assert found.keys() == {f"model.layers.{layer}.{name}" for layer in range(3) for name in SEVEN}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert (
        trained == {f"{name}.lora_{side}" for name in found for side in "ab"} == adapter_state(model).keys()
    )
    for name, part in found.items():
        out_size, in_size = bases[name].weight.shape
        assert part.lora_a.shape == (3, in_size)
        assert part.lora_b.shape == (out_size, 3)
        assert part.lora_a.dtype == part.lora_b.dtype == torch.float32
        assert (part.base is bases[name]) == (not int8)
    assert all(before.get(name, parameter) is parameter for name, parameter in model.named_parameters())


@DTYPES
@BASES
@torch.no_grad()
def test_new_adapters_change_nothing(int8, dtype):
    model = random_model(dtype=dtype)
    expected = model(IDS)
    add_adapters(model, 4, 32.0, int8)
    assert all(part.lora_b.count_nonzero() == 0 for _, part in adapters(model))
    gap = error(model(IDS), expected.double())
    assert 0 < gap < 0.1 if int8 else gap <= (0 if dtype == torch.float32 else 0.02)
    assert model.dtype == dtype


def test_adapters_and_int8_weights_follow_the_seed_and_the_base():
    """Drawn matrices have the scale of their input's size."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "dtype": torch.bfloat16}
    first, again, other = (add_adapters(random_model(**shape), 8, 8.0, True, seed) for seed in (1, 1, 2))
    assert same(frozen(first), frozen(again))
    first, again, other = map(adapter_state, (first, again, other))
    assert same(first, again)
    assert same(first, adapter_state(add_adapters(random_model(**shape), 8, 8.0, False, 1)))
    drawn = [name for name in first if name.endswith("lora_a")]
    assert len({float(matrices[name][0, 0]) for matrices in (first, other) for name in drawn}) == 2 * len(
        drawn
    )
    for name in drawn:
        assert first[name].std() * first[name].shape[1] ** 0.5 == pytest.approx(1, abs=0.2), name


def test_an_int8_projection_holds_a_byte_per_weight():
    """Each row has one scale besides."""
    model = add_adapters(random_model(), 2, 2.0, int8=True)
    for _ in range(2):  # before and after a first call
        for name, part in adapters(model):
            base, size = part.base, part.lora_b.shape[0] * part.lora_a.shape[1]
            tensors = [
                base.weight.data,
                base.weight.CB,
                base.weight.SCB,
                *vars(base.state).values(),
                *base.buffers(),
            ]
            storages = [tensor.untyped_storage() for tensor in tensors if torch.is_tensor(tensor)]
            sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
            assert sum(sizes.values()) == size + 4 * part.lora_b.shape[0], name
        with torch.inference_mode():
            model(IDS)


def test_bitsandbytes_is_imported_for_int8_only_and_silent():
    code = (
        "import sys, torch; from model import add_adapters, load_model, plain_state; "
        "plain_state(add_adapters(load_model('tiny')[0], 2, 2.0, int8=False)); "
        "assert 'bitsandbytes' not in sys.modules; "
        "add_adapters(load_model('tiny')[0], 2, 2.0, int8=True).eval()(torch.zeros(1, 2, dtype=torch.int64))"
    )
    done = run_command("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "int8, dtype", [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)]
)
def test_adapters_learn_and_the_base_stays_bit_identical(int8, dtype):
    model = add_adapters(random_model(dtype=dtype), 4, 8.0, int8)
    before, trainer = frozen(model), trainer_for(model)
    assert trainer.optimizer.parameters.keys() == adapter_state(model).keys()
    losses = [sft_step(trainer, SAMPLES, 5e-2)["loss"] for _ in range(12)]
    assert losses[-1] < 0.6 * losses[0]
    assert same(frozen(model), before)
    assert all(part.lora_b.count_nonzero() for _, part in adapters(model))


@BASES
@torch.no_grad()
def test_the_base_with_saved_adapters_is_the_same_model(int8):
    model = fill(add_adapters(random_model(), 3, 5.0, int8))
    saved = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    again = add_adapters(random_model(), 3, 5.0, int8, seed=5)
    optimizer = optimizer_for(again)
    load_adapter_state(again, saved)
    assert same(adapter_state(again), saved)
    assert torch.equal(again(IDS), model(IDS))
    assert all(
        torch.equal(optimizer.pieces[name][0].master.view_as(tensor), tensor)
        for name, tensor in saved.items()
    )


def test_adapters_that_do_not_fit_are_named_and_not_loaded():
    model = add_adapters(random_model(), 3, 5.0, int8=False)
    before = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    name, stranger = (f"model.layers.{layer}.mlp.down_proj.lora_b" for layer in (1, 2))
    good = {key: tensor + 1 for key, tensor in before.items()}
    for changed, named in (
        ({key: tensor for key, tensor in good.items() if key != name}, name),
        (good | {stranger: good[name]}, stranger),
        (good | {name: good[name][:, :2]}, name),
    ):
        with pytest.raises(ModelError, match=f"adapter {named}"):
            load_adapter_state(model, changed)
        assert same(adapter_state(model), before)
    assert adapter_state(random_model()) == {}


@DTYPES
@BASES
def test_the_plain_state_is_the_merged_weights(int8, dtype):
    """A merged weight is rounded once: base and update are added in float32."""
    base = random_model(dtype=dtype)
    before = {name: tensor.clone() for name, tensor in plain_state(base).items()}
    assert same(before, base.state_dict())
    model = fill(add_adapters(base, 3, 5.0, int8))
    merged, parts = plain_state(model), dict(adapters(model))
    assert merged.keys() == before.keys()
    assert all(not tensor.requires_grad for tensor in merged.values())
    for name, tensor in before.items():
        part = parts.get(name.removesuffix(".weight"))
        assert torch.equal(merged[name], part.merged().to(dtype) if part else tensor), name
        if part:
            update = 5 / 3 * (part.lora_b.double() @ part.lora_a.double()).detach()
            assert error(part.merged() - tensor, update) < (0.02 if int8 else 1e-6), name


@pytest.mark.parametrize(("family", "tied"), [("qwen3", True), ("qwen3", False), ("qwen2", True)])
@BASES
@torch.no_grad()
def test_a_saved_adapted_model_is_a_plain_checkpoint(int8, family, tied, tmp_path):
    """It gives the adapted model's logits, here and in transformers."""
    shape = {
        "vocab_size": TINY_TOKENS + 20,
        "hidden_size": 24,
        "intermediate_size": 28,
        "tie_word_embeddings": tied,
    }
    reference = reference_model(family=family, **shape)
    model = add_adapters(same_weights(reference), 4, 8.0, int8)
    fill(model, std=0.1)
    ids = random_ids(2, 15, high=TINY_TOKENS + 20)
    expected = model(ids)
    assert error(expected, reference(ids).logits.double()) > 0.1  # the adapters are not small
    save_model(tmp_path, model, Tokenizer(TINY))
    ours, _ = load_model(tmp_path)
    assert type(ours.model.layers[0].self_attn.q_proj) is nn.Linear
    assert ours.dtype == torch.float32
    assert_close(ours(ids), expected, atol=1e-4)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert_close(theirs(ids).logits, expected, atol=1e-4)
    assert torch.equal(model(ids), expected)  # saving has changed nothing
    assert largest_gap(plain_state(ours), plain_state(model)) == 0

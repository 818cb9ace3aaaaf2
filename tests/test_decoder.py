"""The decoder against transformers: logits, gradients, precision, cached decoding and configuration."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import assert_close, gradients, largest_gap, weights
from reference import FAMILIES, SHAPES, qwen3_file, random_ids, reference_model, same_weights

from experiments.bases.weights import init_weights
from model import KVCache, ModelError, Qwen3, Qwen3Config

SIZES = {  # hidden, intermediate, layers, heads, tied; and parameters, the tied head counted once
    "0.6B": (1024, 3072, 28, 16, True, 596_049_920),
    "1.7B": (2048, 6144, 28, 16, True, 1_720_574_976),
    "8B": (4096, 12288, 36, 32, False, 8_190_735_360),
}
V4 = {  # as transformers 4 writes it
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 83,
    "hidden_size": 44,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 20000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "max_position_embeddings": 512,
    "attention_bias": False,
    "hidden_act": "silu",
    "sliding_window": None,
    "use_sliding_window": False,
    "torch_dtype": "float32",
    "transformers_version": "4.51.0",
}
RENAMED_IN_5 = ("rope_theta", "rope_scaling", "torch_dtype")


def without(config: dict, *names: str) -> dict:
    return {name: value for name, value in config.items() if name not in names}


LLAMA = without(V4, "head_dim", "use_sliding_window")
LLAMA |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 48, "mlp_bias": False}
QWEN2 = without(V4, "head_dim", "attention_bias")
QWEN2 |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 48}
EACH_FAMILY = pytest.mark.parametrize("v4", [V4, QWEN2, LLAMA], ids=lambda v4: v4["model_type"])


def as_v5(v4: dict) -> dict:
    """The same configuration as transformers 5 writes it."""
    rope = {"rope_theta": v4["rope_theta"], "rope_type": "default"}
    layers = ["full_attention"] * v4["num_hidden_layers"]
    return without(v4, *RENAMED_IN_5) | {"rope_parameters": rope, "layer_types": layers, "dtype": "float32"}


def config_of(size: str) -> Qwen3Config:
    *sizes, tied, _ = SIZES[size]
    return Qwen3Config(151936, *sizes, 8, 128, tie_word_embeddings=tied)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_gradients_equal_transformers(name):
    """Logits also with a cache, in chunks; the gradient is that of the cross-entropy, for every parameter."""
    reference = reference_model(**SHAPES[name])
    model = same_weights(reference)
    token_ids = random_ids(3, 37)
    expected = reference(token_ids).logits
    logits = model(token_ids)
    assert expected.std() > 1  # a scale at which 1e-4 is strict
    assert_close(logits, expected, atol=1e-4)
    cache = KVCache(model.config, 3, 37)
    chunks = [model(chunk, cache) for chunk in token_ids.split([20, 1, 1, 15], dim=1)]
    assert_close(torch.cat(chunks, dim=1), expected, atol=1e-4)
    targets = token_ids[:, 1:].flatten()
    for each in (expected, logits):
        F.cross_entropy(each[:, :-1].flatten(0, 1), targets).backward()
    ours = gradients(model)
    theirs = gradients(reference)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert expected.norm() > 0, name
        assert (ours[name] - expected).norm() <= 1e-4 * expected.norm(), name


@torch.no_grad()
def test_bfloat16_is_as_exact_as_in_transformers(tmp_path):
    """At positions this far, angles kept in bfloat16 would be off by whole radians."""
    reference = reference_model(rope_theta=1e4)
    token_ids = random_ids(1, 600)
    exact = reference(token_ids).logits
    reference.save_pretrained(tmp_path)
    # from_pretrained keeps the reference's rotary frequencies in float32; .to(bfloat16) would not
    half = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected_error = (half(token_ids).logits.float() - exact).abs().mean()
    logits = same_weights(reference).to(torch.bfloat16)(token_ids)
    assert logits.dtype == torch.bfloat16
    error = (logits.float() - exact).abs().mean()
    assert 0 < error <= 1.1 * expected_error


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_of_the_published_sizes(size):
    with torch.device("meta"):
        model = Qwen3(config_of(size))
    parameters = SIZES[size][-1]
    assert model.num_parameters() == parameters
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("size", SIZES)
def test_every_published_config_has_its_size(size):
    for kind, positions in {"": 40960, "-Base": 32768}.items():
        hf = json.loads(qwen3_file(f"configs/Qwen3-{size}{kind}.config.json").read_text())
        expected = dataclasses.replace(config_of(size), max_position_embeddings=positions)
        assert Qwen3Config.from_hf(hf) == expected


@EACH_FAMILY
@pytest.mark.parametrize("spelling", [dict, as_v5])
@torch.no_grad()
def test_both_generations_of_config_json_give_one_decoder(spelling, v4):
    """It is the decoder that transformers builds."""
    config_class, model_class = FAMILIES[v4["model_type"]]
    reference = model_class(config_class.from_dict(spelling(v4))).eval()
    model = same_weights(reference)
    assert Qwen3Config.from_hf(spelling(v4)) == Qwen3Config.from_hf(v4) == model.config
    assert model.config.rope_theta == 20000
    token_ids = random_ids(1, 40)
    assert_close(model(token_ids), reference(token_ids).logits, atol=1e-4)


@EACH_FAMILY
def test_a_written_config_is_read_back_the_same(v4):
    """Transformers reads the same from it."""
    config = Qwen3Config.from_hf(v4 | {"tie_word_embeddings": True, "rms_norm_eps": 3e-5})
    written = json.loads(json.dumps(config.to_hf("bfloat16", eos_token_id=5)))
    theirs = FAMILIES[v4["model_type"]][0].from_dict(written)
    assert written["architectures"] == v4["architectures"]
    assert Qwen3Config.from_hf(written) == Qwen3Config.from_hf(theirs.to_dict()) == config
    assert theirs.dtype in ("bfloat16", torch.bfloat16)
    assert theirs.eos_token_id == 5


@EACH_FAMILY
@pytest.mark.parametrize("spelling", [dict, as_v5])
def test_a_missing_field_is_refused_or_read_as_in_transformers(spelling, v4):
    for name in v4.keys() - {"model_type", "max_position_embeddings"}:  # the latter changes no logits
        spelled = "rope_parameters" if spelling is as_v5 and name == "rope_theta" else name
        hf = without(spelling(v4), spelled)
        try:
            config = Qwen3Config.from_hf(hf)
        except ModelError as error:
            assert name in str(error)
        else:
            theirs = FAMILIES[v4["model_type"]][0].from_dict(hf)
            assert config == Qwen3Config.from_hf(theirs.to_dict()), name


YARN = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}
LINEAR = {"rope_theta": 1e6, "type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("model_type", ["mistral", ["qwen3"], None]),
        ("rope_scaling", [YARN, {"rope_type": "llama3", "factor": 32.0}]),
        ("rope_parameters", [YARN, LINEAR, "default"]),
        ("use_sliding_window", [True]),
        ("layer_types", [["full_attention", "sliding_attention"], 7]),
        ("attention_bias", [True]),
        ("mlp_bias", [True]),
        ("hidden_act", ["gelu"]),
        ("num_attention_heads", [7]),  # with 2 key-value heads
        ("head_dim", [15]),
        ("tie_word_embeddings", ["yes"]),
        ("rms_norm_eps", [0, "1e-6"]),
        ("rope_theta", [float("nan"), float("inf"), -1e6, True]),
    ],
)
def test_what_the_decoder_does_not_implement_is_refused_by_name(field, values):
    for value in values:
        with pytest.raises(ModelError, match=rf"^config: .*{field}"):
            Qwen3Config.from_hf(V4 | {field: value})


def test_null_head_sizes_mean_what_they_mean_in_transformers():
    hf = LLAMA | {"head_dim": None, "num_key_value_heads": None}
    config = Qwen3Config.from_hf(hf)
    assert config == Qwen3Config.from_hf(transformers.LlamaConfig.from_dict(hf).to_dict())
    assert config.head_dim == 8


def test_a_size_that_is_no_positive_integer_is_refused():
    names = [field.name for field in dataclasses.fields(Qwen3Config) if field.type is int]
    assert len(names) == 8
    for name in names:
        for value in (0, 2.0, True, "2", [2]):
            with pytest.raises(ModelError, match=f"{name} must be a whole number, 1 to"):
                Qwen3Config.from_hf(V4 | {name: value})


def test_fresh_weights_follow_the_seed_and_leave_no_weight_out():
    config = Qwen3Config.from_hf(V4)
    drawn = []
    for seed in (0, 0, 1):
        model = Qwen3(config)
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        drawn.append(weights(init_weights(model, seed, std=0.05)))
    first, again, other = drawn
    assert largest_gap(first, again) == 0
    for name, weight in first.items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            assert weight.std().item() == pytest.approx(0.05, rel=0.1)
            assert not torch.equal(weight, other[name])

"""The decoder against transformers: logits, gradients, precision, cached decoding and configuration."""

import dataclasses
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import assert_close, gradients
from reference import FAMILIES, SHAPES, qwen3_file, random_ids, reference_model, same_weights

from experiments.bases.weights import init_weights
from model import KVCache, ModelError, Qwen3, Qwen3Config

SIZES = {  # hidden, layers, heads, intermediate, tied -> parameters, the tied head counted once
    "0.6B": ((1024, 28, 16, 3072, True), 596_049_920),
    "1.7B": ((2048, 28, 16, 6144, True), 1_720_574_976),
    "4B": ((2560, 36, 32, 9728, True), 4_022_468_096),
    "8B": ((4096, 36, 32, 12288, False), 8_190_735_360),
    "14B": ((5120, 40, 40, 17408, False), 14_768_307_200),
    "32B": ((5120, 64, 64, 25600, False), 32_762_123_264),
}
PUBLISHED = [f"Qwen3-{size}{kind}" for size in SIZES for kind in ("", "-Base") if size + kind != "32B-Base"]
V4 = {  # as transformers 4 writes it
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 83, "hidden_size": 44,
    "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-06, "rope_theta": 20000.0, "rope_scaling": None, "tie_word_embeddings": False,
    "max_position_embeddings": 512, "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
    "initializer_range": 0.02, "max_window_layers": 2, "sliding_window": None, "use_sliding_window": False,
    "torch_dtype": "float32", "transformers_version": "4.51.0", "use_cache": True,
}  # fmt: skip


LLAMA = {
    name: value
    for name, value in V4.items()
    if name not in ("head_dim", "use_sliding_window", "max_window_layers")
}
LLAMA |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 48, "mlp_bias": False}
QWEN2 = {name: value for name, value in V4.items() if name not in ("head_dim", "attention_bias")}
QWEN2 |= {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 48,
    "sliding_window": 4096,
}


def as_v5(v4: dict) -> dict:
    """The same configuration as transformers 5 writes it."""
    v5 = {
        name: value for name, value in v4.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    return v5 | {
        "rope_parameters": {"rope_theta": v4["rope_theta"], "rope_type": "default"},
        "layer_types": ["full_attention"] * v4["num_hidden_layers"],
        "dtype": "float32",
    }


def config_of(size: str) -> Qwen3Config:
    hidden, layers, heads, intermediate, tied = SIZES[size][0]
    return Qwen3Config(151936, hidden, intermediate, layers, heads, 8, 128, tie_word_embeddings=tied)


@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_logits_equal_transformers(name):
    reference = reference_model(**SHAPES[name])
    token_ids = random_ids(3, 37)
    expected = reference(token_ids).logits
    logits = same_weights(reference)(token_ids)
    assert expected.std() > 1  # a scale at which 1e-4 is strict
    assert_close(logits, expected, atol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_equal_those_of_transformers(name):
    """The gradient of the cross-entropy, for every parameter."""
    reference = reference_model(seed=1, **SHAPES[name])
    model = same_weights(reference)
    token_ids = random_ids(2, 19)
    for logits in (reference(token_ids).logits, model(token_ids)):
        F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten()).backward()
    ours, theirs = gradients(model), gradients(reference)
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert expected.norm() > 0, name
        assert (ours[name] - expected).norm() <= 1e-4 * expected.norm(), name


def test_bfloat16_is_as_exact_as_in_transformers(tmp_path):
    reference = reference_model(seed=2, rope_theta=1e4, num_hidden_layers=3)
    reference.save_pretrained(tmp_path)
    token_ids = random_ids(
        2, 900
    )  # at positions this far, angles kept in bfloat16 would be off by whole radians
    # from_pretrained keeps the reference's rotary frequencies in float32; .to(bfloat16) would not
    half = transformers.Qwen3ForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation="eager"
    )
    with torch.no_grad():
        exact = reference(token_ids).logits
        expected_error = (half(token_ids).logits.float() - exact).abs().mean()
        logits = same_weights(reference).to(torch.bfloat16)(token_ids)
    assert logits.dtype == torch.bfloat16
    error = (logits.float() - exact).abs().mean()
    assert 0 < error <= 1.1 * expected_error


@pytest.mark.parametrize("chunks", [[1] * 17, [7, 1, 1, 5, 3], [17]], ids=str)
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_cached_equals_uncached_in_chunks_of_any_size(name, chunks):
    model = same_weights(reference_model(seed=3, **SHAPES[name]))
    token_ids = random_ids(3, 17)
    cache = KVCache(model.config, 3, 17 + len(chunks) % 3)  # with room to spare, or without
    logits = torch.cat([model(chunk, cache) for chunk in token_ids.split(chunks, dim=1)], dim=1)
    assert_close(logits, model(token_ids), atol=1e-4)


def test_parameter_counts_of_the_published_sizes():
    for size, (_, parameters) in SIZES.items():
        with torch.device("meta"):
            model = Qwen3(config_of(size))
        assert model.num_parameters() == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_config_builds_what_transformers_builds(name):
    hf = json.loads(qwen3_file(f"configs/{name}.config.json").read_text())
    config = Qwen3Config.from_hf(hf)
    base = name.endswith("-Base")
    expected = dataclasses.replace(
        config_of(name.split("-")[1]), max_position_embeddings=32768 if base else 40960
    )
    assert config == expected
    with torch.device("meta"):
        reference = transformers.Qwen3ForCausalLM(transformers.Qwen3Config.from_dict(hf))
        model = Qwen3(config)
    ours, theirs = ({name: p.shape for name, p in either.named_parameters()} for either in (model, reference))
    assert ours == theirs


@pytest.mark.parametrize("v4", [V4, QWEN2, LLAMA], ids=lambda v4: v4["model_type"])
@torch.no_grad()
def test_both_generations_of_config_json_give_one_decoder(v4):
    """It is the decoder that transformers builds."""
    config = Qwen3Config.from_hf(v4)
    assert (config.rope_theta, config.tie_word_embeddings) == (20000.0, False)
    token_ids = random_ids(1, 40)
    config_class, model_class = FAMILIES[v4["model_type"]]
    for hf in (v4, as_v5(v4)):
        assert Qwen3Config.from_hf(hf) == config
        reference = model_class(config_class.from_dict(hf)).eval()
        model = Qwen3(config)
        model.load_state_dict(reference.state_dict())
        assert_close(model(token_ids), reference(token_ids).logits, atol=1e-4)


@pytest.mark.parametrize("v4", [V4, QWEN2, LLAMA], ids=lambda v4: v4["model_type"])
def test_a_written_config_is_read_back_the_same(v4):
    """Transformers reads the same from it."""
    config = Qwen3Config.from_hf(v4 | {"tie_word_embeddings": True, "rms_norm_eps": 3e-5})
    written = json.loads(json.dumps(config.to_hf("bfloat16", eos_token_id=5)))
    theirs = FAMILIES[written["model_type"]][0].from_dict(written)
    assert written["architectures"] == v4["architectures"]
    assert Qwen3Config.from_hf(written) == Qwen3Config.from_hf(theirs.to_dict()) == config
    assert (str(theirs.dtype).removeprefix("torch."), theirs.eos_token_id) == ("bfloat16", 5)


@pytest.mark.parametrize("v4", [V4, QWEN2, LLAMA], ids=lambda v4: v4["model_type"])
@pytest.mark.parametrize("spelling", [dict, as_v5])
def test_a_missing_field_is_refused_or_read_as_in_transformers(spelling, v4):
    for name in v4.keys() - {"model_type", "max_position_embeddings"}:  # the latter changes no logits
        hf = spelling(v4)
        hf.pop("rope_parameters" if name == "rope_theta" and spelling is as_v5 else name, None)
        try:
            config = Qwen3Config.from_hf(hf)
        except ModelError as error:
            assert name in str(error)
        else:
            theirs = FAMILIES[v4["model_type"]][0].from_dict(hf)
            assert config == Qwen3Config.from_hf(theirs.to_dict()), name


def test_what_the_decoder_does_not_implement_is_refused_by_name():
    yarn = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0}
    for field, values in {
        "model_type": ["mistral", "qwen3_moe", ["qwen3"], None],
        "rope_scaling": [yarn],
        "rope_parameters": [yarn, {"rope_theta": 1e6, "type": "linear", "factor": 4.0}, "default"],
        "use_sliding_window": [True],
        "layer_types": [["full_attention", "sliding_attention"], 7],
        "attention_bias": [True],
        "mlp_bias": [True],
        "hidden_act": ["gelu"],
        "num_attention_heads": [7],  # with 2 key-value heads
        "head_dim": [15],
        "tie_word_embeddings": ["yes"],
        "rms_norm_eps": [0, "1e-6"],
        "rope_theta": [float("nan"), float("inf"), -1e6, True],
    }.items():
        for value in values:
            with pytest.raises(ModelError, match=rf"^config: .*{field}"):
                Qwen3Config.from_hf(V4 | {field: value})


def test_null_head_sizes_mean_what_they_mean_in_transformers():
    hf = LLAMA | {"head_dim": None, "num_key_value_heads": None}
    config = Qwen3Config.from_hf(hf)
    assert (config.head_dim, config.num_key_value_heads) == (8, 6)
    assert config == Qwen3Config.from_hf(transformers.LlamaConfig.from_dict(hf).to_dict())


def test_llama_3_is_refused_for_its_scaled_positions():
    scaled = {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}
    with pytest.raises(ModelError, match="^config: rope_scaling .*llama3.* is not supported"):
        Qwen3Config.from_hf(LLAMA | {"rope_scaling": scaled})


def test_a_size_that_is_no_positive_integer_is_refused():
    names = [field.name for field in dataclasses.fields(Qwen3Config) if field.type is int]
    assert len(names) == 8
    for name, value in itertools.product(names, (0, 2.0, True, "2", [2])):
        with pytest.raises(ModelError, match=f"{name} must be a whole number, 1 to"):
            Qwen3Config.from_hf(V4 | {name: value})


@pytest.mark.parametrize("tied", [True, False])
def test_fresh_weights_follow_the_seed_and_leave_no_weight_out(tied):
    config = dataclasses.replace(Qwen3Config.from_hf(V4), tie_word_embeddings=tied)
    models = [Qwen3(config) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1)):
        for weight in model.parameters():
            weight.data.fill_(torch.nan)
        init_weights(model, seed, std=0.05)
    for weight, again, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(weight, again)
        assert torch.equal(weight, other) == (weight.dim() == 1)
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            assert weight.std().item() == pytest.approx(0.05, rel=0.1)
            assert abs(weight.mean().item()) < 0.005

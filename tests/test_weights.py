"""Checkpoints: transformers loads what we save, we load what it saves, and a broken folder is named."""

import json
import os
import pickle
import shutil
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from helpers import Hub, assert_close, largest_gap
from reference import FAMILIES, TINY, TINY_TOKENS, copy_tokenizer, random_ids, reference_model, same_weights

from model import ModelError, Tokenizer, load_model, save_model
from model.weights import DOWNLOADED

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
IDS = random_ids(2, 15, high=TINY_TOKENS + 20)


def make_reference(tied: bool, seed: int = 0, family: str = "qwen3") -> transformers.PreTrainedModel:
    shape = {"vocab_size": TINY_TOKENS + 20, "hidden_size": 24, "intermediate_size": 28}
    return reference_model(
        seed, family, **shape, rope_theta=777.0, rms_norm_eps=1e-5, tie_word_embeddings=tied
    )


@torch.no_grad()
def logits_of_folder(folder) -> torch.Tensor:
    """What transformers makes of a folder."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    return model(IDS).logits


@pytest.fixture
def folder(tmp_path):
    """A complete untied checkpoint as transformers writes it, in one file."""
    copy_tokenizer(tmp_path / "checkpoint")
    make_reference(tied=False).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refusal(source, **options) -> str:
    """The one-line message with which `load_model` refuses `source`."""
    with pytest.raises(ModelError) as error:
        load_model(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_what_we_save_gives_the_same_logits_elsewhere_and_here(tied, family, tmp_path):
    """Elsewhere: in transformers."""
    model = same_weights(make_reference(tied, family=family))
    save_model(tmp_path / "a" / "b", model, Tokenizer(TINY))
    assert_close(logits_of_folder(tmp_path / "a" / "b"), model(IDS), atol=1e-4)
    again, tokenizer = load_model(tmp_path / "a" / "b")
    assert again.config == model.config
    assert largest_gap(again.state_dict(), model.state_dict()) == 0
    stored = safetensors.torch.load_file(tmp_path / "a" / "b" / "model.safetensors")
    assert (HEAD in stored) == (not tied)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a" / "b")
    assert theirs.encode("12 + é = ?<|im_end|>") == tokenizer.encode("12 + é = ?<|im_end|>")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
@torch.no_grad()
def test_what_transformers_saves_gives_the_same_logits_here(tied, shards, family, tmp_path):
    reference = make_reference(tied, family=family)
    reference.save_pretrained(tmp_path, max_shard_size="5GB" if shards == 1 else "40KB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards > 1)
    model, _ = load_model(copy_tokenizer(tmp_path))
    assert_close(model(IDS), reference(IDS).logits, atol=1e-4)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all(parameter.requires_grad for parameter in model.parameters())
    sorted(tmp_path.glob("*.safetensors"))[-1].unlink()
    assert refusal(tmp_path).startswith(f"{tmp_path}: {'no model.safetensors' if shards == 1 else 'weight '}")


@torch.no_grad()
def test_a_tied_checkpoint_may_have_a_copy_of_its_head(tmp_path):
    """Another head is refused."""
    reference = make_reference(tied=True)
    reference.save_pretrained(copy_tokenizer(tmp_path))
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file(weights | {HEAD: weights[EMBEDDING].clone()}, path)
    model, _ = load_model(tmp_path)
    assert_close(model(IDS), reference(IDS).logits, atol=1e-4)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    safetensors.torch.save_file(weights | {HEAD: weights[EMBEDDING] + 1e-3}, path)
    assert refusal(tmp_path) == f"{tmp_path}: {HEAD} differs from {EMBEDDING}, though config.json ties them"


@torch.no_grad()
def test_saving_over_its_own_folder_keeps_model_and_stops(folder):
    """Other tools are told where to stop, too."""
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 9, "top_k": 20, "temperature": 0.6})
    )
    model, tokenizer = load_model(folder)
    expected = model(IDS)
    save_model(folder, model, tokenizer)
    assert torch.equal(load_model(folder)[0](IDS), expected)
    assert torch.equal(model(IDS), expected)
    theirs = transformers.GenerationConfig.from_pretrained(folder)
    assert set(theirs.eos_token_id) == set(tokenizer.stop_token_ids) == {9, *Tokenizer(TINY).stop_token_ids}
    assert (theirs.top_k, theirs.temperature) == (20, 0.6)
    assert Tokenizer(folder).stop_token_ids == tokenizer.stop_token_ids


def test_a_loaded_model_knows_its_vocabulary_size(folder):
    """The vocabulary must fit the embedding."""
    model, tokenizer = load_model(folder)
    assert (model.num_tokens, len(tokenizer), model.config.vocab_size) == (
        TINY_TOKENS,
        TINY_TOKENS,
        TINY_TOKENS + 20,
    )
    small = reference_model(vocab_size=TINY_TOKENS - 1, hidden_size=20)
    small.save_pretrained(folder)
    assert refusal(folder) == f"{folder}: {TINY_TOKENS} tokens but only {TINY_TOKENS - 1} embedding rows"


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_weights_keep_the_dtype_that_the_config_names(field, folder):
    """The caller may name another."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype")
    (folder / "config.json").write_text(json.dumps(config | {field: "bfloat16"}))
    exact, _ = load_model(folder, dtype=torch.float32)
    half, tokenizer = load_model(folder)
    assert {parameter.dtype for parameter in exact.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert largest_gap(half.state_dict(), exact.bfloat16().state_dict()) == 0
    save_model(folder / "copy", half, tokenizer)
    assert load_model(folder / "copy")[0].dtype == torch.bfloat16
    assert (
        transformers.AutoModelForCausalLM.from_pretrained(folder / "copy", dtype="auto").dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad, folder):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    weights[NORM][-1] = bad
    safetensors.torch.save_file(weights, path)
    assert refusal(folder) == f"{path}: {NORM} holds values that are not finite (NaN or infinity)"


def test_rotary_frequencies_that_old_llamas_stored_are_ignored(folder):
    path = folder / "model.safetensors"
    frequencies = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.rand(8)}
    safetensors.torch.save_file(safetensors.torch.load_file(path) | frequencies, path)
    assert_close(load_model(folder)[0](IDS), logits_of_folder(folder), atol=1e-4)


def test_a_wrong_or_missing_weight_is_named(folder):
    """It may be missing, unexpected or misshapen."""
    path = folder / "model.safetensors"
    whole = safetensors.torch.load_file(path)
    up, gate, bias = (
        f"model.layers.0.mlp.{name}" for name in ("up_proj.weight", "gate_proj.weight", "up_proj.bias")
    )
    cases = [
        ({NORM: None}, f"{folder}: weight {NORM} missing"),
        ({HEAD: None}, f"{folder}: weight {HEAD} missing"),  # the checkpoint is untied
        ({NORM: None, up: None}, f"{folder}: weight {up} and 1 more missing"),
        ({bias: torch.zeros(28)}, f"{path}: unexpected weight {bias}"),
        ({gate: whole[gate].T.contiguous()}, f"{path}: {gate} is [24, 28], config.json says [28, 24]"),
    ]
    for name in (EMBEDDING, NORM):
        shape, cut = list(whole[name].shape), whole[name][1:].clone()
        cases.append(({name: cut}, f"{path}: {name} is {list(cut.shape)}, config.json says {shape}"))
    for change, message in cases:
        weights = {name: tensor for name, tensor in (whole | change).items() if tensor is not None}
        safetensors.torch.save_file(weights, path, metadata={"format": "pt"})
        assert refusal(folder) == message


def test_a_cut_or_lying_weight_file_is_refused(folder):
    """No memory is taken, though its header claims terabytes."""
    path = folder / "model.safetensors"
    sound = path.read_bytes()
    header = json.dumps({NORM: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    claims = [len(header).to_bytes(8, "little") + header + b"\0" * 64, (2**60).to_bytes(8, "little") + b"{}"]
    for content in [*claims, *(sound[:kept] for kept in (0, 4, 100, -1, -1000))]:
        path.write_bytes(content)
        assert refusal(folder).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    assert refusal(folder) == f"{folder}: no {name}"


def test_an_unusable_value_in_the_config_is_named_with_its_file(folder):
    """It is named before anything is built."""
    path = folder / "config.json"
    sound = path.read_text()
    sizes = [("num_hidden_layers", 10**12), ("vocab_size", 10**4000), ("head_dim", 10**6), ("vocab_size", 0)]
    dtypes = [("dtype", value) for value in ("int8", "float33", ["float32"], 32)]
    for name, value in [*sizes, *dtypes, ("model_type", "mistral"), ("rope_parameters", 3)]:
        path.write_text(json.dumps(json.loads(sound) | {name: value}))
        message = refusal(folder)
        assert message.startswith(f"{path}: ")
        assert name in message
        assert len(message) < 300
        assert "must be a whole number, 1 to" in message or (name, value) not in sizes


def test_an_index_is_not_read_so_it_cannot_reach_outside_its_folder(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    index = {"weight_map": {NORM: "../model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(folder) == f"{folder}: no model.safetensors"


def test_shards_of_two_saves_are_not_mixed(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    load_model(folder)  # a whole file comes first
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert "is in another file too; remove files of earlier saves" in refusal(folder)


def test_no_pickle_is_ever_read(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    bomb = pickle.dumps(Bomb())
    (folder / "pytorch_model.bin").write_bytes(bomb)
    (folder / "model.safetensors").write_bytes(bomb)
    assert str(folder / "model.safetensors") in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"{folder}: no model.safetensors"
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)  # the bomb is live
    assert (tmp_path / "exploded").exists()


def test_a_hub_id_is_fetched_at_its_revision_without_pickles(folder, monkeypatch):
    hub = Hub(folder)
    hub.put_in_place(monkeypatch)
    model, _ = load_model("Qwen/Qwen3-0.6B", revision="abc123")
    with torch.no_grad():
        assert_close(model(IDS), logits_of_folder(folder), atol=1e-4)
    load_model("Qwen/Qwen3-0.6B")
    options = [{"allow_patterns": DOWNLOADED, "revision": revision} for revision in ("abc123", None)]
    assert hub.downloads == [("Qwen/Qwen3-0.6B", each) for each in options]
    assert {Path(pattern).suffix for pattern in DOWNLOADED} == {".safetensors", ".json", ".jinja"}


@pytest.mark.parametrize(
    "error", [OSError("no network\nhint\nhint"), RuntimeError(), ValueError("gated")], ids=repr
)
def test_a_failed_download_is_one_line_that_says_what_to_do(error, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mock.Mock(side_effect=error))
    message = refusal("Qwen/Qwen3-0.6B", revision="v2")
    assert message.startswith("Qwen/Qwen3-0.6B at revision v2 ")
    assert (str(error).split("\n")[0] or "RuntimeError") in message
    assert "tiny" in message


def test_what_cannot_be_a_hub_id_is_never_looked_up_on_the_hub(folder, monkeypatch, tmp_path):
    hub = Hub(folder)
    hub.put_in_place(monkeypatch)
    monkeypatch.chdir(tmp_path)
    for source in ("nowhere", "./no/where", "../nowhere", "/nowhere", "a/b/c", "~/nowhere-at-all"):
        assert f"no such model folder: {source}" in refusal(source)
    assert "no such model folder" in refusal(folder / "model.safetensors")
    assert hub.downloads == []

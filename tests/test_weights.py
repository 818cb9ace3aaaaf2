"""Checkpoints: transformers loads what we save, we load what it saves, and a broken folder is named."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
import transformers
from helpers import Hub, assert_close, largest_gap
from reference import TINY, TINY_TOKENS, copy_tokenizer, random_ids, reference_model, same_weights
from safetensors.torch import load_file, save_file

from model import ModelError, Tokenizer, load_model, save_model
from model.weights import DOWNLOADED

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
VOCAB = TINY_TOKENS + 20
IDS = random_ids(2, 15, high=VOCAB)
FAMILIES = pytest.mark.parametrize(
    ("family", "tied"), [("qwen3", True), ("qwen3", False), ("qwen2", True), ("llama", False)]
)


def make_reference(tied: bool, family: str = "qwen3") -> transformers.PreTrainedModel:
    shape = {"vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 28, "tie_word_embeddings": tied}
    return reference_model(family=family, **shape, rope_theta=777.0, rms_norm_eps=1e-5)


@torch.no_grad()
def logits_of_folder(folder):
    """What transformers makes of a folder."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """A complete untied checkpoint as transformers writes it, in one file."""
    folder = copy_tokenizer(tmp_path_factory.mktemp("untouched"))
    make_reference(tied=False).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(untouched, tmp_path):
    return shutil.copytree(untouched, tmp_path / "checkpoint")


def refusal(source, **options) -> str:
    """The one-line message with which `load_model` refuses `source`."""
    with pytest.raises(ModelError) as error:
        load_model(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def change(path: Path, **tensors) -> None:
    """Give weights in a safetensors file other values; None removes one."""
    changed = load_file(path) | tensors
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, path)


@FAMILIES
@torch.no_grad()
def test_what_we_save_gives_the_same_logits_elsewhere_and_here(family, tied, tmp_path):
    """Elsewhere: in transformers."""
    folder = tmp_path / "a" / "b"
    model = same_weights(make_reference(tied, family))
    save_model(folder, model, Tokenizer(TINY))
    assert_close(logits_of_folder(folder), model(IDS), atol=1e-4)
    again, _ = load_model(folder)
    assert again.config == model.config
    assert largest_gap(again.state_dict(), model.state_dict()) == 0
    assert (HEAD in load_file(folder / "model.safetensors")) == (not tied)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.encode("12 + é = ?<|im_end|>") == Tokenizer(TINY).encode("12 + é = ?<|im_end|>")


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
@FAMILIES
@torch.no_grad()
def test_what_transformers_saves_gives_the_same_logits_here(family, tied, shard, tmp_path):
    reference = make_reference(tied, family)
    reference.save_pretrained(copy_tokenizer(tmp_path), max_shard_size=shard)
    model, _ = load_model(tmp_path)
    assert_close(model(IDS), reference(IDS).logits, atol=1e-4)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_weight_of_a_missing_shard_is_named(tmp_path):
    make_reference(tied=True).save_pretrained(copy_tokenizer(tmp_path), max_shard_size="40KB")
    *others, last = sorted(tmp_path.glob("*.safetensors"))
    assert others
    last.unlink()
    assert re.fullmatch(rf"{tmp_path}: weight model\.\S+ and \d+ more missing", refusal(tmp_path))


def test_a_tied_checkpoint_may_have_a_copy_of_its_head(tmp_path):
    """Another head is refused."""
    make_reference(tied=True).save_pretrained(copy_tokenizer(tmp_path))
    path = tmp_path / "model.safetensors"
    embedding = load_file(path)[EMBEDDING]
    change(path, **{HEAD: embedding.clone()})
    model, _ = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, embedding)
    change(path, **{HEAD: embedding + 1e-3})
    assert refusal(tmp_path).startswith(f"{tmp_path}: {HEAD} differs from {EMBEDDING}")


@torch.no_grad()
def test_saving_over_its_own_folder_keeps_model_and_stops(folder):
    """Other tools are told where to stop, too."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 9, "top_k": 20}))
    model, tokenizer = load_model(folder)
    expected = model(IDS)
    save_model(folder, model, tokenizer)
    again, _ = load_model(folder)
    assert torch.equal(again(IDS), expected)
    assert torch.equal(model(IDS), expected)
    theirs = transformers.GenerationConfig.from_pretrained(folder)
    assert set(theirs.eos_token_id) == {9, *Tokenizer(TINY).stop_token_ids}
    assert theirs.top_k == 20


def rewrite_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_loaded_model_knows_its_vocabulary_size(folder):
    """It must fit the embedding."""
    model, tokenizer = load_model(folder)
    assert model.num_tokens == len(tokenizer) == TINY_TOKENS
    rewrite_config(folder, vocab_size=TINY_TOKENS - 1)
    assert refusal(folder) == f"{folder}: {TINY_TOKENS} tokens but only {TINY_TOKENS - 1} embedding rows"


@pytest.mark.parametrize("named", [{"dtype": "bfloat16"}, {"dtype": None, "torch_dtype": "bfloat16"}])
def test_weights_keep_the_dtype_that_the_config_names(named, folder):
    """The caller may name another."""
    rewrite_config(folder, **named)
    exact, _ = load_model(folder, dtype=torch.float32)
    half, tokenizer = load_model(folder)
    assert {parameter.dtype for parameter in exact.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert largest_gap(half.state_dict(), exact.bfloat16().state_dict()) == 0
    save_model(folder, half, tokenizer)
    assert load_model(folder)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad, folder):
    path = folder / "model.safetensors"
    change(path, **{NORM: torch.tensor([1.0] * 23 + [bad])})
    assert refusal(folder).startswith(f"{path}: {NORM} holds values that are not finite")


def test_rotary_frequencies_that_old_llamas_stored_are_ignored(folder):
    before = load_model(folder)[0](IDS)
    change(folder / "model.safetensors", **{"model.layers.1.self_attn.rotary_emb.inv_freq": torch.rand(8)})
    assert torch.equal(load_model(folder)[0](IDS), before)


LAYER = "model.layers.0.mlp"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({NORM: None}, f": weight {NORM} missing"),
        ({HEAD: None}, f": weight {HEAD} missing"),  # the checkpoint is untied
        ({NORM: None, HEAD: None}, f": weight {NORM} and 1 more missing"),
        ({f"{LAYER}.up_proj.bias": torch.zeros(28)}, f": unexpected weight {LAYER}.up_proj.bias"),
        ({f"{LAYER}.gate_proj.weight": torch.zeros(24, 28)}, " is [24, 28], config.json says [28, 24]"),
        ({NORM: torch.zeros(23)}, f"{NORM} is [23], config.json says [24]"),
    ],
)
def test_a_wrong_or_missing_weight_is_named(changed, message, folder):
    change(folder / "model.safetensors", **changed)
    found = refusal(folder)
    assert found.startswith(str(folder))
    assert message in found


def test_a_cut_or_lying_weight_file_is_refused(folder):
    """No memory is taken, though its header claims terabytes."""
    path = folder / "model.safetensors"
    sound = path.read_bytes()
    header = json.dumps({NORM: {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    claim = len(header).to_bytes(8, "little") + header + bytes(64)
    long_header = (2**60).to_bytes(8, "little") + b"{}"
    for content in (claim, long_header, b"", sound[:4], sound[:100], sound[:-1]):
        path.write_bytes(content)
        assert refusal(folder).startswith(f"{path}: ")


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_missing_file_is_named(name, folder):
    (folder / name).unlink()
    assert refusal(folder) == f"{folder}: no {name}"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_hidden_layers", 10**12, "must be a whole number, 1 to"),
        ("dtype", "int8", "not one of"),
        ("dtype", ["float32"], "not one of"),
        ("model_type", "mistral", "not supported"),
        ("rope_parameters", 3, "not supported"),
    ],
    ids=range(5),
)
def test_an_unusable_value_in_the_config_is_named_with_its_file(name, value, message, folder):
    """It is named before anything is built."""
    rewrite_config(folder, **{name: value})
    found = refusal(folder)
    assert found.startswith(f"{folder}/config.json: ")
    assert name in found
    assert message in found
    assert len(found) < 300


def test_an_index_cannot_reach_outside_its_folder(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    index = {"weight_map": {NORM: "../model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(folder) == f"{folder}: no model.safetensors"


def test_shards_of_two_saves_are_not_mixed(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    load_model(folder)  # a whole file comes first
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    assert "is in another file too; remove files of earlier saves" in refusal(folder)


class Bomb(str):
    """What a pickle of it does shows that it was read: it makes a folder."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


def test_no_pickle_is_ever_read(folder, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    (folder / "pytorch_model.bin").write_bytes(bomb)
    (folder / "model.safetensors").write_bytes(bomb)
    assert str(folder / "model.safetensors") in refusal(folder)
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"{folder}: no model.safetensors"
    pickle.loads(bomb)  # which fails if it has exploded before
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("revision", ["abc123", None])
def test_a_hub_id_is_fetched_at_its_revision_without_pickles(revision, folder, monkeypatch):
    hub = Hub(folder)
    hub.put_in_place(monkeypatch)
    load_model("Qwen/Qwen3-0.6B", revision=revision)
    [(name, options)] = hub.downloads
    assert name == "Qwen/Qwen3-0.6B"
    assert options == {"allow_patterns": DOWNLOADED, "revision": revision}
    assert {Path(pattern).suffix for pattern in DOWNLOADED} == {".safetensors", ".json", ".jinja"}


@pytest.mark.parametrize(
    ("error", "reason"), [(OSError("no network\nhint\nhint"), "no network"), (RuntimeError(), "RuntimeError")]
)
def test_a_failed_download_is_one_line_that_says_what_to_do(error, reason, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", mock.Mock(side_effect=error))
    message = refusal("Qwen/Qwen3-0.6B", revision="v2")
    assert message.startswith("Qwen/Qwen3-0.6B at revision v2 ")
    assert reason in message
    assert "--model tiny" in message


def test_what_cannot_be_a_hub_id_is_never_looked_up_on_the_hub(folder, monkeypatch):
    hub = Hub(folder)
    hub.put_in_place(monkeypatch)
    for source in ("nowhere", "./no/where", "../nowhere", "/nowhere", "a/b/c", "~/nowhere-at-all"):
        assert f"no such model folder: {source}" in refusal(source)
    assert "no such model folder" in refusal(folder / "model.safetensors")
    assert hub.downloads == []

"""Random models of transformers, the independent reference, and their weights in this project's decoder."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from model import Qwen3, Qwen3Config, Tokenizer

ROOT = Path(__file__).parent.parent
TINY = ROOT / "model" / "tiny"
TINY_TOKENS = len(Tokenizer(TINY))
FILES = Path(os.environ.get("QWEN3_FILES", ROOT.parent / "shared" / "qwen3"))

SHAPE = {
    "vocab_size": 83,
    "hidden_size": 44,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "max_position_embeddings": 1024,
    "attn_implementation": "eager",
}
# Sizes are unequal on purpose, so that no two axes can be swapped unseen.
SHAPES = {
    "grouped_tied": {"tie_word_embeddings": True},
    "one_kv_head": {
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 14,
        "rope_theta": 1e4,
        "num_hidden_layers": 3,
    },
    "every_head_its_own": {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "rms_norm_eps": 0.05,
    },
    "wide_heads": {
        "hidden_size": 24,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
    "qwen2": {"family": "qwen2"},
    "llama": {
        "family": "llama",
        "hidden_size": 36,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 4,
        "tie_word_embeddings": True,
    },
}
NO_THINKING = {"<think>": "<idea>", "</think>": "</idea>"}  # for `changed_tokenizer`
FAMILIES = {
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
}


def reference_model(seed: int = 0, family: str = "qwen3", **shape) -> transformers.PreTrainedModel:
    """A random transformers model of a family, float32 and eager, at a scale where every part of the
    arithmetic shows.

    Norm weights and biases are drawn from [0.5, 2]: all ones or zeros would hide one in the wrong place.
    """
    shape = SHAPE | shape
    rope_theta = shape.pop("rope_theta", 1e6)
    config_class, model_class = FAMILIES[family]
    config = config_class(**shape, rope_parameters={"rope_theta": rope_theta, "rope_type": "default"})
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3, generator=generator)
        else:
            parameter.data.uniform_(0.5, 2.0, generator=generator)
    return model


def same_weights(reference: transformers.PreTrainedModel) -> Qwen3:
    """This project's decoder with the configuration and the weights of `reference`."""
    model = Qwen3(Qwen3Config.from_hf(reference.config.to_dict())).eval()
    model.load_state_dict(reference.state_dict())
    return model


def logprobs_after(model, prompt: list[int], token_ids: list[int], temperature=1.0, num_tokens=None):
    """Log-probabilities of `token_ids` after `prompt` by one plain forward of either decoder: [tokens]."""
    output = model(torch.tensor([prompt + token_ids]))
    logits = output if isinstance(output, torch.Tensor) else output.logits
    scaled = logits[0, len(prompt) - 1 : -1, :num_tokens].double() / temperature
    targets = torch.tensor(token_ids)[:, None]
    return scaled.log_softmax(-1).gather(-1, targets)[:, 0]


def random_ids(*shape: int, seed: int = 1, high: int = 83) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def copy_tokenizer(folder: Path) -> Path:
    """Put the bundled model's tokenizer into `folder`: models beside it need `TINY_TOKENS` rows."""
    folder.mkdir(exist_ok=True, parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    return folder


def changed_tokenizer(folder, replaced: dict[str, str], **config) -> Tokenizer:
    """The bundled tokenizer, in `folder`, with other texts for some tokens and a changed configuration."""
    path = copy_tokenizer(folder) / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    for old, new in replaced.items():
        assert f'"{old}"' in text
        text = text.replace(f'"{old}"', f'"{new}"')
    path.write_text(text, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return Tokenizer(folder)


def qwen3_file(name: str) -> Path:
    """A published file, e.g. "configs/Qwen3-8B.config.json"; the test is skipped where it is not at hand."""
    if not (FILES / name).exists():
        pytest.skip(f"needs Qwen3's published {name}: set QWEN3_FILES to a folder that has it")
    return FILES / name


def smollm2_folder() -> Path:
    """The folder that `python -m experiments.real.weights` writes; without it the test is skipped."""
    folder = Path(os.environ.get("SMOLLM2_FILES", ROOT / "runs" / "smollm2-base"))
    if not (folder / "model.safetensors").exists():
        pytest.skip("needs SmolLM2: python -m experiments.real.weights, or set SMOLLM2_FILES to a folder")
    return folder

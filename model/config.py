"""The shape of a Qwen3 or one of its relatives, read from and written to Hugging Face's `config.json`."""

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

UP_TO_4096 = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")

# model_type -> what the attention of this family has beside the four projections
FAMILIES = {
    "qwen3": {"qk_norm": True, "qkv_bias": False},
    "qwen2": {"qk_norm": False, "qkv_bias": True},  # Qwen2.5 too
    "llama": {"qk_norm": False, "qkv_bias": False},  # SmolLM2 too
}


class ModelError(ValueError):
    """A model, tokenizer or weight file that cannot be used; the message says which, and what to do."""


def read_text(path: Path) -> str:
    """A text file in UTF-8 or UTF-16, with a byte-order mark or without. ValueError: it is not one."""
    refuse_pointer(path)
    content = path.read_bytes()
    text = content.decode(json.detect_encoding(content))
    if content and not text:
        raise ValueError("there is nothing in it but a byte-order mark")
    return text


def refuse_pointer(path: Path) -> None:
    """ModelError: the file is a pointer, which git-lfs leaves in place of a file not fetched."""
    with open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            advice = "run git lfs pull beside it"
            raise ModelError(f"{path} is a pointer of git-lfs, not the file itself: {advice}")


@dataclass(frozen=True)
class Qwen3Config:
    """Shape of a dense decoder: Qwen3, or with other flags Qwen2 or Llama. Field names are Hugging Face's.

    `head_dim` is not `hidden_size / num_attention_heads`: Qwen3-0.6B has 16 heads of 128 for a hidden size of
    1024. `num_key_value_heads` divides `num_attention_heads` (grouped-query attention).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 40960
    qk_norm: bool = True  # An RMSNorm on each query and key head: Qwen3
    qkv_bias: bool = False  # Biases of the projections to queries, keys and values: Qwen2 and Qwen2.5

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            largest = 4096 if field.name in UP_TO_4096 else 2**24
            expected, is_allowed = {
                int: (f"a whole number, 1 to {largest}", type(value) is int and 1 <= value <= largest),
                float: ("a positive number", type(value) in (int, float) and 0 < value < float("inf")),
                bool: ("true or false", type(value) is bool),
            }[field.type]
            if not is_allowed:
                raise ModelError(f"config: {field.name} must be {expected}, not {value!r:.60}")
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"num_attention_heads {self.num_attention_heads}"
            raise ModelError(f"config: {heads} is no multiple of {self.num_key_value_heads} key-value heads")
        if self.qk_norm and self.qkv_bias:
            raise ModelError("config: qk_norm and qkv_bias together are no known family")
        if self.head_dim % 2:
            raise ModelError(f"config: head_dim must be even for rotary embeddings, not {self.head_dim}")

    @classmethod
    def from_hf(cls, hf: dict) -> "Qwen3Config":
        """Build from a parsed `config.json` of transformers 4, or 5 (`rope_theta` inside `rope_parameters`).

        Fields that do not change the arithmetic are ignored. ModelError: another architecture, a feature that
        this decoder lacks, or a missing or malformed field.
        """
        # 1. Refuse what changes the arithmetic in a way that this decoder does not know.
        family = hf.get("model_type")
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}  # of transformers 5, 4
        rope_type = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else None
        layers = hf.get("layer_types") or []
        supported = {
            "model_type": isinstance(family, str) and family in FAMILIES,
            "attention_bias": hf.get("attention_bias", False) is False,
            "mlp_bias": hf.get("mlp_bias", False) is False,
            "hidden_act": hf.get("hidden_act", "silu") == "silu",
            "use_sliding_window": hf.get("use_sliding_window", False) is False,
            "rope_parameters" if hf.get("rope_parameters") else "rope_scaling": rope_type == "default",
            "layer_types": isinstance(layers, list) and all(kind == "full_attention" for kind in layers),
            "quantization_config": not hf.get("quantization_config"),
            "compression_config": not hf.get("compression_config"),
        }
        for name, is_supported in supported.items():
            if not is_supported:
                known = "only dense Qwen3, Qwen2 and Llama, unquantized"
                raise ModelError(f"config: {name} {hf.get(name)!r:.60} is not supported, {known}")

        # 2. Read the shape. These are transformers' own defaults, which are not Qwen3's; every published
        # config.json of a Qwen3 states both.
        values = {"tie_word_embeddings": False, "rope_theta": 1e4}
        values |= {name: hf[name] for name in cls.__dataclass_fields__ if name in hf}
        if family != "qwen3":
            values |= derived_heads(hf)
        values["rope_theta"] = rope.get("rope_theta", values["rope_theta"])
        values |= FAMILIES[family]
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ModelError(f"config: missing {', '.join(missing)}")
        return cls(**values)

    @property
    def model_type(self) -> str:
        """The name of the family with these flags, as in `config.json`."""
        flags = {"qk_norm": self.qk_norm, "qkv_bias": self.qkv_bias}
        return next(name for name, own in FAMILIES.items() if own == flags)

    def to_hf(self, dtype: str, eos_token_id: int | None = None) -> dict:
        """The `config.json` of a checkpoint, as transformers 4, 5 and vLLM read it."""
        shape = {name: getattr(self, name) for name in self.__dataclass_fields__}
        del shape["qk_norm"], shape["qkv_bias"]  # which the model type says
        return {
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
            "model_type": self.model_type,
            **shape,
            "attention_bias": False,
            "eos_token_id": eos_token_id,
            "hidden_act": "silu",
            "rope_scaling": None,
            "sliding_window": None,
            "torch_dtype": dtype,
            "use_sliding_window": False,
        }

    def check_positions(self, prompt: int, new: int, name: str = "the model") -> None:
        """ModelError: the model has too few positions for a prompt and its new tokens."""
        if prompt + new > self.max_position_embeddings:
            most = f"{name} has {self.max_position_embeddings} positions (max_position_embeddings)"
            need = f"a prompt of {prompt} tokens and {new} new ones need {prompt + new}"
            raise ModelError(f"{most}, and {need}: lower max_new_tokens, or take another model")


def derived_heads(hf: dict) -> dict:
    """Fields that the `config.json` of a Qwen2 or Llama may omit or null: the size of a head, and of a
    Llama also the number of key-value heads.
    """
    hidden, heads = hf.get("hidden_size"), hf.get("num_attention_heads")
    if type(hidden) is not int or type(heads) is not int or heads < 1:
        return {}  # which is then refused
    derived = {"head_dim": hidden // heads}
    if hf["model_type"] == "llama":
        derived["num_key_value_heads"] = heads
    return {name: value for name, value in derived.items() if hf.get(name) is None}

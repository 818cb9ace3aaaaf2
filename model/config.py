"""The shape of a Qwen3 or one of its relatives, read from and written to Hugging Face's `config.json`."""

import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

UP_TO_4096 = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")

FAMILIES = ("qwen3", "qwen2", "llama")  # Qwen2.5 is a qwen2, and SmolLM2 a llama
UNSUPPORTED = (
    "attention_bias",  # of all four projections
    "mlp_bias",
    "use_sliding_window",
    "quantization_config",
    "compression_config",
)


class ModelError(ValueError):
    """A model, tokenizer or weight file that cannot be used; the message says which, and what to do."""


def read_text(path: Path) -> str:
    """A text file in UTF-8 or UTF-16, with a byte-order mark or without. ValueError: it is not one."""
    refuse_pointer(path)
    content = path.read_bytes()
    return content.decode(json.detect_encoding(content))


def refuse_pointer(path: Path) -> None:
    """ModelError: the file is a pointer, which git-lfs leaves in place of a file not fetched."""
    with open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            advice = "run git lfs pull beside it"
            raise ModelError(f"{path} is a pointer of git-lfs, not the file itself: {advice}")


@dataclass(frozen=True)
class Qwen3Config:
    """Shape of a dense decoder: Qwen3, or a Qwen2 or Llama. Field names are Hugging Face's.

    `head_dim` need not be `hidden_size / num_attention_heads`: Qwen3-0.6B has 16 heads of 128 for a
    hidden size of 1024. `num_key_value_heads` divides `num_attention_heads` (grouped-query attention).
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
    model_type: str = "qwen3"  # One of FAMILIES

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            largest = 4096 if field.name in UP_TO_4096 else 2**24
            expected, is_allowed = {
                int: (f"a whole number, 1 to {largest}", type(value) is int and 1 <= value <= largest),
                float: ("a positive number", type(value) in (int, float) and 0 < value < float("inf")),
                bool: ("true or false", type(value) is bool),
                str: (f"one of {', '.join(FAMILIES)}", value in FAMILIES),
            }[field.type]
            if not is_allowed:
                raise ModelError(f"config: {field.name} must be {expected}, not {value!r:.60}")
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"num_attention_heads {self.num_attention_heads}"
            raise ModelError(f"config: {heads} is no multiple of {self.num_key_value_heads} key-value heads")
        if self.head_dim % 2:
            raise ModelError(f"config: head_dim must be even for rotary embeddings, not {self.head_dim}")

    @property
    def qk_norm(self) -> bool:
        """Whether there is an RMSNorm on each query and key head."""
        return self.model_type == "qwen3"

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return self.model_type == "qwen2"

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
            "model_type": family in FAMILIES,
            "hidden_act": hf.get("hidden_act", "silu") == "silu",
            "rope_parameters" if hf.get("rope_parameters") else "rope_scaling": rope_type == "default",
            "layer_types": isinstance(layers, list) and all(kind == "full_attention" for kind in layers),
        }
        supported |= {name: not hf.get(name) for name in UNSUPPORTED}
        for name, is_supported in supported.items():
            if not is_supported:
                known = "only dense Qwen3, Qwen2 and Llama, unquantized"
                raise ModelError(f"config: {name} {hf.get(name)!r:.60} is not supported, {known}")

        # 2. Read the shape. These are transformers' own defaults, which are not Qwen3's; every published
        # config.json of a Qwen3 states both.
        values = {"tie_word_embeddings": False, "rope_theta": 1e4}
        values |= {name: hf[name] for name in cls.__dataclass_fields__ if hf.get(name) is not None}
        # A Qwen2 or Llama may omit the size of a head, and a Llama the number of key-value heads.
        hidden_size = values.get("hidden_size")
        heads = values.get("num_attention_heads")
        are_numbers = isinstance(hidden_size, int) and isinstance(heads, int) and heads > 0
        if family != "qwen3" and are_numbers:
            values.setdefault("head_dim", hidden_size // heads)
        if family == "llama":
            values.setdefault("num_key_value_heads", heads)
        values["rope_theta"] = rope.get("rope_theta", values["rope_theta"])
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ModelError(f"config: missing {', '.join(missing)}")
        return cls(**values)

    def to_hf(self, dtype: str, eos_token_id: int | None = None) -> dict:
        """The `config.json` of a checkpoint, as transformers 4, 5 and vLLM read it."""
        shape = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            "architectures": [f"{self.model_type.capitalize()}ForCausalLM"],
            **shape,
            "eos_token_id": eos_token_id,
            "torch_dtype": dtype,
        }

    def check_positions(self, prompt: int, new: int, name: str = "the model") -> None:
        """ModelError: the model has too few positions for a prompt and its new tokens."""
        if prompt + new > self.max_position_embeddings:
            most = f"{name} has {self.max_position_embeddings} positions (max_position_embeddings)"
            need = f"a prompt of {prompt} tokens and {new} new ones need {prompt + new}"
            raise ModelError(f"{most}, and {need}: lower max_new_tokens, or take another model")

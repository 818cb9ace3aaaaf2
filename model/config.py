"""The shape of a Qwen3 in eleven numbers, read from and written to Hugging Face's `config.json`."""

from dataclasses import MISSING, dataclass, fields

LARGEST_SIZE = 2**24
LARGEST = {
    "num_hidden_layers": 1000,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "head_dim": 4096,
}


class ModelError(ValueError):
    """A model, tokenizer or weight file that cannot be used; the message says which, and what to do."""


@dataclass(frozen=True)
class Qwen3Config:
    """Shape of a dense Qwen3 decoder; field names and meanings are Hugging Face's.

    `head_dim` is independent of `hidden_size / num_attention_heads`: Qwen3-0.6B has 16 heads of 128 on a
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

    def __post_init__(self):
        for name, kind in ((field.name, field.type) for field in fields(self)):
            value, largest = getattr(self, name), LARGEST.get(name, LARGEST_SIZE)
            if kind is int and (type(value) is not int or not 1 <= value <= largest):
                raise ModelError(f"config: {name} must be a whole number, 1 to {largest}, not {short(value)}")
            if kind is float and (type(value) not in (int, float) or not 0 < value < float("inf")):
                raise ModelError(f"config: {name} must be a positive number, not {value!r}")
            if kind is bool and type(value) is not bool:
                raise ModelError(f"config: {name} must be true or false, not {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            heads = f"num_attention_heads {self.num_attention_heads}"
            raise ModelError(f"config: {heads} is no multiple of {self.num_key_value_heads} key-value heads")
        if self.head_dim % 2:
            raise ModelError(f"config: head_dim must be even for rotary embeddings, not {self.head_dim}")

    @classmethod
    def from_hf(cls, hf: dict) -> "Qwen3Config":
        """Build from a parsed `config.json` of transformers 4 or 5, which has `rope_theta` in
        `rope_parameters`.

        Fields that do not change the arithmetic are ignored.

        Raises:
            ModelError: another architecture, a feature that this decoder lacks, or a missing or malformed
                field.
        """
        if not isinstance(hf, dict):
            raise ModelError(f"config: expected a JSON object, not {type(hf).__name__}")
        if hf.get("model_type") != "qwen3":
            raise ModelError(
                f"config: model_type {hf.get('model_type')!r} is not supported; only dense 'qwen3'"
            )
        rope, layer_types = hf.get("rope_parameters") or {}, hf.get("layer_types") or []
        for name, value, kind in (("rope_parameters", rope, dict), ("layer_types", layer_types, list)):
            if not isinstance(value, kind):
                raise ModelError(f"config: {name} = {value!r} is not supported")
        unsupported = {
            "attention_bias": hf.get("attention_bias", False) is not False,
            "hidden_act": hf.get("hidden_act", "silu") != "silu",
            "use_sliding_window": hf.get("use_sliding_window", False) is not False,
            "rope_scaling": hf.get("rope_scaling") is not None,
            "rope_parameters": rope.get("rope_type", rope.get("type", "default")) != "default",
            "layer_types": any(kind != "full_attention" for kind in layer_types),
        }
        for name, refused in unsupported.items():
            if refused:
                raise ModelError(f"config: {name} = {hf[name]!r} is not supported")
        values = {name: hf[name] for name in cls.__dataclass_fields__ if name in hf}
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        missing = [f.name for f in fields(cls) if f.default is MISSING and f.name not in values]
        if missing:
            raise ModelError(f"config: missing {', '.join(missing)}")
        # transformers' own defaults, which are not Qwen3's; every published config.json states both.
        values.setdefault("tie_word_embeddings", False)
        values.setdefault("rope_theta", 1e4)
        return cls(**values)

    def to_hf(self, dtype: str, eos_token_id: int | None = None) -> dict:
        """The `config.json` of a checkpoint, as transformers 4, 5 and vLLM read it."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            **{name: getattr(self, name) for name in self.__dataclass_fields__},
            "attention_bias": False,
            "attention_dropout": 0.0,
            "eos_token_id": eos_token_id,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "rope_scaling": None,
            "sliding_window": None,
            "torch_dtype": dtype,
            "use_cache": True,
            "use_sliding_window": False,
        }

    def num_parameters(self) -> int:
        """Parameters of the whole model; a tied output head counts once."""
        heads = self.num_attention_heads + self.num_key_value_heads
        attention = self.hidden_size * self.head_dim * 2 * heads
        norms = 2 * self.hidden_size + 2 * self.head_dim
        layer = attention + 3 * self.hidden_size * self.intermediate_size + norms
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + self.hidden_size


def short(value) -> str:
    """A value for an error message, cut if it is long."""
    text = f"{value:.3g}" if isinstance(value, int) and abs(value) >= 10**15 else repr(value)
    return text if len(text) <= 60 else text[:60] + "..."

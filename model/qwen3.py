"""The Qwen3 decoder, from token ids to logits. One forward serves training, prefill and cached decoding.

The architecture (Qwen3 technical report, arXiv:2505.09388, section 2): pre-norm, grouped-query attention with
an RMSNorm on each query and key head, rotary positions, SwiGLU. Order and precision of the operations are
those of Hugging Face's `modeling_qwen3.py`, so logits agree; module names are those of its checkpoints.
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import Qwen3Config


class Cache(Protocol):
    """A forward of the decoder calls `start` once, and `attend` in every layer."""

    def start(self, time: int) -> Tensor:
        """Count the next `time` tokens of each row, and return their positions: [batch or 1, time]."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store `keys` and `values` [batch, kv_heads, time, head_dim]; attend to all that a query may see.

        `queries`, after RoPE as the keys are, and the result are [batch, heads, time, head_dim].
        """


class RMSNorm(nn.Module):
    """weight * x / rms(x) over the last axis; the quotient in float32 or above (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = exact.square().mean(-1, keepdim=True)
        normed = exact * torch.rsqrt(mean_square + self.eps)
        return self.weight * normed.to(x.dtype)


Rotary = tuple[Tensor, Tensor]  # cosines and sines


def rotary_embedding(positions: Tensor, config: Qwen3Config, dtype: torch.dtype) -> Rotary:
    """cos and sin of each position's angles, [batch, 1, time, head_dim] (RoPE, arXiv:2104.09864).

    Angles are always float32: in bfloat16, positions 1000 and 1001 would be the same.
    """
    even = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / config.rope_theta ** (even / config.head_dim)  # [head_dim / 2]
    angles = positions[:, None, :, None].float() * frequencies  # [batch, 1, time, head_dim / 2]
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn each pair (x[i], x[i + head_dim / 2]) by its angle: the half-split kind of RoPE."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)  # by a right angle
    return x * cos + turned * sin


class Attention(nn.Module):
    """Causal grouped-query attention: query head i reads key-value head i // (heads / kv_heads)."""

    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        head_norm = RMSNorm if config.qk_norm else nn.Identity  # which takes any arguments
        self.q_norm = head_norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = head_norm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Rotary, cache: Cache | None) -> Tensor:
        batch, time, _ = x.shape
        heads = (batch, time, -1, self.head_dim)
        queries = self.q_norm(self.q_proj(x).view(heads))  # [batch, time, heads, head_dim]
        keys = self.k_norm(self.k_proj(x).view(heads))  # [batch, time, kv_heads, head_dim]
        values = self.v_proj(x).view(heads)
        queries = rotate(queries.transpose(1, 2), rotary)  # [batch, heads, time, head_dim]
        keys = rotate(keys.transpose(1, 2), rotary)
        values = values.transpose(1, 2)
        if cache is None:
            attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
        else:
            attended = cache.attend(self.layer, queries, keys, values)  # [batch, heads, time, head_dim]
        return self.o_proj(attended.transpose(1, 2).reshape(batch, time, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen3Config, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: Rotary, cache: Cache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything below the output head: token ids [batch, time] -> hidden states [batch, time, hidden].

    With `checkpoint_activations`, backward computes each layer again from its input (arXiv:1604.06174).
    """

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.checkpoint_activations = False
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, token_ids: Tensor, cache: Cache | None = None) -> Tensor:
        time = token_ids.shape[1]
        x = self.embed_tokens(token_ids)
        positions = torch.arange(time, device=token_ids.device)[None] if cache is None else cache.start(time)
        rotary = rotary_embedding(positions, self.config, x.dtype)
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rotary, cache)
        return self.norm(x)


def unrounded_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices, or of batches of them. On a GPU, bfloat16 factors give their sums in float32.

    A CPU has no such product, and rounds the sums to bfloat16.
    """
    if not a.is_cuda or a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    return multiply(a, b, out_dtype=torch.float32)


class Qwen3(nn.Module):
    """A Qwen3 language model: token ids [batch, time] -> logits [batch, time, vocab].

    Pad rows of unequal length on the right, with any id. `num_tokens` is the size of the tokenizer's
    vocabulary; embedding rows beyond it are padding, which is never sampled and takes no part in the softmax.
    """

    graphed = True  # whether CUDA graphs decode it, see `model.sampler.GraphedStep`

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.config = config
        self.num_tokens = config.vocab_size
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, token_ids: Tensor, cache: Cache | None = None) -> Tensor:
        return self.lm_head(self.model(token_ids, cache))

    def next_logits(self, hidden: Tensor) -> Tensor:
        """Logits [rows, vocab] after hidden states [rows, hidden], for sampling; see `unrounded_matmul`."""
        return unrounded_matmul(hidden, self.lm_head.weight.T)

    def num_parameters(self) -> int:
        """Parameters of the whole model; a tied output head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.lm_head.weight.dtype

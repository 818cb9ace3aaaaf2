"""Keys and values of the tokens seen so far. A cache alone knows where each row stands in its own text."""

import copy
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import Qwen3Config


class Cache(Protocol):
    """What the decoder asks of a cache: in each forward `start` once, `attend` in every layer, `advance` once."""

    def start(self, time: int) -> Tensor:
        """Positions of the next `time` tokens of each row: [batch, time]."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store the new tokens' keys and values, and attend to all that each query may see, itself included.

        Args:
            queries: [batch, heads, time, head_dim], after RoPE.
            keys, values: [batch, kv_heads, time, head_dim]; keys after RoPE.

        Returns:
            [batch, heads, time, head_dim].
        """

    def advance(self, time: int) -> None:
        """Count the `time` tokens that every layer has stored by now."""


class KVCache:
    """Room for `max_length` tokens of keys and values for each of `batch_size` rows.

    Rows have lengths of their own. A row's next token goes to slot `lengths[row]`, whatever the other rows do, so
    prompts of different lengths are simply padded on the right: what the padding wrote lies beyond the row's length,
    is never attended to, and is overwritten by the row's next tokens. No padding mask exists anywhere.

    Shapes: `keys[layer]` and `values[layer]` are [batch, kv_heads, max_length, head_dim], keys after RoPE;
    `lengths` is [batch], int64.
    """

    def __init__(self, config: Qwen3Config, batch_size: int, max_length: int, device="cpu", dtype=torch.float32):
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)
        self.max_length = max_length
        self.longest = 0  # an upper bound of lengths.max(), kept on the host so that decoding never waits for a GPU

    def start(self, time: int) -> Tensor:
        if self.longest + time > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens a row; {self.longest + time} are needed")
        self.end = self.longest + time
        self.positions = self.lengths[:, None] + torch.arange(time, device=self.lengths.device)  # [batch, time]
        slots = torch.arange(self.end, device=self.lengths.device)
        # In an empty cache attention is plainly causal, for which there are faster kernels. [batch, 1, time, end]
        self.mask = (slots <= self.positions[:, :, None])[:, None] if self.longest else None
        return self.positions

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        self.keys[layer][rows, :, self.positions] = keys.transpose(1, 2)
        self.values[layer][rows, :, self.positions] = values.transpose(1, 2)
        keys, values = self.keys[layer][:, :, : self.end], self.values[layer][:, :, : self.end]
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=self.mask, is_causal=self.mask is None, enable_gqa=True
        )

    def advance(self, time: int) -> None:
        self.lengths = self.lengths + time  # not +=: set_lengths may have been given the caller's own tensor
        self.longest += time

    def set_lengths(self, lengths: Tensor) -> None:
        """Forget everything beyond `lengths` ([batch]), e.g. what the padding of a ragged batch wrote."""
        self.lengths = lengths.to(self.lengths)
        self.longest = int(lengths.max())

    def part(self, rows: slice) -> "KVCache":
        """The cache of some rows only, over the same memory."""
        part = copy.copy(self)
        part.keys, part.values = [keys[rows] for keys in self.keys], [values[rows] for values in self.values]
        part.lengths = self.lengths[rows]
        return part

"""Keys and values of the tokens seen so far. The cache alone knows where each row stands in its own text."""

import torch
from torch import Tensor

from model.config import Qwen3Config


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
        self.longest = 0  # an upper bound of lengths.max(), kept on the host so that decoding never waits for a GPU

    @property
    def max_length(self) -> int:
        return self.keys[0].shape[2]

    def positions(self, time: int) -> Tensor:
        """Positions of the next `time` tokens of each row: [batch, time]."""
        return self.lengths[:, None] + torch.arange(time, device=self.lengths.device)

    def attention_mask(self, time: int) -> Tensor:
        """True where the next `time` tokens may look: [batch, 1, time, longest + time]."""
        slots = torch.arange(self.longest + time, device=self.lengths.device)
        return (slots <= self.positions(time)[:, :, None])[:, None]

    def update(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store [batch, kv_heads, time, head_dim] behind each row's text; return all up to the longest row."""
        time = keys.shape[2]
        if self.longest + time > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens a row; {self.longest + time} are needed")
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        positions = self.positions(time)
        self.keys[layer][rows, :, positions] = keys.transpose(1, 2)
        self.values[layer][rows, :, positions] = values.transpose(1, 2)
        end = self.longest + time
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def advance(self, time: int) -> None:
        """Count the `time` tokens that every layer has stored by now."""
        self.lengths = self.lengths + time  # not +=: set_lengths may have been given the caller's own tensor
        self.longest += time

    def set_lengths(self, lengths: Tensor) -> None:
        """Forget everything beyond `lengths` ([batch]), e.g. what the padding of a ragged batch wrote."""
        self.lengths = lengths.to(self.lengths)
        self.longest = int(lengths.max())

    def select(self, rows: Tensor) -> None:
        """Keep `rows` ([n], in that order; a row may be named several times): fan a prompt out, drop the finished."""
        for layer in range(len(self.keys)):
            self.keys[layer] = self.keys[layer][rows]
            self.values[layer] = self.values[layer][rows]
        self.lengths = self.lengths[rows]

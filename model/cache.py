"""Keys and values of the tokens seen so far. Only a cache knows the position of each row in its own text."""

import copy
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import Qwen3Config

# Tokens in a block of GroupCache. Empty slots are read too, so few; but each block needs a new CUDA graph.
BLOCK = {"cpu": 16, "cuda": 64}


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of matrices or batches; on a GPU the float32 sums of a bfloat16 product, unrounded."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return a.mm(b) if a.dim() == 2 else a.bmm(b)


class Cache(Protocol):
    """What the decoder calls in a forward: `start` once, `attend` in every layer, `advance` once."""

    def start(self, time: int) -> Tensor:
        """Positions of the next `time` tokens of each row: [batch, time]."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store `keys` and `values` [batch, kv_heads, time, head_dim]; attend to all that a query may see.

        `queries`, after RoPE as the keys are, and the result are [batch, heads, time, head_dim].
        """

    def advance(self, time: int) -> None:
        """Count the `time` tokens that every layer has stored."""


class KVCache:
    """Keys and values of up to `max_length` tokens for each of `batch_size` rows.

    A row's next token goes to slot `lengths[row]`. Padding on the right of ragged prompts lies beyond the
    row's length, is never attended to, and is overwritten. Shapes: `keys[layer]`, `values[layer]` [batch,
    kv_heads, max_length, head_dim]; `lengths` [batch], int64.
    """

    def __init__(self, config: Qwen3Config, batch_size: int, max_length: int, device="cpu", dtype=None):
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.lengths = torch.zeros(batch_size, device=device, dtype=torch.int64)
        self.max_length = max_length
        self.longest = 0  # upper bound of lengths.max() on the host, so that decoding never waits for a GPU

    def start(self, time: int) -> Tensor:
        self.end = self.longest + time
        if self.end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens a row; {self.end} are needed")
        slots = torch.arange(self.end, device=self.lengths.device)
        self.positions = self.lengths[:, None] + slots[:time]  # [batch, time]
        # An empty cache needs only the causal mask, for which there are faster kernels. [batch, 1, time, end]
        self.mask = (slots <= self.positions[:, :, None])[:, None] if self.longest else None
        return self.positions

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
        self.keys[layer][rows, :, self.positions] = keys.transpose(1, 2)
        self.values[layer][rows, :, self.positions] = values.transpose(1, 2)
        keys = self.keys[layer][:, :, : self.end]
        values = self.values[layer][:, :, : self.end]
        options = {"attn_mask": self.mask, "is_causal": self.mask is None, "enable_gqa": True}
        return F.scaled_dot_product_attention(queries, keys, values, **options)

    def advance(self, time: int) -> None:
        self.lengths = self.lengths + time  # not +=: `set_lengths` may have stored the caller's own tensor
        self.longest += time

    def set_lengths(self, lengths: Tensor) -> None:
        """Forget everything beyond `lengths` ([batch]), such as the padding of a ragged batch."""
        self.lengths = lengths.to(self.lengths)
        self.longest = int(lengths.max())

    def part(self, rows: slice) -> "KVCache":
        """The cache of some rows, sharing memory with this one."""
        part = copy.copy(self)
        part.keys = [keys[rows] for keys in self.keys]
        part.values = [values[rows] for values in self.values]
        part.lengths = self.lengths[rows]
        return part


class GroupCache:
    """A cache for groups of rows that share a prompt, which is stored once and read once for the whole group.

    All rows decode in lock-step, one token a forward. Attention to a prompt is one matrix product for all
    rows of its group; prompt scores and own scores then pass through one softmax (Hydragen, arXiv:2402.05099,
    merges two). Own tokens lie in blocks, so nothing is copied to make room. If `static`, attention reads
    whole blocks: shapes change only once a block, as CUDA graphs require, and oneDNN is twice as fast.

    Shapes: `prompt_keys[layer]`, `prompt_values[layer]` [prompts, kv_heads, longest, head_dim]; blocks in
    `keys[layer]`, `values[layer]` [rows * kv_heads, block, head_dim]; `prompt_of` [rows], ascending.
    """

    def __init__(self, prompts: KVCache, num_samples: int, max_new_tokens: int, static: bool = False):
        device = prompts.lengths.device
        self.max_new_tokens = max_new_tokens
        self.static = static
        self.prompt_keys = prompts.keys
        self.prompt_values = prompts.values
        self.prompt_lengths = prompts.lengths
        self.prompt_of = torch.arange(len(prompts.lengths), device=device).repeat_interleave(num_samples)
        self.kv_heads = prompts.keys[0].shape[1]
        self.build_grid()
        self.stored = torch.zeros(1, dtype=torch.int64, device=device)  # own tokens of every row
        self.block = BLOCK["cuda" if device.type == "cuda" else "cpu"] if static else max_new_tokens
        self.room = 0  # own tokens that the blocks can hold
        self.count = 0  # own tokens stored, the next one included
        self.keys: list[list[Tensor]] = [[] for _ in prompts.keys]
        self.values: list[list[Tensor]] = [[] for _ in prompts.keys]

    def reserve(self, count: int) -> None:
        """Make room for `count` own tokens a row, the next one included. Call it before each forward."""
        if count > self.room:
            size = min(self.block, self.max_new_tokens - self.room)
            for blocks in self.keys + self.values:
                blocks.append(self.new_block(size))
            self.room += size
        self.count = count
        self.visible = self.room if self.static else count  # slots of own tokens that attention reads

    def new_block(self, size: int) -> Tensor:
        head_dim = self.prompt_keys[0].shape[-1]
        block = self.prompt_keys[0].new_empty(len(self.prompt_of) * self.kv_heads, size, head_dim)
        return block.zero_() if self.static else block  # attention reads unused slots, which could hold NaN

    def build_grid(self) -> None:
        """Map pairs (row, key-value head), numbered row * kv_heads + head, to the grid of `times_prompt`.

        The grid is [prompts, kv_heads, most rows of a prompt]. `slot_of`: pair -> grid slot. `pair_at`: grid
        slot -> pair, arbitrary where the slot is empty.
        """
        prompts = len(self.prompt_lengths)
        counts = torch.bincount(self.prompt_of, minlength=prompts)
        width = int(counts.max())
        first_row = counts.cumsum(0) - counts  # of each prompt
        pairs = torch.arange(len(self.prompt_of) * self.kv_heads, device=self.prompt_of.device)
        row, head = pairs // self.kv_heads, pairs % self.kv_heads
        prompt = self.prompt_of[row]
        self.slot_of = (prompt * self.kv_heads + head) * width + row - first_row[prompt]
        self.pair_at = pairs.new_zeros(prompts * self.kv_heads * width).index_copy(0, self.slot_of, pairs)

    def select(self, rows: Tensor) -> None:
        """Keep only `rows` ([n], ascending), and the prompts that they belong to."""
        present, self.prompt_of = self.prompt_of[rows].unique_consecutive(return_inverse=True)
        if len(present) < len(self.prompt_lengths):
            self.prompt_keys = [keys[present] for keys in self.prompt_keys]
            self.prompt_values = [values[present] for values in self.prompt_values]
            self.prompt_lengths = self.prompt_lengths[present]
        self.build_grid()
        if not self.room:
            return  # no block yet
        pairs = (rows[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=rows.device)).flatten()
        for blocks in self.keys + self.values:
            *full, last = blocks
            used = self.count - (self.room - last.shape[1])
            blocks[:] = [*(block[pairs] for block in full), self.new_block(last.shape[1])]
            blocks[-1][:, :used] = last[pairs, :used]

    def start(self, time: int) -> Tensor:
        assert time == 1, "rows in lock-step decode one token at a time"
        longest = self.prompt_keys[0].shape[2]
        slots = torch.arange(longest + self.visible, device=self.stored.device)
        lengths = self.prompt_lengths[self.prompt_of, None]  # [rows, 1]
        seen = (slots < lengths) | ((slots >= longest) & (slots <= longest + self.stored))
        # Added to the scores: 0 where a row may look, else -inf. [rows * kv_heads, 1, longest + visible]
        bias = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)
        self.bias = bias[:, None].expand(-1, self.kv_heads, -1).reshape(-1, 1, bias.shape[-1])
        # Slot of the next token in the last block. A graph reads it on the device; a CPU is faster by slice.
        slot = (self.count - 1) % self.block
        self.slot = self.stored % self.block if self.stored.is_cuda else slice(slot, slot + 1)
        return lengths + self.stored

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # Each pair is one matrix product; its lines are the query heads that read this key-value head.
        pairs, head_dim = queries.shape[0] * keys.shape[1], queries.shape[-1]
        self.keys[layer][-1][:, self.slot] = keys.view(pairs, 1, head_dim)
        self.values[layer][-1][:, self.slot] = values.view(pairs, 1, head_dim)
        grouped = queries.view(pairs, -1, head_dim)  # [pairs, heads / kv_heads, head_dim]
        scores = [self.times_prompt(grouped, self.prompt_keys[layer].transpose(-1, -2))]
        own_keys = [block[:, : self.visible] for block in self.keys[layer]]
        own_values = [block[:, : self.visible] for block in self.values[layer]]
        scores += [product(grouped, block.transpose(1, 2)) for block in own_keys]
        sizes = [part.shape[-1] for part in scores]
        scores = torch.add(self.bias, torch.cat(scores, dim=-1), alpha=head_dim**-0.5)  # float32
        on_prompt, *on_own = scores.softmax(-1).to(values.dtype).split(sizes, dim=-1)
        attended = self.times_prompt(on_prompt, self.prompt_values[layer])
        for weights, block in zip(on_own, own_values, strict=True):
            attended = attended + product(weights, block)
        return attended.view(queries.shape).to(queries.dtype)

    def times_prompt(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Each pair's x [pairs, n, inner] times its prompt's matrix in [prompts, kv_heads, inner, outer]."""
        matrices = matrices.flatten(0, 1)
        grid = x.index_select(0, self.pair_at).view(len(matrices), -1, x.shape[-1])
        return product(grid, matrices).view(len(self.pair_at), x.shape[1], -1).index_select(0, self.slot_of)

    def advance(self, time: int) -> None:
        self.stored += time  # in place: a captured CUDA graph reads it

"""Keys and values of the tokens seen so far. Only a cache knows the position of each row in its own text."""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import Qwen3Config
from model.qwen3 import unrounded_matmul

# GroupCache reads own tokens in whole blocks of this size. Empty slots are read too, so few; but each new
# block needs a new CUDA graph.
BLOCK = {"cpu": 1, "cuda": 64}


class KVCache:
    """Keys and values of up to `max_length` tokens for each of `batch_size` rows, which are equally long.

    Shapes: `keys[layer]`, `values[layer]` [batch, kv_heads, max_length, head_dim].
    """

    def __init__(self, config: Qwen3Config, batch_size: int, max_length: int, device="cpu", dtype=None):
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.max_length = max_length
        self.length = 0  # tokens stored

    def start(self, time: int) -> Tensor:
        before = self.length
        end = before + time
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} tokens per row; {end} are needed")
        slots = torch.arange(end, device=self.keys[0].device)
        positions = slots[None, before:]  # [1, time]
        # An empty cache needs only the causal mask, for which there are faster kernels. [time, end]
        self.mask = slots <= positions.T if before else None
        self.new = slice(before, end)
        self.length = end
        return positions

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        self.keys[layer][:, :, self.new] = keys
        self.values[layer][:, :, self.new] = values
        return F.scaled_dot_product_attention(
            queries,
            self.keys[layer][:, :, : self.length],
            self.values[layer][:, :, : self.length],
            attn_mask=self.mask,
            is_causal=self.mask is None,
            enable_gqa=True,
        )

    def part(self, rows: slice) -> "KVCache":
        """The cache of some rows, sharing memory with this one."""
        part = copy.copy(self)
        part.keys = [keys[rows] for keys in self.keys]
        part.values = [values[rows] for values in self.values]
        return part


class GroupCache:
    """A cache for groups of rows that share a prompt, which is stored once and read once for the whole group.

    All rows decode in lock-step, one token per forward. Attention to a prompt is one matrix product for all
    rows of its group; scores on the prompt and on own tokens then pass through one softmax (Hydragen,
    arXiv:2402.05099, merges two). Room for own tokens is taken at once, so nothing is copied to make more.
    Where attention reads whole blocks, shapes change only once per block, as CUDA graphs require.

    Shapes: `prompt_keys[layer]`, `prompt_values[layer]` [prompts, kv_heads, longest, head_dim];
    `keys[layer]`, `values[layer]` [pairs, max_new_tokens, head_dim]; `prompt_index` [rows], ascending.

    A pair is a row and a key-value head, numbered row * kv_heads + head. For the product with the prompts,
    pairs are put into a grid with a line for each prompt and head. Here prompt 0 has rows 0, 1 and 2, prompt
    1 has rows 3 and 4, there are two heads, and the numbers are pairs:

        prompt 0, head 0 |  0   2   4 |
        prompt 0, head 1 |  1   3   5 |
        prompt 1, head 0 |  6   8   - |
        prompt 1, head 1 |  7   9   - |

    Cells count from the left, line by line. `cell_of_pair` begins 0, 3, 1, 4, and `pair_in_cell` begins 0, 2,
    4, 1. An empty cell holds pair 0, and nobody reads what comes out of it.
    """

    def __init__(self, prompts: KVCache, lengths: Tensor, num_samples: int, max_new_tokens: int):
        device = lengths.device
        self.prompt_keys = prompts.keys
        self.prompt_values = prompts.values
        self.prompt_lengths = lengths
        self.prompt_index = torch.arange(len(lengths), device=device).repeat_interleave(num_samples)
        self.kv_heads = prompts.keys[0].shape[1]
        self.max_new_tokens = max_new_tokens
        self.block = BLOCK[device.type]
        self.build_grid()
        self.keys = [self.new_storage() for _ in prompts.keys]
        self.values = [self.new_storage() for _ in prompts.keys]
        # Own tokens of every row, one number in two places. `reserve` raises it on the host before a forward;
        # `start` raises it on the device, where a CUDA graph reads it. Between forwards they are equal.
        self.stored_on_host = 0
        self.stored_on_device = torch.zeros(1, dtype=torch.int64, device=device)

    def build_grid(self) -> None:
        """Give each pair its cell; the grid is as wide as the largest group."""
        rows_of_prompt = torch.bincount(self.prompt_index, minlength=len(self.prompt_lengths))
        width = int(rows_of_prompt.max())
        first_row = rows_of_prompt.cumsum(0) - rows_of_prompt
        pairs = torch.arange(len(self.prompt_index) * self.kv_heads, device=first_row.device)
        row = pairs // self.kv_heads
        prompt = self.prompt_index[row]
        line = prompt * self.kv_heads + pairs % self.kv_heads
        column = row - first_row[prompt]
        self.cell_of_pair = line * width + column
        self.pair_in_cell = pairs.new_zeros(len(first_row) * self.kv_heads * width)
        self.pair_in_cell[self.cell_of_pair] = pairs

    def new_storage(self) -> Tensor:
        prompts = self.prompt_keys[0]
        storage = prompts.new_empty(len(self.cell_of_pair), self.max_new_tokens, prompts.shape[-1])
        if self.block > 1:
            storage.zero_()  # attention reads slots that are empty yet, and they could hold NaN
        return storage

    def reserve(self, count: int) -> None:
        """Make `count` own tokens per row visible, the next included. Call it before each forward."""
        self.stored_on_host = count
        blocks = math.ceil(count / self.block)
        self.visible = min(blocks * self.block, self.max_new_tokens)  # slots that attention reads

    def select(self, rows: Tensor) -> None:
        """Keep only `rows` ([n], ascending), and the prompts that they belong to."""
        present, self.prompt_index = self.prompt_index[rows].unique_consecutive(return_inverse=True)
        self.prompt_keys = [keys[present] for keys in self.prompt_keys]
        self.prompt_values = [values[present] for values in self.prompt_values]
        self.prompt_lengths = self.prompt_lengths[present]
        self.build_grid()
        heads = torch.arange(self.kv_heads, device=rows.device)
        pairs = (rows[:, None] * self.kv_heads + heads).flatten()
        used = slice(self.stored_on_host)  # slots that are empty yet are not copied
        for layers in (self.keys, self.values):
            for layer, storage in enumerate(layers):
                layers[layer] = self.new_storage()
                layers[layer][:, used] = storage[pairs, used]

    def start(self, time: int) -> Tensor:
        assert time == 1, "rows in lock-step decode one token at a time"
        stored = self.stored_on_device.clone()
        self.stored_on_device += 1  # in place: a captured CUDA graph reads it
        longest = self.prompt_keys[0].shape[2]
        slots = torch.arange(longest + self.visible, device=stored.device)
        lengths = self.prompt_lengths[self.prompt_index, None]  # [rows, 1]
        in_prompt = slots < lengths
        in_own = (slots >= longest) & (slots <= longest + stored)
        # Added to the scores: 0 where a row may look, else -inf. [rows * kv_heads, 1, longest + visible]
        bias = torch.zeros(in_prompt.shape, device=stored.device)
        bias = bias.masked_fill(~(in_prompt | in_own), -torch.inf)
        self.bias = bias[:, None].expand(-1, self.kv_heads, -1).reshape(-1, 1, bias.shape[-1])
        # Slot of the next token. A graph reads it on the device; a CPU is faster by slice.
        self.slot = stored if stored.is_cuda else slice(self.stored_on_host - 1, self.stored_on_host)
        return lengths + stored

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # 1. Store. Each pair becomes a matrix of its own; it has the query heads that read its keys.
        pairs = len(self.cell_of_pair)
        head_dim = queries.shape[-1]
        self.keys[layer][:, self.slot] = keys.view(pairs, 1, head_dim)
        self.values[layer][:, self.slot] = values.view(pairs, 1, head_dim)
        own_keys = self.keys[layer][:, : self.visible]
        own_values = self.values[layer][:, : self.visible]
        grouped = queries.view(pairs, -1, head_dim)  # [pairs, heads / kv_heads, head_dim]

        # 2. Scores on the prompt and on own tokens; one softmax over them all, in float32.
        on_prompt = self.times_prompt(grouped, self.prompt_keys[layer].transpose(-1, -2))
        on_own = unrounded_matmul(grouped, own_keys.transpose(1, 2))
        scores = torch.cat((on_prompt, on_own), dim=-1)
        scaled = torch.add(self.bias, scores, alpha=head_dim**-0.5)
        weights = scaled.softmax(-1).to(values.dtype)

        # 3. The values, in these proportions.
        on_prompt, on_own = weights.split((on_prompt.shape[-1], self.visible), dim=-1)
        from_prompt = self.times_prompt(on_prompt, self.prompt_values[layer])
        attended = from_prompt + unrounded_matmul(on_own, own_values)
        return attended.view(queries.shape).to(queries.dtype)

    def times_prompt(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Each pair's x [pairs, n, inner] times its prompt's matrix in [prompts, kv_heads, inner, outer]."""
        lines = matrices.flatten(0, 1)
        grid = x.index_select(0, self.pair_in_cell).view(len(lines), -1, x.shape[-1])
        products = unrounded_matmul(grid, lines)  # [lines, cells of a line * n, outer]
        cells = products.view(len(self.pair_in_cell), x.shape[1], -1)
        return cells.index_select(0, self.cell_of_pair)

"""Keys and values while groups of completions are decoded: a group's prompt is stored, and read, once."""

import torch
from torch import Tensor

from model.kv_cache import KVCache

# Tokens in a block: few, since its empty slots are read too; on a GPU each new block costs a new graph.
BLOCK = {"cpu": 16, "cuda": 64}


class GroupCache:
    """The cache of rows that decode in lock-step, a token each a forward, behind prompts that they share.

    All rows have stored the same number of own tokens, so these need neither padding nor lengths; prompts are ragged and
    padded on the right. Attention to a prompt is one matrix product for all rows of its group, where a cache that
    repeats the prompt would read it once for each. All scores then pass through one softmax (the idea of Hydragen,
    arXiv:2402.05099, which merges two).

    Own tokens lie in blocks: a new one is made when the last is full, so that nothing is ever copied to make room.
    Attention reads what is stored or, if `static`, the last block whole: then shapes change only every block,
    as a CUDA graph wants it, and blocks are contiguous, without which oneDNN multiplies bfloat16 at half speed.

    Shapes: `prompt_keys[layer]`, `prompt_values[layer]` are [prompts, kv_heads, longest, head_dim], each block in
    `keys[layer]`, `values[layer]` [rows * kv_heads, block, head_dim]; `prompt_of` is [rows], rows of a prompt side by side.
    """

    def __init__(self, prompts: KVCache, num_samples: int, max_new_tokens: int, static: bool = False):
        """Take over prefilled `prompts`; each gets `num_samples` rows."""
        count, device = len(prompts.lengths), prompts.lengths.device
        self.max_new_tokens, self.static = max_new_tokens, static
        self.prompt_keys, self.prompt_values, self.prompt_lengths = prompts.keys, prompts.values, prompts.lengths
        self.prompt_of = torch.arange(count, device=device).repeat_interleave(num_samples)
        self.arrange()
        self.stored = torch.zeros(1, dtype=torch.int64, device=device)  # own tokens that every row has
        self.block = BLOCK["cuda" if device.type == "cuda" else "cpu"] if static else max_new_tokens
        self.room = self.count = 0  # own tokens that the blocks hold; that they hold or are about to
        self.keys, self.values = ([[] for _ in prompts.keys] for _ in range(2))

    def reserve(self, count: int) -> None:
        """Make room for `count` own tokens a row, the next one included. To be called before each forward."""
        if count > self.room:
            size = min(self.block, self.max_new_tokens - self.room)
            for blocks in self.keys + self.values:
                blocks.append(self.new_block(size))
            self.room += size
        self.count = count

    def new_block(self, size: int) -> Tensor:
        _, kv_heads, _, head_dim = self.prompt_keys[0].shape
        shape = (len(self.prompt_of) * kv_heads, size, head_dim)
        # Attention must not read what may not be a number; and what it does not read takes no memory until written to.
        return self.prompt_keys[0].new_zeros(shape) if self.static else self.prompt_keys[0].new_empty(shape)

    @property
    def visible(self) -> int:
        """Slots of own tokens that attention reads."""
        return self.room if self.static else self.count

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, slots read): as long as neither changes, a forward works on the same tensors at the same addresses."""
        return len(self.prompt_of), self.visible

    def arrange(self) -> None:
        """Give the rows of each prompt their places in one matrix a prompt, for `times_prompt`.

        A pair is a row and a key-value head. Pairs stand in a grid [prompts, kv_heads, width], with room for the prompt
        that has most rows: `pair_at` says which is at each place (any where none is), `place_of` where each is.
        """
        kv_heads, prompts, rows = self.prompt_keys[0].shape[1], len(self.prompt_lengths), len(self.prompt_of)
        counts = torch.bincount(self.prompt_of, minlength=prompts)
        first = counts.cumsum(0) - counts  # the first row of each prompt
        numbers = torch.arange(rows * kv_heads, device=self.prompt_of.device)
        row, head = numbers // kv_heads, numbers % kv_heads
        prompt, width = self.prompt_of[row], int(counts.max())
        self.place_of = (prompt * kv_heads + head) * width + row - first[prompt]
        self.pair_at = numbers.new_zeros(prompts * kv_heads * width).index_copy(0, self.place_of, numbers)

    def select(self, rows: Tensor) -> None:
        """Keep `rows` ([n], ascending) and the prompts that they belong to."""
        present, self.prompt_of = self.prompt_of[rows].unique_consecutive(return_inverse=True)
        if len(present) < len(self.prompt_lengths):
            self.prompt_keys = [keys[present] for keys in self.prompt_keys]
            self.prompt_values = [values[present] for values in self.prompt_values]
            self.prompt_lengths = self.prompt_lengths[present]
        self.arrange()
        if not self.room:
            return  # no block yet
        kv_heads = self.prompt_keys[0].shape[1]
        pairs = (rows[:, None] * kv_heads + torch.arange(kv_heads, device=rows.device)).flatten()
        for blocks in self.keys + self.values:
            *full, last = blocks
            used = self.count - (self.room - last.shape[1])
            blocks[:] = [*(block[pairs] for block in full), self.new_block(last.shape[1])]
            blocks[-1][:, :used] = last[pairs, :used]

    def start(self, time: int) -> Tensor:
        assert time == 1, "rows in lock-step take one token at a time"
        longest = self.prompt_keys[0].shape[2]
        slots = torch.arange(longest + self.visible, device=self.stored.device)
        lengths = self.prompt_lengths[self.prompt_of, None]  # [rows, 1]
        seen = (slots < lengths) | ((slots >= longest) & (slots <= longest + self.stored))
        # Added to the scores: 0 where a row may look, else -inf. [rows * kv_heads, 1, longest + visible]
        bias = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)
        self.bias = bias[:, None].expand(-1, self.prompt_keys[0].shape[1], -1).reshape(-1, 1, bias.shape[-1])
        # Where in the last block the next token goes. A graph must read it from the device; writing by slice is faster.
        place = (self.count - 1) % self.block
        self.slot = self.stored % self.block if self.stored.is_cuda else slice(place, place + 1)
        return lengths + self.stored

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # Every pair of a row and a key-value head is a matrix product of its own, whose rows are the query heads that
        # read this key-value head: [rows * kv_heads, heads / kv_heads, head_dim].
        batch, head_dim = queries.shape[0] * keys.shape[1], queries.shape[-1]
        self.keys[layer][-1][:, self.slot] = keys.view(batch, 1, head_dim)
        self.values[layer][-1][:, self.slot] = values.view(batch, 1, head_dim)
        grouped = queries.view(batch, -1, head_dim)
        own_keys, own_values = self.own(self.keys[layer]), self.own(self.values[layer])
        scores = [self.times_prompt(grouped, self.prompt_keys[layer].transpose(-1, -2))]
        scores += [times_transposed(grouped, block) for block in own_keys]
        sizes = [part.shape[-1] for part in scores]
        scores = torch.add(self.bias, torch.cat(scores, dim=-1), alpha=head_dim**-0.5)  # float32
        on_prompt, *on_own = scores.softmax(-1).to(values.dtype).split(sizes, dim=-1)
        attended = self.times_prompt(on_prompt, self.prompt_values[layer])
        for weights, block in zip(on_own, own_values, strict=True):
            attended = attended + weights.bmm(block)
        return attended.view(queries.shape)

    def own(self, blocks: list[Tensor]) -> list[Tensor]:
        """The blocks, without the slots at the end that attention does not read."""
        return blocks if self.static else [blocks[0][:, : self.count]]

    def times_prompt(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Each row's x [rows * kv_heads, n, inner] times its prompt's matrices [prompts, kv_heads, inner, outer]."""
        matrices = matrices.flatten(0, 1)
        grid = x.index_select(0, self.pair_at).view(len(matrices), -1, x.shape[-1])
        return grid.bmm(matrices).view(len(self.pair_at), x.shape[1], -1).index_select(0, self.place_of)

    def advance(self, time: int) -> None:
        self.stored += time  # in place: a captured CUDA graph counts on


def times_transposed(x: Tensor, y: Tensor) -> Tensor:
    """x y^T of [batch, n, inner] and [batch, m, inner]; the other way round where oneDNN would copy y^T first."""
    if x.dtype == torch.bfloat16 and x.device.type == "cpu":
        return y.bmm(x.transpose(1, 2)).transpose(1, 2)
    return x.bmm(y.transpose(1, 2))

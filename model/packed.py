"""Training on groups of sequences as one stream of tokens, in which a group's common prefix occurs once."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

PADDING = 0.05  # of a branch's tokens, at most


@dataclass(frozen=True)
class PackedGroup:
    """The part of one group in the stream: its prefix, then its branches in blocks of nearly equal length."""

    prefix_length: int  # tokens that all sequences of the group begin with
    lengths: list[int]  # of the rest of each sequence, its branch; longest first

    def blocks(self) -> list[tuple[int, int]]:
        """(rows, length): consecutive branches, padded on the right to the longest of them."""
        blocks: list[tuple[int, int]] = []
        for length in self.lengths:
            if blocks and length >= (1 - PADDING) * blocks[-1][1]:
                rows, longest = blocks.pop()
                blocks.append((rows + 1, longest))
            else:
                blocks.append((1, length))
        return blocks

    def stream_tokens(self) -> int:
        """Tokens in the stream, padding included."""
        return self.prefix_length + sum(rows * length for rows, length in self.blocks())


class Block(NamedTuple):
    """Rows of equal length, one after the other in the stream: a prefix alone, or branches."""

    rows: int
    length: int
    prefix_block: int | None = None  # number of the block that these branches go on from


class PackedGroups:
    """Attention within a stream [1, tokens]: to the group's prefix, and causally to the token's own branch.

    It is passed to the decoder in place of a cache, and stores nothing. A prefix is computed once; its keys
    and values are repeated before each branch's own, under a causal mask aligned at the end.
    """

    def __init__(self, groups: list[PackedGroup], device="cpu"):
        self.blocks: list[Block] = []
        positions = []
        for group in groups:
            prefix_block = None
            if group.prefix_length:
                prefix_block = len(self.blocks)
                self.blocks.append(Block(1, group.prefix_length))
                positions.append(torch.arange(group.prefix_length))
            for rows, length in group.blocks():
                self.blocks.append(Block(rows, length, prefix_block))
                in_branch = torch.arange(group.prefix_length, group.prefix_length + length)
                positions.append(in_branch.repeat(rows))
        self.sizes = [block.rows * block.length for block in self.blocks]
        self.positions = torch.cat(positions)[None].to(device)  # [1, tokens]

    def start(self, time: int) -> Tensor:
        assert time == self.positions.shape[1]
        return self.positions

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # [1, heads, tokens, head_dim] -> for each block [rows * length, heads, head_dim]
        queries, keys, values = (x[0].transpose(0, 1).split(self.sizes) for x in (queries, keys, values))
        attended = []
        for number, block in enumerate(self.blocks):
            shape = (block.rows, block.length)
            query = queries[number].unflatten(0, shape)
            key = keys[number].unflatten(0, shape)
            value = values[number].unflatten(0, shape)
            if block.prefix_block is not None:
                key = after_prefix(keys[block.prefix_block], key)
                value = after_prefix(values[block.prefix_block], value)
            # Causal, and the last query sees the last key. SDPA takes [rows, heads, tokens, head_dim].
            causal = causal_lower_right(query.shape[1], key.shape[1])
            result = F.scaled_dot_product_attention(
                query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), causal, enable_gqa=True
            )
            attended.append(result.transpose(1, 2).flatten(0, 1))
        return torch.cat(attended).transpose(0, 1)[None]


def after_prefix(prefix: Tensor, branches: Tensor) -> Tensor:
    """Repeat [prefix, heads, head_dim] before each of [rows, length, heads, head_dim]."""
    repeated = prefix.expand(len(branches), -1, -1, -1)
    return torch.cat((repeated, branches), dim=1)

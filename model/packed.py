"""Training on groups of sequences as one stream of tokens, in which a group's common prefix stands once."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

PADDING = 0.04  # of a block's tokens, at most


class Block(NamedTuple):
    """Branches that are computed together, padded on the right to the longest of them."""

    rows: int
    length: int


@dataclass(frozen=True)
class PackedGroup:
    """The part of one group in the stream: its prefix, then its branches in blocks of nearly equal length."""

    prefix: int  # tokens that all sequences of the group begin with
    lengths: list[int]  # of the rest of each sequence, its branch; longest first

    def blocks(self) -> list[Block]:
        """Consecutive branches, as many in each block as PADDING allows."""
        blocks: list[list[int]] = [[]]
        for length in self.lengths:
            wider = [*blocks[-1], length]
            padded_size = len(wider) * wider[0]
            if padded_size * (1 - PADDING) <= sum(wider):
                blocks[-1] = wider
            else:
                blocks.append([length])
        return [Block(rows=len(block), length=block[0]) for block in blocks]

    def part_sizes(self) -> list[int]:
        """Tokens of the prefix and of each block, padding included, as they follow in the stream."""
        return [self.prefix] + [rows * length for rows, length in self.blocks()]

    def num_tokens(self) -> int:
        """Tokens in the stream, padding included."""
        return sum(self.part_sizes())

    def positions(self) -> Tensor:
        """Position of each token in its own sequence, [tokens]: every branch goes on after the prefix."""
        parts = [torch.arange(self.prefix)]
        for rows, length in self.blocks():
            branch = torch.arange(self.prefix, self.prefix + length)
            parts.append(branch.repeat(rows))
        return torch.cat(parts)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention within the group's part of the stream; all are [tokens, heads, head_dim]."""
        sizes = self.part_sizes()
        prefix_query, *block_queries = queries.split(sizes)
        prefix_key, *block_keys = keys.split(sizes)
        prefix_value, *block_values = values.split(sizes)
        attended = []
        if self.prefix:
            attended.append(attention(prefix_query[None], prefix_key[None], prefix_value[None])[0])
        for block, query, key, value in zip(
            self.blocks(), block_queries, block_keys, block_values, strict=True
        ):
            query = query.unflatten(0, block)  # [rows, length, heads, head_dim]
            key = after_prefix(prefix_key, key.unflatten(0, block))
            value = after_prefix(prefix_value, value.unflatten(0, block))
            attended.append(attention(query, key, value).flatten(0, 1))
        return torch.cat(attended)


def after_prefix(prefix: Tensor, branches: Tensor) -> Tensor:
    """Repeat [prefix, heads, head_dim] before each of [rows, length, heads, head_dim]."""
    repeated = prefix.expand(len(branches), -1, -1, -1)
    return torch.cat((repeated, branches), dim=1)


class PackedGroups:
    """Attention within a stream [1, tokens]: to the group's prefix, and causally to the token's own branch.

    It is passed to the decoder in place of a cache, and stores nothing. A prefix is computed once; its keys
    and values are repeated before each branch's own, under a causal mask aligned at the end.
    """

    def __init__(self, groups: list[PackedGroup], device="cpu"):
        self.groups = groups
        self.sizes = [group.num_tokens() for group in groups]
        self.positions = torch.cat([group.positions() for group in groups])[None].to(device)  # [1, tokens]

    def start(self, time: int) -> Tensor:
        assert time == self.positions.shape[1]
        return self.positions

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # [1, heads, tokens, head_dim] -> for each group [tokens, heads, head_dim]
        queries, keys, values = (x[0].transpose(0, 1).split(self.sizes) for x in (queries, keys, values))
        attended = []
        for group, query, key, value in zip(self.groups, queries, keys, values, strict=True):
            attended.append(group.attend(query, key, value))
        return torch.cat(attended).transpose(0, 1)[None]

    def advance(self, time: int) -> None:
        pass


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention in which the last query sees the last key; all are [rows, tokens, heads, head_dim]."""
    causal = causal_lower_right(queries.shape[1], keys.shape[1])
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    attended = F.scaled_dot_product_attention(queries, keys, values, causal, enable_gqa=True)
    return attended.transpose(1, 2)

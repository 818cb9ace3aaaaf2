"""Training on groups of sequences as one stream of tokens, in which a group's common prefix stands once."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

PADDING = 0.04  # of a block's tokens, at most


@dataclass(frozen=True)
class PackedGroup:
    """The part of one group in the stream: its prefix, then its branches in blocks of nearly equal length."""

    prefix: int  # tokens that all sequences of the group begin with
    lengths: list[int]  # of the rest of each sequence, its branch; longest first

    def blocks(self) -> list[tuple[int, int]]:
        """(rows, length): consecutive branches, padded on the right to the longest of them."""
        blocks: list[list[int]] = []
        for length in self.lengths:
            if blocks and (len(blocks[-1]) + 1) * blocks[-1][0] * (1 - PADDING) <= sum(blocks[-1]) + length:
                blocks[-1].append(length)
            else:
                blocks.append([length])
        return [(len(block), block[0]) for block in blocks]

    def num_tokens(self) -> int:
        """Tokens in the stream, padding included."""
        return self.prefix + sum(rows * length for rows, length in self.blocks())


class PackedGroups:
    """Attention within a stream [1, tokens]: to the group's prefix, and causally to the token's own branch.

    It is passed to the decoder in place of a cache, and stores nothing. A prefix is computed once; its keys
    and values are repeated before each branch's own, under a causal mask aligned at the end.
    """

    def __init__(self, groups: list[PackedGroup], device="cpu"):
        self.groups = []
        self.sizes = []
        positions = []
        for group in groups:
            blocks = group.blocks()
            self.groups.append((group.prefix, blocks))
            self.sizes += [group.prefix] + [rows * length for rows, length in blocks]
            positions.append(torch.arange(group.prefix))
            positions += [(group.prefix + torch.arange(length)).repeat(rows) for rows, length in blocks]
        self.positions = torch.cat(positions)[None].to(device)  # [1, tokens]

    def start(self, time: int) -> Tensor:
        assert time == self.positions.shape[1]
        return self.positions

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        streams = (x[0].transpose(0, 1).split(self.sizes) for x in (queries, keys, values))
        pieces = zip(*streams, strict=True)  # of [tokens, heads, head_dim]
        attended = []
        for prefix, blocks in self.groups:
            query, prefix_key, prefix_value = next(pieces)
            if prefix:
                attended.append(attention(query[None], prefix_key[None], prefix_value[None])[0])
            for rows, length in blocks:
                query, key, value = (piece.unflatten(0, (rows, length)) for piece in next(pieces))
                if prefix:
                    key = torch.cat((prefix_key.expand(rows, *prefix_key.shape), key), dim=1)
                    value = torch.cat((prefix_value.expand(rows, *prefix_value.shape), value), dim=1)
                attended.append(attention(query, key, value).flatten(0, 1))
        return torch.cat(attended).transpose(0, 1)[None]

    def advance(self, time: int) -> None:
        pass


def attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention in which the last query sees the last key; all are [rows, tokens, heads, head_dim]."""
    causal = causal_lower_right(queries.shape[1], keys.shape[1])
    queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
    return F.scaled_dot_product_attention(queries, keys, values, causal, enable_gqa=True).transpose(1, 2)

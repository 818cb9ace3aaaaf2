"""One run on several processes: functions that change nothing when there is one.

All ranks make the same decisions, so results depend on their number only by the order of adding gradients.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from model.sampler import Cancelled

PIECE = 2**24  # weights worked on at a time; a multiple of the 256 that share a scale in 8-bit moments


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is rank 0, the one process that writes files and prints."""
    return rank() == 0


def own_part(items: list) -> list:
    """This rank's part of a list that all ranks have: every n-th item, where n is the number of ranks."""
    return items[rank() :: world_size()]


def gather(items: list) -> list:
    """The whole list, from the part of each rank, as `own_part` gave it."""
    parts = all_values(items)
    whole = [None] * sum(map(len, parts))
    for number, part in enumerate(parts):
        whole[number :: len(parts)] = part
    return whole


def all_values(value) -> list:
    """The value of each rank, in order."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast(value):
    """Rank 0's value; those of the other ranks are ignored."""
    return all_values(value if is_main() else None)[0]


def any_rank(flag: bool) -> bool:
    return any(all_values(flag))


@contextmanager
def cancelled_together() -> Iterator[None]:
    """Cancelled in the body on one rank is Cancelled on all; none leaves before all are done with it."""
    cancelled = False
    try:
        yield
    except Cancelled:
        cancelled = True
    if any_rank(cancelled):
        raise Cancelled


def sum_counts(counts: Counter) -> Counter:
    """Sums over all ranks, added in the order of ranks, so that all get the same to the last bit."""
    total: Counter = Counter()
    for part in all_values(counts):
        total.update(part)
    return total


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up all ranks' gradients in float32; a missing one counts as zero."""
    if world_size() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        for piece in parameter.grad.view(-1).split(PIECE):
            total = piece.float()
            dist.all_reduce(total)
            piece.copy_(total)

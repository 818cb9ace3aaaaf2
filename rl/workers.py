"""The processes that share the work of one run, as torchrun starts them.

Each holds the whole model, or a share of it (`rl.sharding`), and the same problems; they agree on every decision. What
is sampled, learned and measured does not depend on their number, but for the order in which gradients are added up.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

PIECE = 2**24  # weights worked on at a time, so that temporary copies stay small
PATIENCE = timedelta(minutes=30)  # as long as one process may need for what the others wait for, a checkpoint for one


@dataclass(frozen=True)
class Workers:
    """Some processes with one run, seen from one of them. Alone, everything here gives back what it is given."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, items: list) -> list:
        """This process's part of what all have."""
        return items[self.rank :: self.size]

    def join(self, items: list) -> list:
        """The whole, of which each process gives the part that `share` would give it."""
        parts = self.gather(items)
        whole = [None] * sum(map(len, parts))
        for rank, part in enumerate(parts):
            whole[rank :: self.size] = part
        return whole

    def gather(self, value) -> list:
        """What each process gives, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def lead(self, value):
        """What the leading process gives; the others' is ignored."""
        return self.gather(value if self.leads else None)[0]

    def any(self, flag: bool) -> bool:
        return any(self.gather(flag))

    def sum(self, counts: Counter) -> Counter:
        """The processes' counts added up, in the order of their ranks, so that all get the same to the last bit."""
        total: Counter = Counter()
        for part in self.gather(counts):
            total.update(part)
        return total

    @torch.no_grad()
    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the processes' gradients of parameters that each holds whole, in float32.

        A process that had nothing to learn from has no gradients, which count as zero.
        """
        parameters = list(parameters)
        if self.size == 1 or not self.any(any(p.grad is not None for p in parameters)):
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            for piece in parameter.grad.view(-1).split(PIECE):
                total = piece.float()
                dist.all_reduce(total)
                if total is not piece:
                    piece.copy_(total)


ALONE = Workers()


@contextlib.contextmanager
def workers_of_torchrun() -> Iterator[Workers]:
    """The processes that torchrun started this one among, ready to talk to each other; `ALONE` without it."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, _ = next(dist.rendezvous("env://"))
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    store = dist.PrefixStore(attempt, store)  # not a dead process's address
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Workers(rank, size)
    finally:
        dist.destroy_process_group()


def begun_again() -> bool:
    """Whether torchrun has started this run before, and lost a process of it."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def lost_another(error: RuntimeError) -> bool:
    """Whether an error says that another process of the run is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)

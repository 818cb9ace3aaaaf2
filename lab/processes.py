"""Starting and losing the processes of torchrun."""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

PATIENCE = timedelta(
    minutes=30
)  # how long the others wait for one process, which may be writing a checkpoint


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, for the length of the block."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, rank, _ = next(dist.rendezvous("env://"))
    attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    store = dist.PrefixStore(attempt, store)  # not the address of a process that died
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def restarted() -> bool:
    """Whether torchrun has started this run again after one of its processes died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def lost_process(error: RuntimeError) -> bool:
    """Whether an error says that another process of the run is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)

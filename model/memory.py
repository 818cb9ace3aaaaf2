"""How much memory is free, and how many tokens of keys and values fit into it."""

import contextlib
import ctypes
import os
import resource
from pathlib import Path

import torch

from model.qwen3 import Qwen3

MMAP_THRESHOLD = -3  # the name of that setting in glibc's malloc.h
CACHE_SHARE = 0.7  # of the free memory; the rest is for prefilling, copies on the way, and others on the machine
LOGITS_COPIES = 6  # [rows, vocab] in float32: logits, log-probabilities, their exponentials and sums, temporaries


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors on `device` can take.

    On a GPU what the driver and torch's allocator have free; else what the system, or the container it
    runs in, says is available, shared evenly among torchrun's processes there; 8 GiB where it says nothing.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = []
    for line in read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            limits.append(1024 * int(line.split()[1]))
    group = Path("/sys/fs/cgroup")
    limit, used = read(group / "memory.max").strip(), read(group / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        limits.append(max(0, int(limit) - int(used)))
    return min(limits, default=8 * 2**30) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def return_freed_blocks() -> None:
    """Make the C library return freed blocks of 4 MiB and more to the system at once (glibc; elsewhere nothing changes).

    By itself it comes to keep those below 32 MiB for later, and what backward frees in another order than it was taken
    leaves holes that nothing fits into: a third more memory at the width of Qwen3-1.7B, for no gain in speed.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 4 * 2**20)


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds on `device`; on a GPU only tensors count."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = read("/proc/self/statm").split()[1:2]
    return resource.getpagesize() * int(pages[0]) if pages else 0


def read(path: str | Path) -> str:
    """The text of a file of the system's, empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def token_bytes(model: Qwen3) -> int:
    """Bytes that the keys and values of one token take, in all layers."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


def cache_tokens_that_fit(model: Qwen3, max_new_tokens: int) -> int:
    """Tokens of cache that free memory allows, beside the logits of rows that have `max_new_tokens` of them each."""
    row_bytes = max_new_tokens * token_bytes(model)
    logits_bytes = LOGITS_COPIES * 4 * model.config.vocab_size
    bytes_for_cache = CACHE_SHARE * free_memory(model.device) * row_bytes / (row_bytes + logits_bytes)
    return int(bytes_for_cache / token_bytes(model))

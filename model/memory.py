"""How much memory is free, and how many tokens of keys and values fit into it."""

import os
import re
from pathlib import Path

import torch

from model.qwen3 import Qwen3

CACHE_SHARE = 0.7  # of the free memory; the rest is for prefilling, temporary copies, and other processes
LOGITS_COPIES = 6  # [rows, vocab] in float32: logits, log-probabilities, exponentials, sums, temporaries


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors on `device` can take; on a CPU each of torchrun's processes gets its share."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = []
    for kilobytes in re.findall(r"^MemAvailable: +(\d+)", read("/proc/meminfo"), re.MULTILINE):
        limits.append(1024 * int(kilobytes))
    limit = read("/sys/fs/cgroup/memory.max").strip()
    used = read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        files = re.findall(r"^(?:in)?active_file (\d+)", read("/sys/fs/cgroup/memory.stat"), re.MULTILINE)
        freed_on_demand = sum(map(int, files))
        limits.append(max(0, int(limit) - int(used) + freed_on_demand))
    return min(limits, default=8 * 2**30) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def read(path: str) -> str:
    """The text of a system file, empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def token_bytes(model: Qwen3) -> int:
    """Bytes of the keys and values of one token, in all layers."""
    config = model.config
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize


def cache_tokens_that_fit(model: Qwen3, max_new_tokens: int) -> int:
    """Tokens of cache that free memory allows, beside the logits of rows with `max_new_tokens` each."""
    row_bytes = max_new_tokens * token_bytes(model)
    logits_bytes = LOGITS_COPIES * 4 * model.config.vocab_size
    bytes_for_cache = CACHE_SHARE * free_memory(model.device) * row_bytes / (row_bytes + logits_bytes)
    return int(bytes_for_cache / token_bytes(model))

"""How much memory is free, and how many tokens of keys and values fit into it."""

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import torch

from model.qwen3 import Qwen3

CACHE_SHARE = 0.7  # of the free memory; the rest is for prefilling, temporary copies, and other processes
LOGITS_COPIES = 6  # [rows, vocab] in float32: logits, log-probabilities, exponentials, sums, temporaries
# Controllers of a group, none in version 2 -> folder, files of limit and use, prefix in memory.stat
CGROUPS = {
    "": ("/sys/fs/cgroup", "max", "current", ""),
    "memory": ("/sys/fs/cgroup/memory", "limit_in_bytes", "usage_in_bytes", "total_"),
}


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors on `device` can take; on a CPU each of torchrun's processes gets its share."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = kilobytes(read("/proc/meminfo"))
    machine = [1024 * meminfo["MemAvailable"]] if "MemAvailable" in meminfo else []
    shared = min([*machine, *cgroup_limits()], default=8 * 2**30)
    return min([shared // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), *process_limits()])


def cgroup_limits() -> Iterator[int]:
    """Bytes left in each control group that this process is in, from its own up to the root."""
    for group in read("/proc/self/cgroup").splitlines() or ["0::/"]:
        _, controllers, path = group.split(":", 2)
        version = CGROUPS.get("memory" if "memory" in controllers.split(",") else controllers)
        if version is None:
            continue
        root, most, current, total = version
        for folder in (Path(path), *Path(path).parents):
            prefix = f"{root}{str(folder).rstrip('/')}/memory."
            limit, used = read(prefix + most).strip(), read(prefix + current).strip()
            if limit.isdigit() and used.isdigit():
                pages = rf"^{total}(?:in)?active_file ([0-9]+)$"
                cached = map(int, re.findall(pages, read(prefix + "stat"), re.MULTILINE))  # freed on demand
                yield max(0, int(limit) - int(used) + sum(cached))


def process_limits() -> Iterator[int]:
    """Bytes left under the limits of this process alone, such as that of `ulimit -v`."""
    status = kilobytes(read("/proc/self/status"))
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        most, _ = resource.getrlimit(limit)
        if most != resource.RLIM_INFINITY:
            yield max(0, most - 1024 * status.get(used, 0))


def kilobytes(text: str) -> dict[str, int]:
    """The sizes in a file of /proc, with lines such as `VmSize:   1234 kB`."""
    return {name: int(size) for name, size in re.findall(r"^(\w+):\s+([0-9]+) kB$", text, re.MULTILINE)}


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

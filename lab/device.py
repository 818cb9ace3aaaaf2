"""The device and dtype that a recipe asks for, and the memory that this process holds there."""

import contextlib
import ctypes
import os
import resource
import sys

import torch

from lab.recipe import Recipe, RecipeError
from model.memory import read

MMAP_THRESHOLD = -3  # the name of that setting in glibc's malloc.h


def pick_device(recipe: Recipe) -> str:
    if recipe.device == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=recipe.device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device {recipe.device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return recipe.device


def pick_dtype(recipe: Recipe) -> torch.dtype | None:
    return {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[recipe.dtype]


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors have held on a GPU so far; on a CPU, the most the process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds on `device`; on a GPU only tensors count."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = read("/proc/self/statm").split()[1:2]
    return resource.getpagesize() * int(pages[0]) if pages else 0


def return_freed_blocks() -> None:
    """Make the C library return freed blocks of 4 MiB and more to the system at once (glibc only).

    Otherwise it keeps those below 32 MiB, and backward, which frees in another order than it allocates,
    leaves holes that nothing fits into: a third more memory at the width of Qwen3-1.7B, for no gain in speed.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 4 * 2**20)

"""Which device and dtype a recipe asks for, and the most memory that was held there."""

import os
import resource
import sys

import torch

from lab.recipe import Recipe, RecipeError


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

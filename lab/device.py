"""Where a run takes place: its device and dtype, the memory it holds there, and its processes."""

import contextlib
import ctypes
import os
import re
import resource
import sys
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from lab.recipe import Recipe, RecipeError
from model.memory import read

CARD = "/dev/nvidiactl"  # there if this system, or container, has an NVIDIA card


def pick_device(recipe: Recipe) -> torch.device:
    """The device that a recipe names; a GPU becomes the current one, on whose stream graphs are captured."""
    name = recipe.device
    if name == "auto":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    return torch.device(name)


def check_driver() -> None:
    """RecipeError: there is a GPU here, and this torch cannot use it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if os.path.exists(CARD) and not hidden and not torch.cuda.is_available():
        driver = re.search(r"\b[0-9]{3}\.[0-9.]+", read("/proc/driver/nvidia/version")) or ["unknown"]
        build = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}"
        advice = "install a torch for it, or go on without by --model tiny or --device cpu"
        raise RecipeError(f"the NVIDIA driver here ({driver[0]}) cannot be used by {build}: {advice}")


def pick_dtype(recipe: Recipe, device: torch.device) -> torch.dtype | None:
    """The dtype of the weights; None: as stored. A device without bfloat16 gets float32."""
    if recipe.dtype == "auto":
        return None if has_bfloat16(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[recipe.dtype]


def has_bfloat16(device: torch.device) -> bool:
    """Whether `device` calculates in bfloat16: NVIDIA's from compute capability 8.0 on, CPUs with AVX-512.

    Others emulate it. With AVX2 alone, a CPU multiplies float32 matrices 60 times as fast as those.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # What torch asks before it multiplies bfloat16 by oneDNN.
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors have held on a GPU so far; on a CPU, the most the process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def return_freed_blocks() -> None:
    """Have glibc return freed blocks of 4 MiB and more to the system, not 32: a third less memory is held."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-3, 4 * 2**20)  # M_MMAP_THRESHOLD of malloc.h


PATIENCE = timedelta(minutes=30)  # of ranks that wait for another, which may be saving


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

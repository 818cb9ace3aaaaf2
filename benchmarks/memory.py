"""The memory plan against the measured peak: whole GRPO steps of several shapes, each in its own process.

    python benchmarks/memory.py          # on a CPU: the process's peak resident memory; about five minutes

Weights and prompts are random, completions all have the maximum length. Each case takes two steps, since the
optimizer's moments are made in the first and stay.
"""

import json
import sys
from dataclasses import dataclass

import torch
import tyro
from common import (
    DEEP,
    LARGE_VOCABULARY,
    QWEN3_06B,
    Workload,
    grpo_steps,
    held_memory,
    print_table,
    random_model,
    run_apart,
)

from lab.device import peak_memory, return_freed_blocks
from lab.memory_plan import gb
from model import Qwen3Config, add_adapters
from model.memory import free_memory
from rl.optimizer import OptimizerSettings


@dataclass(frozen=True)
class Case:
    config: Qwen3Config
    dtype: torch.dtype
    optimizer: OptimizerSettings
    work: Workload
    adapter_rank: int = 0  # of adapters over int8 weights; 0: the weights themselves are trained


FEW = Workload(prompts=2, samples=8, prompt_length=140, new_tokens=32)
MORE = Workload(prompts=4, samples=8, prompt_length=140, new_tokens=32)
LONGER = Workload(prompts=4, samples=8, prompt_length=140, new_tokens=64)
LONGEST = Workload(prompts=4, samples=8, prompt_length=140, new_tokens=128)
PLAIN = OptimizerSettings(micro_batch_tokens=1024)
LARGE = OptimizerSettings(micro_batch_tokens=2048)
CHECKPOINTING = OptimizerSettings(micro_batch_tokens=2048, activation_checkpointing=True)
LEAN = OptimizerSettings("adamw8bit", "stochastic", micro_batch_tokens=1024, activation_checkpointing=True)
CASES = {
    "large vocabulary, float32": Case(LARGE_VOCABULARY, torch.float32, PLAIN, LONGER),
    "deep, float32": Case(DEEP, torch.float32, LARGE, LONGEST),
    "deep, checkpointing": Case(DEEP, torch.float32, CHECKPOINTING, LONGEST),
    "Qwen3-0.6B, bfloat16, masters": Case(QWEN3_06B, torch.bfloat16, PLAIN, FEW),
    "Qwen3-0.6B, 8-bit, stochastic, checkpointing": Case(QWEN3_06B, torch.bfloat16, LEAN, MORE),
    "Qwen3-0.6B, int8 and adapters": Case(QWEN3_06B, torch.bfloat16, PLAIN, FEW, adapter_rank=16),
}


@dataclass(frozen=True)
class Settings:
    """Compare the memory plan with the measured peak."""

    case: tuple[str, ...] = tuple(CASES)
    """Which cases to run."""
    here: bool = False
    """Run the one case in this process and print JSON; what the cases' processes are started with."""


def measure(case: Case) -> dict:
    """Metrics of the second of two GRPO steps, the peak memory of both, and the plan made before them."""
    return_freed_blocks()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free = free_memory(device)
    before = held_memory(device)
    model = random_model(case.config, case.dtype, device)
    if case.adapter_rank:
        add_adapters(model, case.adapter_rank, alpha=2.0 * case.adapter_rank, int8=True)
    (_, metrics), plan = grpo_steps(model, case.optimizer, case.work, steps=2, updates=2, free=free)
    names = ("rollout_seconds", "update_seconds", "grad_norm", "log_ratio_std", "micro_batch_tokens")
    return {name: metrics[name] for name in names} | {
        "peak_memory_bytes": peak_memory(device),
        "planned_bytes": before + plan.peak,
        "plan": str(plan),
    }


def row(name: str) -> list[str]:
    """The row of a case, which runs in a process of its own; one that says so if it fails."""
    try:
        found = run_apart([sys.executable, __file__, "--here", "--case", name])
    except RuntimeError as error:
        return [name, "", "", "", "", "", str(error)]
    planned = found["planned_bytes"]
    measured = found["peak_memory_bytes"]
    return [
        name,
        gb(planned),
        gb(measured),
        f"{planned / measured:.2f}",
        f"{found['rollout_seconds']:.1f}",
        f"{found['update_seconds']:.1f}",
        found["plan"],
    ]


def main(settings: Settings) -> None:
    if settings.here:
        print(json.dumps(measure(CASES[settings.case[0]])))
        return
    rows = []
    for name in settings.case:
        rows.append(row(name))
        print(": ".join(rows[-1][:4]), flush=True)
    columns = ["case", "planned", "measured", "planned / measured", "rollout, s", "update, s", "plan"]
    print_table("memory: planned against measured peak", columns, rows)


if __name__ == "__main__":
    main(tyro.cli(Settings))

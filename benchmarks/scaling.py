"""What a GRPO step costs for other sizes, lengths and numbers of devices: a cost model, checked on this
machine.

    python benchmarks/scaling.py               # calibrate, predict, measure; ten minutes on two cores
    python benchmarks/scaling.py --no-measure  # only predictions for GPUs, from a datasheet

The model is `benchmarks/costs.py`. Its rates come from four small steps of one process and one exchange
between two. It then predicts steps of other shapes, group sizes, lengths and numbers of processes, which are
measured too. Each measured step runs in its own processes, with a thread each; weights are random, in
float32.
"""

import os
import sys
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import tyro
from costs import (
    Hardware,
    Seconds,
    Setting,
    Step,
    decode_seconds,
    learn_seconds,
    memory,
    prefill_seconds,
    seconds,
)
from rich.console import Console
from rich.table import Table
from several import EXCHANGED, exchange_measured, in_processes, step_measured

from lab.memory_plan import MemoryPlan, gb
from model import Qwen3Config
from rl.optimizer import OptimizerSettings

SMALL = Qwen3Config(2048, 128, 384, 4, 4, 2, 32)
MIDDLE = Qwen3Config(4096, 384, 1152, 4, 6, 3, 64)
WIDE = Qwen3Config(4096, 768, 2304, 3, 12, 6, 64)
QWEN3 = {  # of the published config.json
    "0.6B": Qwen3Config(151936, 1024, 3072, 28, 16, 8, 128),
    "1.7B": Qwen3Config(151936, 2048, 6144, 28, 16, 8, 128),
    "4B": Qwen3Config(151936, 2560, 9728, 36, 32, 8, 128),
    "8B": Qwen3Config(151936, 4096, 12288, 36, 32, 8, 128, tie_word_embeddings=False),
    "14B": Qwen3Config(151936, 5120, 17408, 40, 40, 8, 128, tie_word_embeddings=False),
    "32B": Qwen3Config(151936, 5120, 25600, 64, 64, 8, 128, tie_word_embeddings=False),
}

ADAMW = OptimizerSettings("adamw")


def on_cpu(config: Qwen3Config, step: Step, devices: int = 1) -> Setting:
    return Setting(config, torch.float32, ADAMW, step, devices)


LAUNCH = on_cpu(SMALL, Step(1, 1, 16, 65))
ROWS = on_cpu(SMALL, Step(4, 16, 16, 33))
WEIGHTS = on_cpu(WIDE, Step(1, 1, 16, 33))
ARITHMETIC = on_cpu(WIDE, Step(4, 8, 32, 17))
BASE = Step(4, 8, 32, 32)
UNEQUAL = Step(8, 8, 32, 96, mean=24)
CHECKED = {
    "128 wide, 8 x 16 x 32": on_cpu(SMALL, Step(8, 16, 32, 32)),
    "384 wide, 4 x 8 x 32": on_cpu(MIDDLE, BASE),
    "groups twice as large": on_cpu(MIDDLE, replace(BASE, samples=16)),
    "three times as long": on_cpu(MIDDLE, replace(BASE, limit=96)),
    "in 2 updates": on_cpu(MIDDLE, replace(BASE, updates=2)),
    "unequal, 96 at most, 8 x 8": on_cpu(MIDDLE, UNEQUAL),
    "384 wide, 2 processes": on_cpu(MIDDLE, BASE, 2),
    "in 2 updates, 2 processes": on_cpu(MIDDLE, replace(BASE, updates=2), 2),
    "unequal, 2 processes": on_cpu(MIDDLE, UNEQUAL, 2),
    "768 wide, 2 processes": on_cpu(WIDE, ARITHMETIC.step, 2),
}

# Rates of the datasheet of an H100 SXM with a 400 Gb/s network card each, times the share that is assumed
# to be reached; launch and latency are assumed.
H100 = Hardware(
    "cuda",
    learn_flops=0.4 * 989e12,
    decode_flops=0.4 * 989e12,
    bandwidth=0.6 * 3.35e12,
    optimizer_bandwidth=0.3 * 3.35e12,
    launch=30e-6,
    row=0.0,
    memory=79e9,
    link=0.7 * 450e9,
    network=0.7 * 50e9,
    latency=30e-6,
    node=8,
)
GPU_STEP = Step(prompts=256, samples=16, prompt_length=100, limit=1024, mean=512, updates=2)


@dataclass(frozen=True)
class Settings:
    """Calibrate and check the cost model, and print what it says of GPUs."""

    measure: bool = True
    repeats: int = 3
    """Of each measured step; medians count."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: processor time of the busiest process, where other work on the machine would make wall clocks say
    anything."""


def calibrate(repeats: int, clock: str) -> Hardware:
    """The rates of this machine, one of its threads a device, from four steps by one process and an exchange
    by two."""
    steps = (LAUNCH, ROWS, WEIGHTS, ARITHMETIC)
    launch, rows, weights, arithmetic = (
        in_processes(1, step_measured, setting, repeats, clock) for setting in steps
    )
    small, large = in_processes(2, exchange_measured, repeats, clock).values()
    guesses = {"learn_flops": 1.0, "decode_flops": 1e10, "bandwidth": 1e10, "launch": 1e-4, "row": 0.0}
    fixed = {"memory": 8e9, "network": 1e8, "node": 8, "latency": small}
    link = 4 * (EXCHANGED[1] - EXCHANGED[0]) / (large - small)
    moved = arithmetic["state"] / arithmetic["optimizer"]
    hardware = Hardware("cpu", **guesses, **fixed, optimizer_bandwidth=moved, link=link)
    flops = learn_seconds(ARITHMETIC, hardware, ARITHMETIC.step.lengths())
    hardware = replace(hardware, learn_flops=flops / (arithmetic["update"] - arithmetic["optimizer"]))

    def decoding(setting: Setting, **rates) -> float:
        return decode_seconds(setting, replace(hardware, **rates), setting.step.lengths())

    def left(setting: Setting, found: dict, **rates) -> float:
        return (
            found["rollout"]
            - prefill_seconds(setting, hardware, setting.step.prompts)
            - decoding(setting, **rates)
        )

    free = {"bandwidth": 1e30, "decode_flops": 1e30}
    layer_steps = (LAUNCH.step.limit - 1) * LAUNCH.config.num_hidden_layers
    for _ in range(20):  # each rate from the step that it rules, the others held
        hardware = replace(hardware, launch=max(0.0, left(LAUNCH, launch, launch=0.0)) / layer_steps)
        row_steps = (
            (ROWS.step.limit - 1) * ROWS.step.prompts * ROWS.step.samples * ROWS.config.num_hidden_layers
        )
        hardware = replace(hardware, row=max(0.0, left(ROWS, rows, row=0.0)) / row_steps)
        read = decoding(WEIGHTS, bandwidth=1.0, launch=0.0, row=0.0)
        hardware = replace(hardware, bandwidth=read / left(WEIGHTS, weights, **free))
        done = decoding(ARITHMETIC, decode_flops=1.0, launch=0.0, row=0.0)
        hardware = replace(hardware, decode_flops=done / left(ARITHMETIC, arithmetic, **free))
    return hardware


def predict(setting: Setting, hardware: Hardware) -> tuple[Seconds, MemoryPlan]:
    plan = memory(setting, hardware)
    return seconds(setting, hardware, plan), plan


def compare(repeats: int, clock: str) -> None:
    """Predicted against measured."""
    hardware = calibrate(repeats, clock)
    print(
        "calibrated:",
        ", ".join(f"{f.name} {getattr(hardware, f.name):.3g}" for f in fields(hardware)[1:]),
        flush=True,
    )
    columns = (
        "step",
        "rollout, s",
        "predicted",
        "error",
        "update, s",
        "predicted",
        "error",
        "peak",
        "planned",
        "error",
    )
    table = table_of(f"predicted against measured by the {clock} clock, {date.today()}", columns)
    for name, setting in CHECKED.items():
        expected, _ = predict(setting, hardware)
        found = in_processes(setting.devices, step_measured, setting, repeats, clock)
        row = [name]
        for part in ("rollout", "update"):
            guess = getattr(expected, part)
            row += [f"{found[part]:.2f}", f"{guess:.2f}", f"{guess / found[part] - 1:+.0%}"]
        row += [gb(found["peak"]), gb(found["planned"]), f"{found['planned'] / found['peak'] - 1:+.0%}"]
        table.add_row(*row)
        print(" | ".join(row), flush=True)
    Console(width=160).print(table)


def table_of(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def fitting(config: Qwen3Config, devices: int) -> tuple[str, Seconds, MemoryPlan] | None:
    """(rounding, seconds, plan) of the first way that fits into the memory of an H100."""
    for rounding in ("masters", "stochastic"):
        optimizer = OptimizerSettings("adamw8bit", rounding, activation_checkpointing=True)
        setting = Setting(config, torch.bfloat16, optimizer, GPU_STEP, devices)
        plan = memory(setting, H100)
        if plan.peak <= H100.memory:
            return rounding, seconds(setting, H100, plan), plan
    return None


def gpus() -> None:
    """Seconds of a step on H100s, and what they go to: predictions."""
    step = GPU_STEP
    parts = [field.name for field in fields(Seconds)]
    columns = (
        "model, GPUs",
        "rounding",
        "GB",
        "step, s",
        "tokens/s a GPU",
        *(part.replace("_", " ") for part in parts),
    )
    shape = f"{step.prompts} prompts x {step.samples}, {step.limit} tokens at most"
    title = f"PREDICTED for H100s, measured by nobody: {shape}"
    table = table_of(f"{title}, {step.mean} or so on average, {step.updates} updates", columns)
    tokens = step.lengths().sum()
    for name, config in QWEN3.items():
        for devices in (1, 8, 64):
            way = fitting(config, devices)
            if way is None:
                table.add_row(f"{name}, {devices}", "does not fit", *[""] * (len(columns) - 2))
                continue
            rounding, spent, plan = way
            shares = (f"{getattr(spent, part):.3g}" for part in parts)
            rate = tokens / spent.total / devices
            table.add_row(
                f"{name}, {devices}",
                rounding,
                f"{plan.peak / 1e9:.0f}",
                f"{spent.total:.3g}",
                f"{rate:,.0f}",
                *shares,
            )
    Console(width=180).print(table)


def main(settings: Settings) -> None:
    if settings.measure:
        compare(settings.repeats, settings.clock)
    gpus()


if __name__ == "__main__":
    main(tyro.cli(Settings))

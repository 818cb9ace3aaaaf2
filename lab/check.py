"""Check this code on this device: `make check`, or `python -m lab.check --model Qwen/Qwen3-1.7B`.

Each row compares two ways to the same numbers.
"""

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import tyro
from rich.table import Table

from data import Countdown
from lab.decoding import MOST_NATS, Row, decoding_row, exceeds
from lab.device import check_driver, pick_device
from lab.errors import user_errors
from lab.recipe import Recipe
from lab.screen import plain_console
from model import Qwen3, add_adapters, generate, load_model
from rl.batch import Sample, completion_logprobs, make_batch
from rl.optimizer import Optimizer, OptimizerSettings
from rl.rollout import SamplingSettings, prompt_for
from rl.sft import sft_step
from rl.trainer import Trainer


class UpdateCase(NamedTuple):
    """A way to update weights, and whether adapters on int8 weights are what learns."""

    name: str
    settings: OptimizerSettings
    adapters: bool = False


UPDATES = (
    UpdateCase("adamw", OptimizerSettings("adamw")),
    UpdateCase("adamw8bit", OptimizerSettings("adamw8bit")),
    UpdateCase("stochastic rounding", OptimizerSettings("adamw", "stochastic")),
    UpdateCase("int8 with adapters", OptimizerSettings("adamw"), adapters=True),
)


def decoding(source: str, device: torch.device) -> Iterator[Row]:
    for dtype in MOST_NATS:
        model, prompts = loaded(source, device, dtype)
        yield decoding_row(model, prompts)


def training(source: str, device: torch.device) -> Iterator[Row]:
    """Compare the log-probabilities of packed training with those of sampling."""
    for dtype, most in MOST_NATS.items():
        model, prompts = loaded(source, device, dtype)
        batch = make_batch(samples_of(model, prompts), device)
        with torch.no_grad():
            logprobs = completion_logprobs(model, batch)
        gap = float((logprobs - batch.old_logprobs)[batch.mask].abs().mean())
        found = f"log-probabilities {gap:.1g} nats from those of sampling"
        yield Row(f"training, {dtype}", found, exceeds(gap, most))


def updates(source: str, device: torch.device) -> Iterator[Row]:
    """Compare the fall of the bundled model's loss in nine updates with float32 on the CPU."""
    model, prompts = loaded("tiny", "cpu")
    samples = samples_of(model, prompts)[::4]  # two of each prompt, as some CPUs emulate bfloat16
    for name, settings, adapters in UPDATES:
        expected = fall_of_loss(samples, "cpu", torch.float32, OptimizerSettings(), adapters)
        fall = fall_of_loss(samples, device, torch.bfloat16, settings, adapters)
        found = f"the loss falls by {fall:.4f}, on the CPU by {expected:.4f}"
        yield Row(f"update, {name}", found, exceeds(abs(fall / expected - 1), 0.1))


def fall_of_loss(
    samples: list[Sample], device, dtype: torch.dtype, settings: OptimizerSettings, adapters: bool
) -> float:
    """The fall of the bundled model's loss in nine updates; adapters are over int8 weights in bfloat16."""
    model, _ = loaded("tiny", device, dtype)
    if adapters:
        add_adapters(model, rank=8, alpha=32.0, int8=dtype == torch.bfloat16)
    trainer = Trainer(model, Optimizer(model, settings))
    losses = [sft_step(trainer, samples, 1e-4)["loss"] for _ in range(10)]
    return losses[0] - losses[-1]


def loaded(source: str, device, dtype: torch.dtype | None = None) -> tuple[Qwen3, list[list[int]]]:
    """A model, and prompts of several lengths."""
    model, tokenizer = load_model(source, device, dtype)
    task = Countdown(max_number=20, max_target=50)
    sampling = SamplingSettings(thinking=tokenizer.knows_thinking)
    return model, [prompt_for(tokenizer, task, problem, sampling) for problem in task.generate(4, seed=0)]


def samples_of(model: Qwen3, prompts: list[list[int]]) -> list[Sample]:
    """Eight completions of each prompt."""
    groups = generate(model, prompts, num_samples=8, max_new_tokens=48)
    samples = []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            samples.append(Sample(prompt, completion.token_ids, completion.logprobs))
    return samples


PARTS = (decoding, training, updates)


def rows_of(part: Callable, source: str, device: torch.device) -> list[Row]:
    """The rows of a part; one that says so if it fails."""
    try:
        return list(part(source, device))
    except RuntimeError as error:
        return [Row(part.__name__, f"{type(error).__name__}: {str(error).splitlines()[0]}", wrong=True)]


def main(model: str = "tiny", device: str = "auto") -> None:
    """Compare what a device calculates with what it should, for tiny, a folder or a hub id as the model."""
    if device == "auto":
        check_driver()
    place = pick_device(Recipe(device=device))
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "CPU"
    table = Table("", "found", "", title=f"{model} on {name}, torch {torch.__version__}")
    rows = [row for part in PARTS for row in rows_of(part, model, place)]
    for row in rows:
        table.add_row(row.what, row.found, "wrong" if row.wrong else "")
    plain_console(least_width=80).print(table)
    wrong = [row.what for row in rows if row.wrong]
    if wrong:
        sys.exit(f"wrong on this device: {'; '.join(wrong)}")


if __name__ == "__main__":
    with user_errors("take a smaller --model"):
        tyro.cli(main, description=__doc__)

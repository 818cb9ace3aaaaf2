"""Check this code on this device: `make check`, or `python -m lab.check --model Qwen/Qwen3-1.7B`.

Each row compares two ways to the same numbers.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from rich.table import Table

from data import Countdown
from lab.checkpoint import TrainState, load_optimizer, save_checkpoint
from lab.decoding import NEW_TOKENS, Row, decoding_row, exceeds
from lab.device import check_driver, peak_memory, pick_device
from lab.errors import user_errors
from lab.memory_plan import gb, plan_memory, work_of
from lab.recipe import EvaluationSettings, Recipe
from lab.screen import plain_console
from model import Qwen3, add_adapters, generate, load_model, token_logprobs
from model.memory import free_memory, token_bytes
from rl.batch import Sample, completion_logprobs, make_batch
from rl.grpo import GRPOStage
from rl.optimizer import Optimizer, OptimizerSettings
from rl.rollout import SamplingSettings, prompt_for
from rl.sft import sft_step
from rl.trainer import Trainer

MOST_GRADIENT_OFF = {torch.float32: 5e-3, torch.bfloat16: 0.1}  # parts of its norm that rounding explains


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
EIGHT_BIT = OptimizerSettings("adamw8bit")


def decoding(source: str, device: torch.device) -> Iterator[Row]:
    for dtype in MOST_GRADIENT_OFF:
        model, prompts = loaded(source, device, dtype)
        yield decoding_row(f"decoding, {model.dtype}", model, prompts)
        if device.type == "cuda":
            model.graphed = False
            yield decoding_row(f"the same without graphs, {model.dtype}", model, prompts)


def gradient(source: str, device: torch.device) -> Iterator[Row]:
    """Compare gradients, packed and one sequence at a time."""
    for dtype in MOST_GRADIENT_OFF:
        model, prompts = loaded(source, device, dtype)
        samples = samples_of(model, prompts)
        batch = make_batch(samples, device)
        completion_logprobs(model, batch)[batch.mask].mean().backward()
        packed = [parameter.grad for parameter in model.parameters()]
        model.zero_grad()
        for one in samples:
            ids = torch.tensor(one.prompt_ids + one.completion_ids, device=device)
            logprobs = token_logprobs(model(ids[None])[0, :-1], 1.0, model.num_tokens)
            logprobs = logprobs.gather(-1, ids[1:, None])[len(one.prompt_ids) - 1 :]
            (logprobs.sum() / batch.mask.sum()).backward()
        plain = [parameter.grad for parameter in model.parameters()]
        gap = torch.stack([(a - b).norm() for a, b in zip(packed, plain, strict=True)]).norm()
        gap = float(gap / torch.stack([grad.norm() for grad in plain]).norm())
        wrong = exceeds(gap, MOST_GRADIENT_OFF[dtype])
        yield Row(f"packed gradient, {model.dtype}", f"{100 * gap:.2g} % off", wrong)


def updates(source: str, device: torch.device) -> Iterator[Row]:
    """Compare the fall of the loss in ten updates with float32 on the CPU."""
    tiny, prompts = loaded("tiny", "cpu")
    samples = samples_of(tiny, prompts)[::4]  # two of each prompt, as some CPUs emulate bfloat16
    for name, settings, adapters in UPDATES:
        falls = []
        for place, dtype in (("cpu", torch.float32), (device, torch.bfloat16)):
            model, _ = loaded("tiny", place, dtype)
            if adapters:
                add_adapters(model, rank=8, alpha=32.0, int8=place is device)
            optimizer = Optimizer(model, settings if place is device else OptimizerSettings())
            trainer = Trainer(model, optimizer)
            losses = [sft_step(trainer, samples, 1e-4)["loss"] for _ in range(10)]
            falls.append(losses[0] - losses[-1])
        found = f"the loss falls by {falls[1]:.4f}, on the CPU by {falls[0]:.4f}"
        yield Row(f"update, {name}", found, exceeds(abs(falls[1] / falls[0] - 1), 0.1))


def resuming(source: str, device: torch.device) -> Iterator[Row]:
    model, tokenizer = load_model("tiny", device, torch.bfloat16)
    tiny, prompts = loaded("tiny", device)
    samples = samples_of(tiny, prompts)
    optimizer = Optimizer(model, EIGHT_BIT)
    sft_step(Trainer(model, optimizer), samples, 1e-3)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "step_0001"
        save_checkpoint(saved, model, tokenizer, optimizer, TrainState(), Recipe())
        again, _ = load_model(saved, device)
        resumed = Optimizer(again, EIGHT_BIT)
        load_optimizer(resumed, saved)
    trainers = (Trainer(model, optimizer), Trainer(again, resumed))
    losses = [[sft_step(trainer, samples, 1e-3)["loss"] for _ in range(3)] for trainer in trainers]
    gap = np.abs(np.subtract(*losses)).max()  # NaN if one of them is
    yield Row("save, load, resume", f"losses of the next steps {gap:.1g} apart", exceeds(gap, 1e-3))


def memory(source: str, device: torch.device) -> Iterator[Row]:
    """Compare the planned and the measured peak."""
    if device.type != "cuda":
        yield Row("memory", "on a GPU only: the peak of a process cannot be reset")
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    free, before = free_memory(device), peak_memory(device)
    model, prompts = loaded(source, device)
    stages = (GRPOStage(prompts_per_step=4, samples_per_prompt=8, updates_per_step=1),)
    recipe = Recipe(sampling=SamplingSettings(128), evaluation=EvaluationSettings(problems=4), stages=stages)
    work = work_of(recipe, max(map(len, prompts)))
    plan = plan_memory(model, EIGHT_BIT, work, free)
    trainer = Trainer(model, Optimizer(model, EIGHT_BIT), plan.micro_batch_tokens)
    sft_step(trainer, samples_of(model, prompts, 128), 1e-6)
    measured = peak_memory(device) - before
    wrong = exceeds(measured, 1.1 * plan.peak)
    yield Row("memory", f"{gb(plan.peak)} planned, {gb(measured)} measured", wrong)


def speed(source: str, device: torch.device) -> Iterator[Row]:
    """Measure decoding of 32 rows. At the limit a step reads weights and cache once, at copy speed."""
    large = torch.zeros(2, 2**27, dtype=torch.uint8, device=device)
    rate = large.numel() / min(seconds(device, partial(large[0].copy_, large[1])) for _ in range(5))
    model, prompts = loaded(source, device)
    lengths = (1, 1, NEW_TOKENS, NEW_TOKENS)  # the first of each kind sets things up
    _, prefill, _, whole = [
        seconds(device, partial(samples_of, model, prompts, length)) for length in lengths
    ]
    step = (whole - prefill) / (NEW_TOKENS - 1)
    cached = sum(map(len, prompts)) + 8 * len(prompts) * NEW_TOKENS / 2
    moved = model.num_parameters() * model.dtype.itemsize + cached * token_bytes(model)
    share = f"{100 * moved / rate / step:.0f} % of the limit by {rate / 1e9:.0f} GB/s"
    yield Row("speed", f"{8 * len(prompts) / step:,.0f} tokens/s in {8 * len(prompts)} rows, {share}")


def seconds(device: torch.device, function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def loaded(source: str, device, dtype: torch.dtype | None = None) -> tuple[Qwen3, list[list[int]]]:
    """A model, and prompts of several lengths."""
    model, tokenizer = load_model(source, device, dtype)
    task = Countdown(max_number=20, max_target=50)
    sampling = SamplingSettings(thinking=tokenizer.knows_thinking)
    return model, [prompt_for(tokenizer, task, problem, sampling) for problem in task.generate(4, seed=0)]


def samples_of(model: Qwen3, prompts: list[list[int]], length: int = 48) -> list[Sample]:
    """Eight completions of each prompt."""
    pairs = zip(prompts, generate(model, prompts, num_samples=8, max_new_tokens=length), strict=True)
    return [Sample(prompt, completion.token_ids) for prompt, group in pairs for completion in group]


PARTS = (decoding, gradient, updates, resuming, memory, speed)


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
    wrong = []
    for part in PARTS:
        for row in rows_of(part, model, place):
            table.add_row(row.what, row.found, "wrong" if row.wrong else "")
            wrong += [row.what] * row.wrong
    plain_console(least_width=80).print(table)
    if wrong:
        sys.exit(f"wrong on this device: {'; '.join(wrong)}")


if __name__ == "__main__":
    with user_errors("take a smaller --model"):
        tyro.cli(main, description=__doc__)

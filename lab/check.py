"""Does this code work on this device? `make check`, or `python -m lab.check --model Qwen/Qwen3-1.7B`.

Each row compares two ways to the same numbers. A run on a GPU makes the first comparison before it starts.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from rich.table import Table

from data import Countdown
from lab.checkpoint import TrainState, load_into, save_checkpoint
from lab.device import check_driver, peak_memory, pick_device
from lab.errors import user_errors
from lab.memory_plan import gb, plan_memory, work_of
from lab.recipe import EvaluationSettings, Recipe
from lab.runfolder import write_whole
from lab.screen import plain_console
from model import ModelError, Qwen3, add_adapters, generate, load_model, token_logprobs
from model.memory import free_memory, token_bytes
from model.sampler import random_streams, sample
from model.weights import TINY
from rl.batch import Sample, completion_logprobs, make_batch
from rl.grpo import GRPOStage
from rl.optimizer import Optimizer, OptimizerSettings
from rl.rollout import SamplingSettings, prompt_of
from rl.sft import sft_step

CACHE = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "pocketgrpo/decoding.json")
NEW_TOKENS = 96  # of a completion: two blocks of the cache, so at least two graphs
# What rounding explains: the share of ids that differ, nats between log-probabilities, parts of a gradient.
ROUNDING = {torch.float32: (0.01, 5e-3, 5e-3), torch.bfloat16: (0.15, 0.05, 0.1)}
UPDATES = {
    "adamw": OptimizerSettings("adamw"),
    "adamw8bit": OptimizerSettings("adamw8bit"),
    "stochastic rounding": OptimizerSettings("adamw", "stochastic"),
    "int8 with adapters": OptimizerSettings("adamw"),
}


class Row(NamedTuple):
    what: str
    found: str
    wrong: bool = False


@torch.inference_mode()
def decoding_row(what: str, model: Qwen3, prompts: list[list[int]]) -> Row:
    """`generate` against a plain forward over each completion; the worse of with and without top-k."""
    worst = (0.0, 0.0)
    for top_k in (None, 20):
        count = other = gap = 0
        options = {"num_samples": 4, "max_new_tokens": NEW_TOKENS, "seed": 0}
        streams = random_streams(prompts, **options).to(model.device)
        stops = range(0, model.num_tokens, 50)  # rows finish at all lengths
        groups = generate(model, prompts, **options, top_k=top_k, stop_token_ids=list(stops))
        for prompt, group, uniforms in zip(prompts, groups, streams, strict=True):
            for completion, row in zip(group, uniforms, strict=True):
                ids = torch.tensor(prompt + completion.token_ids, device=model.device)
                logits = model.next_logits(model.model(ids[None])[0, len(prompt) - 1 : -1])
                ids = ids[len(prompt) :]
                sampled, _ = sample(logits, row[: len(ids)], model.num_tokens, 1.0, top_k)
                logprobs = token_logprobs(logits, 1.0, model.num_tokens).gather(-1, ids[:, None])[:, 0]
                count += len(ids)
                other += int((sampled != ids).sum())
                gap += float((logprobs - logprobs.new_tensor(completion.logprobs)).abs().sum())
        worst = max(worst[0], other / count), max(worst[1], gap / count)
    found = f"{100 * worst[0]:.1f} % other ids, log-probabilities {worst[1]:.1g} nats apart"
    most_other, most_gap, _ = ROUNDING[model.dtype]
    return Row(what, found, not (worst[0] <= most_other and worst[1] <= most_gap))


def check_decoding(model: Qwen3, prompts: list[list[int]]) -> str | None:
    """On a GPU, see that decoding is right; where CUDA graphs make it fail, `model` decodes without.

    The result is remembered for the device, the versions and this code. Returns a line to show, or None if
    there is nothing to say. ModelError: decoding is wrong even without graphs.
    """
    if model.device.type != "cuda":
        return None
    code = b"".join(path.read_bytes() for path in sorted(TINY.parent.glob("*.py")))
    versions = (torch.cuda.get_device_name(model.device), torch.__version__, torch.version.cuda)
    key = " ".join(map(str, (*versions, model.dtype, model.graphed, hashlib.sha256(code).hexdigest())))
    known = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(CACHE.read_text())
    if key in known:
        model.graphed = known[key]
        return None if known[key] else "decoding  without CUDA graphs, which did not work here before"
    said = "decoding  compared with plain forwards: the same"
    graphed = model.graphed
    try:
        row = decoding_row("decoding", model, prompts)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        row = Row("decoding", str(error).splitlines()[0], wrong=True)
    if row.wrong and graphed:
        model.graphed = False
        said = f"decoding  without CUDA graphs, which do not work here ({row.found}): slower, and right"
        row = decoding_row("decoding", model, prompts)
    if row.wrong:
        raise ModelError(f"decoding is wrong on this device ({row.found}): make check says more")
    if not CACHE.is_absolute():  # the user has no home
        return said
    with contextlib.suppress(OSError):
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        write_whole(CACHE, json.dumps(known | {key: model.graphed}))
    return said


def decoding(source: str, device: torch.device) -> Iterator[Row]:
    for dtype in ROUNDING:
        model, prompts = loaded(source, device, dtype)
        yield decoding_row(f"decoding, {model.dtype}", model, prompts)
        if device.type == "cuda":
            model.graphed = False
            yield decoding_row(f"the same without graphs, {model.dtype}", model, prompts)


def gradient(source: str, device: torch.device) -> Iterator[Row]:
    """Of the mean log-probability: packed, and one sequence at a time."""
    for dtype in ROUNDING:
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
        yield Row(f"packed gradient, {model.dtype}", f"{100 * gap:.2g} % off", not gap <= ROUNDING[dtype][2])


def updates(source: str, device: torch.device) -> Iterator[Row]:
    """Of the embedded model: how far ten updates lower the loss, against float32 on the CPU."""
    samples = samples_of(*loaded("tiny", "cpu"))
    for kind, settings in UPDATES.items():
        falls = []
        for place, dtype in (("cpu", torch.float32), (device, torch.bfloat16)):
            model, _ = loaded("tiny", place, dtype)
            if "adapters" in kind:
                add_adapters(model, rank=8, alpha=32.0, int8=place is device)
            optimizer = Optimizer(model, settings if place is device else OptimizerSettings())
            losses = [sft_step(model, optimizer, samples, 1e-4)["loss"] for _ in range(10)]
            falls.append(losses[0] - losses[-1])
        found = f"the loss falls by {falls[1]:.4f}, on the CPU by {falls[0]:.4f}"
        yield Row(f"update, {kind}", found, not 0.9 <= falls[1] / falls[0] <= 1.1)


def resuming(source: str, device: torch.device) -> Iterator[Row]:
    model, tokenizer = load_model("tiny", device, torch.bfloat16)
    samples = samples_of(*loaded("tiny", device))
    optimizer = Optimizer(model, UPDATES["adamw8bit"])
    sft_step(model, optimizer, samples, 1e-3)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "step_0001"
        save_checkpoint(saved, model, tokenizer, optimizer, TrainState(), Recipe())
        again, _ = load_model(saved, device)
        resumed = Optimizer(again, UPDATES["adamw8bit"])
        load_into(resumed, saved)
    pairs = ((model, optimizer), (again, resumed))
    losses = [[sft_step(*pair, samples, 1e-3)["loss"] for _ in range(3)] for pair in pairs]
    gap = max(abs(a - b) for a, b in zip(*losses, strict=True))
    yield Row("save, load, resume", f"losses of the next steps {gap:.1g} apart", not gap <= 1e-3)


def memory(source: str, device: torch.device) -> Iterator[Row]:
    """Of sampling and an update: planned against measured."""
    if device.type != "cuda":
        yield Row("memory", "on a GPU only: the peak of a process cannot be measured anew")
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    free, before = free_memory(device), peak_memory(device)
    model, prompts = loaded(source, device)
    stages = (GRPOStage(prompts_per_step=4, samples_per_prompt=8, updates_per_step=1),)
    recipe = Recipe(sampling=SamplingSettings(128), evaluation=EvaluationSettings(problems=4), stages=stages)
    work = work_of(recipe, max(map(len, prompts)))
    plan = plan_memory(model, UPDATES["adamw8bit"], work, free)
    optimizer = Optimizer(model, UPDATES["adamw8bit"], plan.micro_batch_tokens)
    sft_step(model, optimizer, samples_of(model, prompts, 128), 1e-6)
    measured = peak_memory(device) - before
    yield Row("memory", f"{gb(plan.peak)} planned, {gb(measured)} measured", measured > 1.1 * plan.peak)


def speed(source: str, device: torch.device) -> Iterator[Row]:
    """Of decoding 32 rows. The limit: weights and cache are read once a token, as fast as in a large copy."""
    large = torch.zeros(2, 2**27, dtype=torch.uint8, device=device)
    rate = large.numel() / min(seconds(device, large[0].copy_, large[1]) for _ in range(5))
    model, prompts = loaded(source, device)
    lengths = (1, 1, NEW_TOKENS, NEW_TOKENS)  # the first of each kind sets things up
    _, prefill, _, whole = [seconds(device, samples_of, model, prompts, length) for length in lengths]
    step = (whole - prefill) / (NEW_TOKENS - 1)
    cached = sum(map(len, prompts)) + 8 * len(prompts) * NEW_TOKENS / 2
    moved = model.config.num_parameters() * model.dtype.itemsize + cached * token_bytes(model)
    share = f"{100 * moved / rate / step:.0f} % of the limit by {rate / 1e9:.0f} GB/s"
    yield Row("speed", f"{8 * len(prompts) / step:,.0f} tokens/s in {8 * len(prompts)} rows, {share}")


def seconds(device: torch.device, function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def loaded(source: str, device, dtype: torch.dtype | None = None) -> tuple[Qwen3, list[list[int]]]:
    """A model, and prompts of several lengths."""
    model, tokenizer = load_model(source, device, dtype)
    task = Countdown(max_number=20, max_target=50)
    sampling = SamplingSettings(thinking=tokenizer.knows_thinking)
    return model, [prompt_of(tokenizer, task, problem, sampling) for problem in task.generate(4, seed=0)]


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

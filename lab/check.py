"""Does this code work on this machine's device? `make check`, or `python -m lab.check --model Qwen/Qwen3-1.7B`.

Each row compares two ways to the same numbers. A run on a GPU does the first comparison before it starts.
"""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

import model as model_package
from data import Countdown
from lab.checkpoint import TrainState, load_into, save_checkpoint
from lab.device import check_driver, held_memory, peak_memory, pick_device
from lab.errors import user_errors
from lab.memory_plan import gb, plan_memory, work_of
from lab.recipe import Recipe
from lab.runfolder import write_whole
from model import ModelError, Qwen3, Tokenizer, add_adapters, generate, load_model, token_logprobs
from model.memory import free_memory, token_bytes
from model.sampler import random_streams, sample
from rl.batch import Sample, completion_logprobs, make_batch
from rl.grpo import GRPOStage
from rl.optimizer import Optimizer, OptimizerSettings
from rl.rollout import SamplingSettings, prompt_of
from rl.sft import sft_step

NEW_TOKENS = 96  # of a completion: two blocks of the cache, so two graphs, and more where rows finish
SAMPLES = 4  # of each prompt
# The largest share of ids that differ, and the largest mean difference of log-probabilities, that rounding explains.
ROUNDING = {torch.float32: (0.01, 1e-3), torch.bfloat16: (0.15, 0.05)}
CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "group-relative-rl" / "decoding.json"
)
UPDATES = {
    "adamw": OptimizerSettings("adamw"),
    "adamw8bit": OptimizerSettings("adamw8bit"),
    "stochastic rounding": OptimizerSettings("adamw", "stochastic"),
    "adapters on int8": OptimizerSettings("adamw"),
}


@dataclass(frozen=True)
class Row:
    what: str
    found: str
    wrong: bool = False


@dataclass(frozen=True)
class Arguments:
    """Compare what this machine's device calculates with what it should."""

    model: str = "tiny"  # For decoding, gradient, memory and speed: tiny, a folder or a hub id
    device: str = "auto"  # auto, cpu, cuda or cuda:N


@torch.inference_mode()
def decoding_gap(model: Qwen3, prompts: list[list[int]], top_k: int | None = None) -> tuple[float, float]:
    """`generate` against a plain forward over each of its completions.

    Returns the share of its ids that the forward's logits would not have given for the same random numbers,
    and the mean absolute difference of log-probabilities, in nats.
    """
    stops = list(range(0, model.num_tokens, 50))  # rows finish at all lengths
    streams = random_streams(prompts, SAMPLES, NEW_TOKENS, seed=0).to(model.device)
    options = {"num_samples": SAMPLES, "max_new_tokens": NEW_TOKENS, "top_k": top_k}
    groups = generate(model, prompts, **options, stop_token_ids=stops, seed=0)
    count = other = gap = 0
    for prompt, group, group_streams in zip(prompts, groups, streams, strict=True):
        for completion, stream in zip(group, group_streams, strict=True):
            ids = torch.tensor(prompt + completion.token_ids, device=model.device)
            logits = model.next_logits(model.model(ids[None])[0, len(prompt) - 1 : -1])
            chosen = ids[len(prompt) :]
            sampled, _ = sample(logits, stream[: len(chosen)], model.num_tokens, 1.0, top_k)
            logprobs = token_logprobs(logits, 1.0, model.num_tokens).gather(-1, chosen[:, None])[:, 0]
            count += len(chosen)
            other += int((sampled != chosen).sum())
            gap += float((logprobs - logprobs.new_tensor(completion.logprobs)).abs().sum())
    return other / count, gap / count


def decoding_row(what: str, model: Qwen3, prompts: list[list[int]]) -> Row:
    """The worse of sampling from all tokens and from the likeliest."""
    other, gap = map(max, zip(*(decoding_gap(model, prompts, top_k) for top_k in (None, 20)), strict=True))
    most_other, most_gap = ROUNDING[model.dtype]
    found = f"{100 * other:.1f} % other ids, log-probabilities {gap:.1g} nats apart"
    return Row(what, found, not (other <= most_other and gap <= most_gap))


def check_decoding(model: Qwen3, prompts: list[list[int]]) -> str | None:
    """On a GPU, see that decoding is right, and decode without CUDA graphs where they are not.

    The result is remembered for the device, the versions and this code. Returns a line to show, or None if
    all was well before. ModelError: decoding is wrong even without graphs.
    """
    if model.device.type != "cuda" or model.sharding:
        return None
    code = b"".join(path.read_bytes() for path in sorted(Path(model_package.__file__).parent.glob("*.py")))
    versions = (torch.cuda.get_device_name(model.device), torch.__version__, torch.version.cuda)
    key = " ".join(map(str, (*versions, model.dtype, model.graphed, hashlib.sha256(code).hexdigest()[:16])))
    known = {}
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(CACHE.read_text())
    if key in known:
        model.graphed &= known[key]
        return None if known[key] else "decoding  without CUDA graphs, which failed on this device before"
    said = "decoding  agrees with plain forwards on this device"
    try:
        row = decoding_row("decoding", model, prompts)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        row = Row("decoding", str(error).splitlines()[0], wrong=True)
    if row.wrong and model.graphed:
        model.graphed = False
        said = f"decoding  without CUDA graphs, which fail on this device: {row.found}"
        row = decoding_row("decoding", model, prompts)
    if row.wrong:
        raise ModelError(
            f"decoding on this device disagrees with plain forwards ({row.found}): run make check"
        )
    with contextlib.suppress(OSError):
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        write_whole(CACHE, json.dumps(known | {key: model.graphed}))
    return said


def completions_of(model: Qwen3, prompts: list[list[int]], count: int, length: int) -> list[Sample]:
    groups = generate(model, prompts, num_samples=count, max_new_tokens=length)
    pairs = zip(prompts, groups, strict=True)
    return [Sample(prompt, completion.token_ids) for prompt, group in pairs for completion in group]


def decoding(arguments: Arguments, device: torch.device) -> Iterator[Row]:
    for dtype in ROUNDING:
        model, tokenizer = load_model(arguments.model, device, dtype)
        prompts = prompts_for(tokenizer)
        for model.graphed in (False, True)[: 1 + (device.type == "cuda")]:
            how = "graphs" if model.graphed else "cached"
            yield decoding_row(f"decoding, {how}, {name(dtype)}", model, prompts)


def gradient(arguments: Arguments, device: torch.device) -> Iterator[Row]:
    """Of the mean log-probability: packed, against one sequence at a time."""
    for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 0.1)):
        model, tokenizer = load_model(arguments.model, device, dtype)
        samples = completions_of(model, prompts_for(tokenizer), SAMPLES, 48)
        batch = make_batch(samples, device)
        completion_logprobs(model, batch)[batch.mask].mean().backward()
        packed = {name: p.grad for name, p in model.named_parameters()}
        model.zero_grad()
        tokens = int(batch.mask.sum())
        for one in samples:
            ids = torch.tensor(one.prompt_ids + one.completion_ids, device=device)
            logits = model(ids[None])[0, len(one.prompt_ids) - 1 : -1]
            chosen = ids[len(one.prompt_ids) :, None]
            (token_logprobs(logits, 1.0, model.num_tokens).gather(-1, chosen).sum() / tokens).backward()
        plain = {name: p.grad for name, p in model.named_parameters()}
        squares = [((packed[key] - plain[key]).square().sum(), plain[key].square().sum()) for key in plain]
        gap = float((sum(gap for gap, _ in squares) / sum(whole for _, whole in squares)).sqrt())
        yield Row(f"packed gradient, {name(dtype)}", f"{100 * gap:.2g} % off plain", not gap <= limit)


def updates(arguments: Arguments, device: torch.device) -> Iterator[Row]:
    """Of the embedded model: how far the loss falls in ten updates, against float32 on the CPU."""
    expected: dict[int, float] = {}
    for kind, settings in UPDATES.items():
        rank = 8 * ("adapters" in kind)
        falls = []
        for place, dtype in (("cpu", torch.float32), (device, torch.bfloat16)):
            if place == "cpu" and rank in expected:
                continue
            model, tokenizer = load_model("tiny", place, dtype)
            samples = completions_of(load_model("tiny")[0], prompts_for(tokenizer), SAMPLES, 48)
            if rank:
                add_adapters(model, rank, 32.0, int8=place != "cpu")
            optimizer = Optimizer(model, settings if place != "cpu" else OptimizerSettings())
            losses = [
                sft_step(model, optimizer, samples, 1e-3 * (1 + 4 * bool(rank)))["loss"] for _ in range(10)
            ]
            falls.append(losses[0] - losses[-1])
            if place == "cpu":
                expected[rank] = falls.pop()
        ratio = falls[0] / expected[rank]
        yield Row(f"update, {kind}", f"the loss falls {ratio:.3f} times as far", not 0.9 <= ratio <= 1.1)


def resuming(arguments: Arguments, device: torch.device) -> Iterator[Row]:
    model, tokenizer = load_model("tiny", device, torch.bfloat16)
    samples = completions_of(model, prompts_for(tokenizer), SAMPLES, 48)
    optimizer = Optimizer(model, UPDATES["adamw8bit"])
    sft_step(model, optimizer, samples, 1e-3)
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "step_0001"
        save_checkpoint(saved, model, tokenizer, optimizer, TrainState(), Recipe())
        again, _ = load_model(saved, device)
        resumed = Optimizer(again, UPDATES["adamw8bit"])
        load_into(resumed, saved)
    pairs = ((model, optimizer), (again, resumed))
    first, second = ([sft_step(*pair, samples, 1e-3)["loss"] for _ in range(3)] for pair in pairs)
    gap = max(abs(a - b) for a, b in zip(first, second, strict=True))
    yield Row("save, load, resume", f"losses of the next steps {gap:.1g} apart", not gap <= 1e-3)


def memory(arguments: Arguments, device: torch.device) -> Iterator[Row]:
    """Planned against measured, of sampling and one update."""
    if device.type != "cuda":
        yield Row("memory", "compared on a GPU only: a process's peak cannot be measured anew")
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    free, process = free_memory(device), held_memory(device)
    model, tokenizer = load_model(arguments.model, device)
    prompts = prompts_for(tokenizer)
    settings = OptimizerSettings("adamw8bit")
    recipe = Recipe(sampling=SamplingSettings(128), stages=(GRPOStage(1, 4, 8, 1),))
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, problems=4))
    plan = plan_memory(model, settings, work_of(recipe, max(map(len, prompts))), free, process)
    samples = completions_of(model, prompts, 8, 128)
    sft_step(model, Optimizer(model, settings, plan.micro_batch_tokens), samples, 1e-6)
    measured = peak_memory(device)
    found = f"{gb(plan.peak)} planned, {gb(measured)} measured"
    yield Row("memory", found, measured > 1.1 * plan.peak)


def speed(arguments: Arguments, device: torch.device) -> Iterator[Row]:
    """Of decoding 32 rows; the limit is reading weights and cache once a token, as fast as a large copy."""
    source = torch.empty(2 ** (28 if device.type == "cuda" else 26), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    limit = 2 * len(source) / fastest(device, lambda: target.copy_(source))
    del source, target
    model, tokenizer = load_model(arguments.model, device)
    prompts = prompts_for(tokenizer)
    lengths = (1, NEW_TOKENS)  # the difference is decoding alone
    first, last = (fastest(device, lambda n=n: completions_of(model, prompts, 8, n)) for n in lengths)
    step = (last - first) / (NEW_TOKENS - 1)
    cached = sum(map(len, prompts)) + 8 * len(prompts) * NEW_TOKENS / 2
    moved = model.config.num_parameters() * model.dtype.itemsize + cached * token_bytes(model)
    share = f"{100 * moved / limit / step:.0f} % of the limit by {limit / 1e9:.0f} GB/s"
    yield Row("speed", f"{8 * len(prompts) / step:,.0f} tokens/s in {8 * len(prompts)} rows, {share}")


def fastest(device: torch.device, work: Callable[[], object]) -> float:
    """Seconds of the fastest of three runs."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def prompts_for(tokenizer: Tokenizer) -> list[list[int]]:
    """Four prompts of Countdown, of several lengths."""
    task = Countdown(max_number=20, max_target=50)
    return [prompt_of(tokenizer, task, problem, SamplingSettings()) for problem in task.generate(4, seed=0)]


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rows_of(arguments: Arguments) -> Iterator[Row]:
    """All rows; a part that fails gives one too."""
    device = pick_device(Recipe(device=arguments.device))
    for part in (decoding, gradient, updates, resuming, memory, speed):
        try:
            yield from part(arguments, device)
        except RuntimeError as error:
            yield Row(part.__name__, f"{type(error).__name__}: {str(error).splitlines()[0]}", wrong=True)


def main(arguments: Arguments) -> None:
    if arguments.device == "auto":
        check_driver()
    console = Console()
    device = pick_device(Recipe(device=arguments.device))
    on_gpu = device.type == "cuda"
    what = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    table = Table(
        "", "found", "", title=f"{arguments.model} on {what}, torch {torch.__version__}", title_justify="left"
    )
    wrong = []
    for row in rows_of(arguments):
        table.add_row(row.what, row.found, "wrong" if row.wrong else "")
        wrong += [row.what] * row.wrong
    console.print(table)
    if wrong:
        sys.exit(f"wrong: {'; '.join(wrong)}")


if __name__ == "__main__":
    with user_errors("take a smaller --model"):
        main(tyro.cli(Arguments, description=__doc__))

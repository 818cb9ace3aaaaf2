"""Correctness, speed and memory of this code on one GPU, in one command of under ten minutes.

    python benchmarks/gpu.py --out results            # on a GPU
    python benchmarks/gpu.py --out results --small    # the same code paths at a small size, on a CPU too

Writes `gpu.json` and `gpu.md` into the folder. Weights are random: speed and memory do not depend on them.
If a part fails, its error is recorded and the next part runs.
"""

import json
import shutil
import statistics
import sys
import time
import traceback
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import tyro
from memory import Case, measure, random_model

from lab.check import PARTS, rows_of
from lab.recipe import load_recipe
from lab.stages import train
from model import KVCache, Qwen3Config, generate, load_model
from model.sampler import DecodeBatch, GraphedStep, TokenChoice
from model.weights import TINY
from rl.optimizer import OptimizerSettings

QWEN3 = {
    "0.6B": Qwen3Config(151936, 1024, 3072, 28, 16, 8, 128),
    "1.7B": Qwen3Config(151936, 2048, 6144, 28, 16, 8, 128),
}
SMALL = {"small": Qwen3Config(2048, 128, 384, 2, 4, 2, 32)}


LEAN = OptimizerSettings("adamw8bit", rounding="stochastic", activation_checkpointing=True)
UPDATES = {
    "adamw": OptimizerSettings("adamw"),
    "adamw8bit": OptimizerSettings("adamw8bit"),
    "adamw8bit, checkpointing": replace(LEAN, rounding="masters"),
    "adamw8bit, stochastic": replace(LEAN, activation_checkpointing=False),
    "adamw8bit, stochastic, checkpointing": LEAN,
    "int8 weights, adapters": OptimizerSettings("adamw"),
}


@dataclass(frozen=True)
class Settings:
    """Measure correctness, speed and memory on this machine's device."""

    out: Path
    """Folder for gpu.json and gpu.md."""
    small: bool = False
    """Small shapes, for a machine without a GPU."""
    training_seconds: int = 120
    """Time for the real training run of the embedded model, at the end."""
    parts: tuple[str, ...] = ()
    """Functions of this file to run; none: all."""
    step: tuple[int, int, int] = (32, 8, 256)
    """Prompts, completions for each, and new tokens of the GRPO step of the 1.7B shape."""
    updates: tuple[str, ...] = tuple(UPDATES)
    """Ways to make the update of that step."""


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def random_prompts(config: Qwen3Config, count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, config.vocab_size, (count, length), generator=generator).tolist()


def device_check(settings: Settings) -> dict:
    """What `make check` compares, and the embedded model's logits against transformers in float32."""
    place = torch.device(device())
    result = {}
    for part in PARTS:
        for row in rows_of(part, "tiny", place):
            result[row.what] = f"{'WRONG: ' * row.wrong}{row.found}"
    model, tokenizer = load_model("tiny", place)
    try:
        from transformers import Qwen3ForCausalLM

        options = {"dtype": torch.float32, "attn_implementation": "eager"}
        theirs = Qwen3ForCausalLM.from_pretrained(TINY, **options).to(place)
        ids = torch.tensor([tokenizer.encode("<think>\n3+14=") * 9], device=place)
        with torch.no_grad():
            result["logits against transformers"] = float((theirs(ids).logits - model(ids)).abs().max())
    except ImportError:
        result["logits against transformers"] = "transformers is not installed"
    return result


def bandwidth() -> float:
    """Bytes a second that a large copy reads and writes on the device."""
    source = torch.empty(
        256 * 2**20 if torch.cuda.is_available() else 2**26, dtype=torch.uint8, device=device()
    )
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        for _ in range(10):
            target.copy_(source)
        synchronize()
        best = min(best, (time.perf_counter() - start) / 10)
    return 2 * source.numel() / best


def decoding(settings: Settings) -> dict:
    """Tokens a second of `generate`, and what share of the time reading weights and cache once a step would
    take.

    A group's prompt counts once: it is stored once, and read once for all its rows.
    """
    limit = bandwidth()
    result = {"copy_bytes_per_second": limit}
    prompt_length, new_tokens = (16, 16) if settings.small else (140, 128)
    for name, config in (SMALL if settings.small else QWEN3).items():
        model = random_model(config, torch.bfloat16, device())
        weight_bytes = 2 * config.num_parameters()
        token_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        for rows in (1, 4) if settings.small else (1, 32, 256):
            prompts = random_prompts(config, max(1, rows // 8), prompt_length)
            options = {"num_samples": min(rows, 8), "seed": 0}
            generate(model, prompts, max_new_tokens=4, **options)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            seconds = {}
            for length in (1, new_tokens):  # the difference is decoding alone, without the prefill
                synchronize()
                start = time.perf_counter()
                generate(model, prompts, max_new_tokens=length, **options)
                synchronize()
                seconds[length] = time.perf_counter() - start
            step = (seconds[new_tokens] - seconds[1]) / (new_tokens - 1)
            cache_bytes = token_bytes * (len(prompts) * prompt_length + rows * new_tokens / 2)
            result[f"{name} x {rows}"] = {
                "tokens_per_second": rows * new_tokens / seconds[new_tokens],
                "milliseconds_a_step": 1000 * step,
                "share_of_bandwidth_limit": (weight_bytes + cache_bytes) / limit / step,
                "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            }
        del model
    return result


def launching(settings: Settings) -> dict:
    """Milliseconds a decoding step launched kernel by kernel, as a CUDA graph, and with the layers compiled
    as well."""
    name, config = next(iter((SMALL if settings.small else QWEN3).items()))
    model = random_model(config, torch.bfloat16, device())
    prompts, new_tokens = random_prompts(config, 4, 140), 40 if settings.small else 200
    stops = torch.tensor([], dtype=torch.int64, device=device())
    result = {"shape": name, "rows": 32}

    def milliseconds(graph: bool) -> float:
        """Median over the steps of a batch of 4 prompts x 8 samples; steps that make a graph are outliers."""
        with torch.inference_mode():
            uniforms = torch.rand(4, 8, new_tokens)
            batch = DecodeBatch(model, prompts, uniforms, stops, TokenChoice(), static=True)
            batch.start()
            step = GraphedStep(batch.step) if graph else lambda shape: batch.step()
            times = []
            for count in range(1, new_tokens):
                batch.cache.reserve(count)
                start = time.perf_counter()
                step((len(batch.active), batch.cache.visible))
                synchronize()
                times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times)

    result["kernel_by_kernel"] = milliseconds(graph=False)
    if torch.cuda.is_available():
        result["graph"] = milliseconds(graph=True)
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        milliseconds(graph=False)  # compiles
        result["graph_of_compiled_layers"] = milliseconds(graph=True)
    return result


def grpo_steps(settings: Settings) -> dict:
    """Seconds and peak memory of one whole GRPO step at the paper's setting, and what the memory plan
    said."""
    name, config = next(iter(SMALL.items())) if settings.small else ("1.7B", QWEN3["1.7B"])
    groups, samples, new_tokens = (2, 4, 16) if settings.small else settings.step
    result = {"shape": name, "groups": groups, "samples": samples, "new_tokens": new_tokens}
    for kind in settings.updates:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        rank = 16 if "adapters" in kind else 0
        try:
            result[kind] = measure(
                Case(config, torch.bfloat16, UPDATES[kind], groups, samples, 140, new_tokens, rank)
            )
        except Exception as error:
            result[kind] = f"{type(error).__name__}: {error}"
        print(f"  {kind}: {pretty(result[kind])}", flush=True)
    return result


def cache_growth(settings: Settings) -> dict:
    """Bytes of a KV cache for the paper's rollout batch, as the sampler allocates it."""
    config = next(iter(SMALL.values())) if settings.small else QWEN3["1.7B"]
    cache = KVCache(config, 8, 64, device(), torch.bfloat16)
    per_token = sum(t.numel() * t.element_size() for t in (*cache.keys, *cache.values)) / (8 * 64)
    return {"bytes_per_token": per_token, "bytes_at_256_rows_of_396": per_token * 256 * 396}


def resume_and_training(settings: Settings) -> dict:
    """A real run of the embedded model on the device: stopped, resumed, and compared; then as long as time
    allows."""
    _, smoke = load_recipe("smoke")
    out = settings.out / "runs"
    shutil.rmtree(out, ignore_errors=True)  # of an earlier start
    losses = {}
    for name in ("whole", "resumed"):
        recipe = replace(smoke, model="tiny-256", out=str(out / name), keep_checkpoints=9)
        train(recipe, quiet=True)
        if name == "resumed":
            for folder in sorted((out / name / "checkpoints").iterdir())[1:]:
                shutil.rmtree(folder)
            train(recipe, resume=True, quiet=True)
        rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row.get("loss") for row in rows]
    result = {"resume_repeats_the_losses": losses["whole"] == losses["resumed"]}
    _, recipe = load_recipe("256", "tiny")
    steps = 2 if settings.small else max(5, settings.training_seconds // 2)
    stages = (replace(recipe.stages[0], steps=steps),)
    start = time.perf_counter()
    train(replace(recipe, model="tiny", out=str(out / "training"), stages=stages))
    rows = [json.loads(line) for line in (out / "training" / "metrics.jsonl").read_text().splitlines()]
    result["training_seconds"] = time.perf_counter() - start
    result["training_curve"] = [(row["step"], row["eval_accuracy"]) for row in rows if "eval_accuracy" in row]
    return result


def markdown(report: dict) -> str:
    lines = [
        f"# {report['device']}, {report['date']}",
        "",
        f"torch {report['torch']}, `{report['command']}`",
        "",
    ]
    for part, values in report["parts"].items():
        lines += [f"## {part.replace('_', ' ')}", "", "| | |", "|---|---|"]
        items = values.items() if isinstance(values, dict) else [("error", values)]
        lines += [f"| {name} | {pretty(value)} |" for name, value in items] + [""]
    return "\n".join(lines)


def pretty(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {pretty(item)}" for name, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(settings: Settings) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    name = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    report = {
        "device": name,
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "settings": {key: str(value) for key, value in asdict(settings).items()},
        "parts": {},
    }
    for part in (device_check, decoding, launching, grpo_steps, cache_growth, resume_and_training):
        if settings.parts and part.__name__ not in settings.parts:
            continue
        start = time.perf_counter()
        try:
            values = part(settings)
            values["seconds_for_this_part"] = time.perf_counter() - start
        except Exception as error:
            traceback.print_exc()
            values = f"{type(error).__name__}: {error}"
        report["parts"][part.__name__] = values
        (settings.out / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")
        (settings.out / "gpu.md").write_text(markdown(report))
        print(f"{part.__name__}: {pretty(values)}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))

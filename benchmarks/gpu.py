"""Correctness, speed and memory of this code on one GPU, in one command of under ten minutes.

    python benchmarks/gpu.py --out results            # on a GPU
    python benchmarks/gpu.py --out results --small    # the same code paths at a small size, on a CPU too

It writes `gpu.json` and `gpu.md` into the folder. Weights are random, because speed and memory do not depend
on them. If a part fails, its error is recorded and the next part runs.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import pairwise
from pathlib import Path

import torch
import tyro
from common import QWEN3_06B, QWEN3_17B, ROOT, Workload, copy_rate, random_model, random_prompts, seconds_of
from memory import Case, measure

from lab.check import PARTS, rows_of
from model import Qwen3, Qwen3Config, generate, load_model
from model.memory import token_bytes
from model.weights import TINY
from rl.optimizer import OptimizerSettings

SMALL = Qwen3Config(2048, 128, 384, 2, 4, 2, 32)
LEAN = OptimizerSettings("adamw8bit", rounding="stochastic", activation_checkpointing=True)


@dataclass(frozen=True)
class Update:
    """One way to make an update."""

    optimizer: OptimizerSettings
    adapter_rank: int = 0


UPDATES = {
    "adamw": Update(OptimizerSettings("adamw")),
    "adamw8bit": Update(OptimizerSettings("adamw8bit")),
    "adamw8bit, checkpointing": Update(replace(LEAN, rounding="masters")),
    "adamw8bit, stochastic": Update(replace(LEAN, activation_checkpointing=False)),
    "adamw8bit, stochastic, checkpointing": Update(LEAN),
    "int8 weights, adapters": Update(OptimizerSettings("adamw"), adapter_rank=16),
}


@dataclass(frozen=True)
class Settings:
    """Measure correctness, speed and memory on this machine's device."""

    out: Path
    """Folder for gpu.json and gpu.md."""
    small: bool = False
    """Small shapes, for a machine without a GPU."""
    training_steps: int = 60
    """Steps of the real training run of the bundled model, at the end."""
    parts: tuple[str, ...] = ()
    """Functions of this file to run; none: all."""
    step: tuple[int, int, int] = (32, 8, 256)
    """Prompts, completions of each, and new tokens of the GRPO step of the 1.7B shape."""
    updates: tuple[str, ...] = tuple(UPDATES)
    """Ways to make the update of that step."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_check(settings: Settings) -> dict:
    """The comparisons of `make check`, and the bundled model's logits against transformers in float32."""
    result = {}
    for part in PARTS:
        for row in rows_of(part, "tiny", device()):
            result[row.what] = f"WRONG: {row.found}" if row.wrong else row.found
    try:
        result["logits against transformers"] = gap_to_transformers()
    except ImportError:
        result["logits against transformers"] = "transformers is not installed"
    return result


def gap_to_transformers() -> float:
    """The largest difference between a logit of the bundled model and the same of transformers."""
    from transformers import Qwen3ForCausalLM

    model, tokenizer = load_model("tiny", device())
    theirs = Qwen3ForCausalLM.from_pretrained(TINY, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([tokenizer.encode("<think>\n3+14=") * 9], device=device())
    with torch.no_grad():
        difference = theirs.to(device())(ids).logits - model(ids)
    return float(difference.abs().max())


def decoding(settings: Settings) -> dict:
    """Speed of decoding, and its share of the limit: reading weights and cache once per decoding step.

    A group's prompt counts once, because it is stored once, and read once for all its rows.
    """
    limit = copy_rate(2**26 if settings.small else 2**30, device())
    result: dict = {"copy, bytes per second": limit}
    prompt_length, new_tokens = (16, 32) if settings.small else (140, 128)
    for name, config in shapes(settings).items():
        model = random_model(config, torch.bfloat16, device())
        for rows in (1, 4) if settings.small else (1, 32, 256):
            samples = min(rows, 8)
            prompts = random_prompts(config.vocab_size, rows // samples, prompt_length)
            generate(model, prompts, num_samples=samples, max_new_tokens=4)  # warms up
            reset_peak()
            step = step_seconds(model, prompts, samples, new_tokens)
            cached = len(prompts) * prompt_length + rows * new_tokens / 2
            read = model.dtype.itemsize * model.num_parameters() + token_bytes(model) * cached
            result[f"{name} x {rows} rows"] = {
                "tokens per second": rows / step,
                "milliseconds per step": 1000 * step,
                "share of the limit": read / limit / step,
                "peak memory, bytes": torch.cuda.max_memory_allocated() if device().type == "cuda" else None,
            }
        del model
    return result


def step_seconds(model: Qwen3, prompts: list[list[int]], samples: int, new_tokens: int) -> float:
    """Median time of a decoding step, from the reports that `generate` makes every few steps.

    It is that of most steps: a step in which a CUDA graph is recorded takes longer.
    """
    rows = len(prompts) * samples
    reports: list[tuple[float, float]] = []  # time, steps made

    def report(completed: int, tokens: int) -> None:
        reports.append((time.perf_counter(), tokens / rows))

    generate(model, prompts, num_samples=samples, max_new_tokens=new_tokens, on_progress=report)
    times = []
    for (start, steps_before), (end, steps_after) in pairwise(reports):
        times.append((end - start) / (steps_after - steps_before))
    return statistics.median(times)


def launching(settings: Settings) -> dict:
    """Milliseconds of a decoding step, its kernels launched one by one, and as a CUDA graph."""
    name, config = next(iter(shapes(settings).items()))
    model = random_model(config, torch.bfloat16, device())
    prompts = random_prompts(config.vocab_size, count=4, length=140)

    def milliseconds(graphed: bool) -> float:
        model.graphed = graphed
        return 1000 * step_seconds(model, prompts, samples=8, new_tokens=40 if settings.small else 200)

    result = {"shape": name, "rows": 32, "kernel by kernel": milliseconds(graphed=False)}
    if device().type == "cuda":
        result["graph"] = milliseconds(graphed=True)
        for layer in model.model.layers:
            layer.compile(dynamic=False)
        milliseconds(graphed=False)  # compiles
        result["graph of compiled layers"] = milliseconds(graphed=True)
    return result


def whole_step(settings: Settings) -> dict:
    """Seconds and peak memory of one whole GRPO step at the paper's setting, beside the memory plan."""
    prompts, samples, new_tokens = (2, 4, 16) if settings.small else settings.step
    work = Workload(prompts, samples, prompt_length=140, new_tokens=new_tokens)
    name, config = list(shapes(settings).items())[-1]
    result: dict = {"shape": name, "work": str(work)}
    for kind in settings.updates:
        reset_peak()
        update = UPDATES[kind]
        case = Case(config, torch.bfloat16, update.optimizer, work, update.adapter_rank)
        try:
            result[kind] = measure(case)
            result[f"plan, {kind}"] = result[kind].pop("plan")
        except Exception as error:  # out of memory, say: the other ways may fit
            result[kind] = one_line(error)
        print(f"{kind}: {result[kind]}", flush=True)
    return result


def resuming(settings: Settings) -> dict:
    """Whether a run that is stopped and resumed has the losses of one that is not."""
    losses = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("whole", "resumed"):
            run = Path(folder) / name
            command = [
                "smoke",
                "--model",
                "tiny-256",
                "--keep-checkpoints",
                "9",
                "--quiet",
                "--out",
                str(run),
            ]
            train(command)
            if name == "resumed":
                for checkpoint in sorted((run / "checkpoints").iterdir())[1:]:
                    shutil.rmtree(checkpoint)
                train([*command, "--resume"])
            losses.append([row.get("loss") for row in metrics_of(run)])
    return {"losses are equal": "yes" if losses[0] == losses[1] else "no", "losses": str(losses[0])}


def training(settings: Settings) -> dict:
    """The first stage of the bundled model's recipe: its time, and its held-out accuracy by step."""
    with tempfile.TemporaryDirectory() as folder:
        steps = 2 if settings.small else settings.training_steps
        recipe = Path(folder) / "first-stage.toml"
        stage = f'[[stages]]\nkind = "grpo"\nsteps = {steps}\n'
        recipe.write_text(f'extends = "{ROOT}/recipes/256-tiny.toml"\n{stage}')
        run = Path(folder) / "run"
        seconds = seconds_of(lambda: train([str(recipe), "--out", str(run)]))
        evaluated = [row for row in metrics_of(run) if "eval_accuracy" in row]
    return {"seconds": seconds} | {f"step {row['step']}": row["eval_accuracy"] for row in evaluated}


def train(arguments: list[str]) -> None:
    subprocess.run([sys.executable, str(ROOT / "train.py"), *arguments], check=True)


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def shapes(settings: Settings) -> dict[str, Qwen3Config]:
    return {"small": SMALL} if settings.small else {"0.6B": QWEN3_06B, "1.7B": QWEN3_17B}


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def markdown(report: dict) -> str:
    """The report as a page: for each part its facts, and a table of what was measured several times."""
    lines = [f"# {report['device']}, {report['date']}", ""]
    lines += [f"torch {report['torch']}, `{report['command']}`", ""]
    for part, values in report["parts"].items():
        lines += [f"## {part.replace('_', ' ')}", ""]
        measured = {name: value for name, value in values.items() if isinstance(value, dict)}
        for name, value in values.items():
            if name not in measured:
                lines.append(f"- {name}: {pretty(value)}")
        lines.append("")
        if measured:
            columns = list(next(iter(measured.values())))
            lines += [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        for name, row in measured.items():
            cells = [pretty(row[column]) for column in columns]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def pretty(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(settings: Settings) -> None:
    settings.out.mkdir(parents=True, exist_ok=True)
    on_gpu = torch.cuda.is_available()
    report = {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
        "settings": {name: str(value) for name, value in asdict(settings).items()},
        "parts": {},
    }
    for part in (device_check, decoding, launching, whole_step, resuming, training):
        if settings.parts and part.__name__ not in settings.parts:
            continue
        start = time.perf_counter()
        try:
            values = part(settings)
        except Exception as error:
            traceback.print_exc()
            values = {"error": one_line(error)}
        values["seconds for this part"] = time.perf_counter() - start
        report["parts"][part.__name__] = values
        (settings.out / "gpu.json").write_text(json.dumps(report, indent=2) + "\n")
        (settings.out / "gpu.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main(tyro.cli(Settings))

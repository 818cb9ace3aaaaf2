"""Shared parts of the benchmarks: shapes, random models and prompts, GRPO steps of them, and tables.

Importing this file makes the project importable, so that each benchmark runs as `python benchmarks/NAME.py`.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch
from rich.console import Console
from rich.table import Table

from data.task import Score
from experiments.bases.weights import init_weights
from lab.memory_plan import MemoryPlan, plan_memory, work_of
from lab.recipe import EvaluationSettings, Recipe
from model import Qwen3, Qwen3Config
from model.chat import PLAIN, ChatTemplate
from model.memory import read
from rl.grpo import GRPOStage, grpo_step
from rl.optimizer import Optimizer, OptimizerSettings
from rl.rollout import SamplingSettings
from rl.trainer import Trainer

# Sizes of the vocabulary, the hidden state and the MLP; layers, query heads, key-value heads; size of a head.
TINY = Qwen3Config(384, 128, 384, 4, 4, 2, 32)
MIDDLE = Qwen3Config(384, 512, 1536, 8, 8, 4, 64)
DEEP = Qwen3Config(8192, 768, 2048, 16, 12, 4, 64)
LARGE_VOCABULARY = Qwen3Config(151936, 256, 768, 4, 4, 2, 64)
QWEN3_06B = Qwen3Config(151936, 1024, 3072, 28, 16, 8, 128)
QWEN3_17B = Qwen3Config(151936, 2048, 6144, 28, 16, 8, 128)


@dataclass(frozen=True)
class Workload:
    """Prompts of random ids, and completions that all have the same length."""

    prompts: int
    samples: int  # completions of each prompt
    prompt_length: int
    new_tokens: int


def random_model(config: Qwen3Config, dtype: torch.dtype, device: torch.device | str) -> Qwen3:
    """A model with random weights, made on the device without passing through float32."""
    with torch.device("meta"):
        model = Qwen3(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return init_weights(model, seed=0)


def random_prompts(vocab_size: int, count: int, length: int) -> list[list[int]]:
    """Random ids. None of them is 0, which ends a completion in some benchmarks."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, vocab_size, (count, length), generator=generator).tolist()


class RandomTask:
    """Tokenizer and task in one. Problem n is the n-th random prompt; every second completion is correct."""

    stop_token_ids = ()
    knows_thinking = True
    template = ChatTemplate(PLAIN, {})

    def __init__(self, prompts: list[list[int]]):
        self.prompts = prompts
        self.scored = 0

    def prompt(self, problem: int, thinking: bool = True) -> str:
        return f"[{problem}]"

    def encode_prompt(self, text: str) -> list[int]:
        number = text.partition("[")[2].partition("]")[0]
        return self.prompts[int(number)]

    def decode(self, token_ids: list[int]) -> str:
        return ""

    def score(self, text: str, problem: int, thinking: bool) -> Score:
        self.scored += 1
        return Score((self.scored - 1) % 2, "")


def grpo_steps(
    model: Qwen3, optimizer_settings: OptimizerSettings, work: Workload, steps: int, updates: int, free: int
) -> tuple[list[dict], MemoryPlan]:
    """The metrics of each of `steps` GRPO steps of `updates` updates, and the memory plan made before them.

    `free` is the memory in bytes that was free before the model was made.
    """
    stage = GRPOStage(
        prompts_per_step=work.prompts, samples_per_prompt=work.samples, updates_per_step=updates
    )
    recipe = Recipe(
        sampling=SamplingSettings(max_new_tokens=work.new_tokens),
        evaluation=EvaluationSettings(problems=1),
        optimizer=optimizer_settings,
        stages=(stage,),
    )
    plan = plan_memory(model, optimizer_settings, work_of(recipe, work.prompt_length), free)
    model.model.checkpoint_activations = optimizer_settings.activation_checkpointing
    trainer = Trainer(model, Optimizer(model, optimizer_settings), plan.micro_batch_tokens)
    task = RandomTask(random_prompts(model.config.vocab_size, work.prompts, work.prompt_length))
    metrics = []
    for step in range(steps):
        groups, _, found = grpo_step(
            trainer,
            tokenizer=task,
            task=task,
            problems=list(range(work.prompts)),
            settings=stage,
            sampling=recipe.sampling,
            learning_rate=1e-6,
            seed=step,
        )
        lengths = {len(rollout.completion.token_ids) for group in groups for rollout in group}
        assert lengths == {work.new_tokens}, "a completion is shorter than the others"
        assert found["grad_norm"] > 0, "there was no update"
        metrics.append(found | {"micro_batch_tokens": trainer.micro_batch_tokens})
    return metrics, plan


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds on `device`; on a GPU only tensors count."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = read("/proc/self/statm").split()[1:2]
    return resource.getpagesize() * int(pages[0]) if pages else 0


def seconds_of(function: Callable[[], object]) -> float:
    """The time of one call, until the device has finished too."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_rate(size: int, device: torch.device | str) -> float:
    """Bytes per second, read and written, of copying `size` bytes on the device, at best."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source))


def best_seconds(function: Callable[[], object], budget: float = 0.3) -> float:
    """The shortest time of a call, after one that warms up, in `budget` seconds."""
    function()
    end = time.perf_counter() + budget
    best = seconds_of(function)
    while time.perf_counter() < end:
        best = min(best, seconds_of(function))
    return best


def in_turns(runs: dict[str, Callable], repeats: int) -> dict[str, list]:
    """The results of `repeats` calls of each run, which take turns; a first turn only warms up."""
    results: dict[str, list] = {name: [] for name in runs}
    for turn in range(1 + repeats):
        for name, run in runs.items():
            result = run()
            if turn > 0:
                results[name].append(result)
    return results


def run_apart(command: list[str]) -> dict:
    """Run a command in a process of its own, and return the JSON that it prints last.

    Raises RuntimeError with the last line of its errors if it fails.
    """
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        errors = run.stderr.strip().splitlines() or ["killed: out of memory?"]
        raise RuntimeError(errors[-1])
    return json.loads(run.stdout.splitlines()[-1])


def median_of(rows: list[dict], name: str) -> float:
    return statistics.median(row[name] for row in rows)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title)
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console(width=200).print(table)

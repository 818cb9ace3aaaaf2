"""The memory plan against the measured peak: whole GRPO steps of several shapes, each in its own process.

    python benchmarks/memory.py          # on a CPU: the process's peak resident memory; about five minutes

Weights and prompts are random, completions all have the maximum length. Each case takes two steps, since the
optimizer's moments are made in the first and stay.
"""

import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import tyro
from rich.console import Console
from rich.table import Table

from data.task import Score
from experiments.bases.weights import init_weights
from lab.device import peak_memory, return_freed_blocks
from lab.memory_plan import gb, plan_memory, work_of
from lab.recipe import EvaluationSettings, Recipe
from model import Qwen3, Qwen3Config, add_adapters
from model.chat import PLAIN, ChatTemplate
from model.memory import free_memory, read
from rl.grpo import GRPOStage, grpo_step
from rl.optimizer import Optimizer, OptimizerSettings
from rl.rollout import SamplingSettings
from rl.trainer import Trainer


@dataclass(frozen=True)
class Case:
    config: Qwen3Config
    dtype: torch.dtype
    optimizer: OptimizerSettings
    prompts: int
    samples: int
    prompt_length: int
    new_tokens: int
    adapter_rank: int = 0


LARGE_VOCABULARY = Qwen3Config(151936, 256, 768, 4, 4, 2, 64)
DEEP = Qwen3Config(8192, 768, 2048, 16, 12, 4, 64)
QWEN3_06B = Qwen3Config(151936, 1024, 3072, 28, 16, 8, 128)
LEAN = OptimizerSettings("adamw8bit", "stochastic", micro_batch_tokens=1024, activation_checkpointing=True)
CASES = {
    "large vocabulary, float32": Case(
        LARGE_VOCABULARY, torch.float32, OptimizerSettings(micro_batch_tokens=1024), 4, 8, 140, 64
    ),
    "deep, float32": Case(DEEP, torch.float32, OptimizerSettings(micro_batch_tokens=2048), 4, 8, 140, 128),
    "deep, checkpointing": Case(
        DEEP,
        torch.float32,
        OptimizerSettings(micro_batch_tokens=2048, activation_checkpointing=True),
        4,
        8,
        140,
        128,
    ),
    "Qwen3-0.6B, bfloat16, masters": Case(
        QWEN3_06B, torch.bfloat16, OptimizerSettings(micro_batch_tokens=1024), 2, 8, 140, 32
    ),
    "Qwen3-0.6B, 8-bit, stochastic, checkpointing": Case(QWEN3_06B, torch.bfloat16, LEAN, 4, 8, 140, 32),
    "Qwen3-0.6B, int8 and adapters": Case(
        QWEN3_06B, torch.bfloat16, OptimizerSettings(micro_batch_tokens=1024), 2, 8, 140, 32, adapter_rank=16
    ),
}


@dataclass(frozen=True)
class Settings:
    """Compare the memory plan with the measured peak."""

    case: tuple[str, ...] = tuple(CASES)
    """Which cases to run."""
    here: bool = False
    """Run the one case in this process and print JSON; what the cases' processes are started with."""


def held_memory(device: torch.device) -> int:
    """Bytes that this process holds on `device`; on a GPU only tensors count."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = read("/proc/self/statm").split()[1:2]
    return resource.getpagesize() * int(pages[0]) if pages else 0


def random_model(config: Qwen3Config, dtype: torch.dtype, device: str) -> Qwen3:
    """Random weights, made on the device without passing through float32."""
    with torch.device("meta"):
        model = Qwen3(config)
    model = model.to(dtype).to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return init_weights(model, 0)


class RandomTask:
    """Tokenizer and task in one: problem n is a prompt of random ids; every second completion is rewarded."""

    stop_token_ids = ()
    knows_thinking = True
    template = ChatTemplate(PLAIN, {})

    def __init__(self, vocab_size: int, prompts: int, prompt_length: int):
        generator = torch.Generator().manual_seed(0)
        self.prompts = torch.randint(0, vocab_size, (prompts, prompt_length), generator=generator).tolist()
        self.scored = 0

    def prompt(self, problem: int, thinking: bool = True) -> str:
        return f"[{problem}]"

    def encode_prompt(self, text: str) -> list[int]:
        return self.prompts[int(text.partition("[")[2].partition("]")[0])]

    def decode(self, token_ids: list[int]) -> str:
        return ""

    def score(self, text: str, problem: int, thinking: bool) -> Score:
        self.scored += 1
        return Score((self.scored - 1) % 2, "")


def measure(case: Case, steps: int = 2) -> dict:
    """Seconds of the last of `steps` GRPO steps, the peak memory of all, and the plan made before the
    first."""
    return_freed_blocks()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free, process = free_memory(device), held_memory(device)
    model = random_model(case.config, case.dtype, device)
    if case.adapter_rank:
        add_adapters(model, case.adapter_rank, 2.0 * case.adapter_rank, int8=True)
    model.model.checkpoint_activations = case.optimizer.activation_checkpointing
    stage = GRPOStage(prompts_per_step=case.prompts, samples_per_prompt=case.samples)
    sampling = SamplingSettings(max_new_tokens=case.new_tokens)
    evaluation = EvaluationSettings(problems=1)
    recipe = Recipe(sampling=sampling, evaluation=evaluation, optimizer=case.optimizer, stages=(stage,))
    plan = plan_memory(model, case.optimizer, work_of(recipe, case.prompt_length), free)
    trainer = Trainer(model, Optimizer(model, case.optimizer), plan.micro_batch_tokens)
    task = RandomTask(case.config.vocab_size, case.prompts, case.prompt_length)
    options = {"settings": stage, "sampling": sampling, "learning_rate": 1e-6}
    for step in range(steps):
        *_, metrics = grpo_step(trainer, task, task, list(range(case.prompts)), seed=step, **options)
    names = ("rollout_seconds", "update_seconds", "grad_norm", "clip_fraction", "log_ratio_std")
    return {name: metrics[name] for name in names} | {
        "micro_batch_tokens": trainer.micro_batch_tokens,
        "peak_memory_bytes": peak_memory(device),
        "planned_bytes": process + plan.peak,
        "plan": str(plan),
    }


def main(settings: Settings) -> None:
    if settings.here:
        print(json.dumps(measure(CASES[settings.case[0]])))
        return
    table = Table(title="memory: planned against measured peak")
    for column in ("case", "planned", "measured", "planned / measured", "rollout, s", "update, s", "plan"):
        table.add_column(column)
    for name in settings.case:
        command = [sys.executable, __file__, "--here", "--case", name]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            table.add_row(
                name, "", "", "", "", "", (run.stderr.strip().splitlines() or ["killed: out of memory?"])[-1]
            )
            continue
        found = json.loads(run.stdout.splitlines()[-1])
        planned, measured = found["planned_bytes"], found["peak_memory_bytes"]
        seconds = (f"{found[f'{part}_seconds']:.1f}" for part in ("rollout", "update"))
        table.add_row(name, gb(planned), gb(measured), f"{planned / measured:.2f}", *seconds, found["plan"])
        print(f"{name}: planned {gb(planned)}, measured {gb(measured)}", flush=True)
    Console(width=200).print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings))

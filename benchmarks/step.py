"""One whole GRPO step, rollout and update, of this project and of TRL's GRPOTrainer, on the same work.

    pip install trl==1.16.0                        # needed here only
    python benchmarks/step.py                      # about ten minutes on two cores
    python benchmarks/step.py --model FOLDER       # the weights of a folder or hub id, not random ones

Weights, prompts and sizes are the same; prompts are random ids. Each side runs in its own process, so that
their memory does not mix, and they take turns. All completions have full length: ours has no stop ids, and
TRL's may not end before. Rewards are the same function of a completion's number in its group. Both make one
AdamW update per step, in float32, with the gradient's norm clipped to one and no reference model. The first
step of each process is not timed.

TRL runs in several ways: everything in one batch, as ours does here; in batches of 8; and, for the least
memory, in batches of 2 with gradient checkpointing. The batches accumulate to one update.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from common import (
    LARGE_VOCABULARY,
    Workload,
    grpo_steps,
    held_memory,
    median_of,
    print_table,
    random_model,
    random_prompts,
    run_apart,
)

from lab.device import peak_memory, return_freed_blocks
from model import Qwen3, load_model
from model.memory import free_memory
from rl.optimizer import OptimizerSettings

CPU = torch.device("cpu")
WORK = Workload(prompts=4, samples=8, prompt_length=140, new_tokens=64)


@dataclass(frozen=True)
class Side:
    program: Literal["ours", "trl"]
    checkpointing: bool = False
    batch_size: int = WORK.prompts * WORK.samples  # of TRL; batches of this size make one update


SIDES = {
    "ours": Side("ours"),
    "ours, checkpointing": Side("ours", checkpointing=True),
    "TRL, one batch": Side("trl"),
    "TRL, 4 batches of 8": Side("trl", batch_size=8),
    "TRL, 16 batches of 2, checkpointing": Side("trl", checkpointing=True, batch_size=2),
}


@dataclass(frozen=True)
class Settings:
    """Compare a GRPO step with TRL's."""

    side: tuple[str, ...] = tuple(SIDES)
    """Which sides to run."""
    repeats: int = 1
    """Processes of each side, in turns."""
    steps: int = 2
    """Timed steps in each process."""
    model: str | None = None
    """A folder or hub id; default: random weights of 42 M parameters."""
    trl_python: str = sys.executable
    """Python of an environment that has TRL."""
    here: bool = False
    """Run the one side in this process and print JSON; what the sides' processes are started with."""


def load_weights(source: str | None) -> Qwen3:
    """The model of both sides, in float32."""
    if source is None:
        return random_model(LARGE_VOCABULARY, torch.float32, CPU)
    return load_model(source, dtype=torch.float32)[0]


def run_ours(side: Side, settings: Settings) -> tuple[list[dict], int]:
    """Seconds of each timed step, and the bytes that the process held after its imports."""
    return_freed_blocks()
    before = held_memory(CPU)
    free = free_memory(CPU)
    model = load_weights(settings.model)
    kept = OptimizerSettings(activation_checkpointing=side.checkpointing)
    metrics, _ = grpo_steps(model, kept, WORK, steps=1 + settings.steps, updates=1, free=free)
    steps = [{"rollout": row["rollout_seconds"], "update": row["update_seconds"]} for row in metrics[1:]]
    return steps, before


def run_trl(side: Side, settings: Settings) -> tuple[list[dict], int]:
    """The same of TRL."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    # 1. The same model and prompts; a prompt is the text "t17 t4 ..." of its ids.
    before = held_memory(CPU)
    ours = load_weights(settings.model)
    prompts = random_prompts(ours.config.vocab_size, WORK.prompts, WORK.prompt_length)
    texts = [" ".join(f"t{token_id}" for token_id in prompt) for prompt in prompts]
    tokenizer = their_tokenizer(ours.config.vocab_size)
    model = their_model(ours)
    del ours
    weights_before = model.lm_head.weight.detach().clone()

    # 2. A trainer that measures its steps and rollouts.
    steps: list[float] = []
    rollouts: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            steps.append(time.perf_counter() - self.start)

    class Trainer(trl.GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            start = time.perf_counter()
            found = super()._generate_and_score_completions(inputs)
            rollouts.append(time.perf_counter() - start)
            assert found["prompt_ids"].shape[1] == WORK.prompt_length
            assert found["completion_ids"].shape[1] == WORK.new_tokens
            assert found["prompt_ids"][0].tolist() in prompts
            return found

    def reward(completions, **_) -> list[float]:
        return [float(number % 2) for number in range(len(completions))]

    # 3. Train. The options make TRL do the work that ours does.
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=side.batch_size,
            gradient_accumulation_steps=WORK.prompts * WORK.samples // side.batch_size,
            gradient_checkpointing=side.checkpointing,
            num_generations=WORK.samples,
            max_completion_length=WORK.new_tokens,
            generation_kwargs={"min_new_tokens": WORK.new_tokens},
            max_steps=1 + settings.steps,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            beta=0.0,
            num_iterations=1,
            epsilon=0.25,
            loss_type="dapo",
            temperature=1.0,
            max_grad_norm=1.0,
            optim="adamw_torch_fused",
            use_cpu=True,
            bf16=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model,
            reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    assert not torch.equal(weights_before, model.lm_head.weight), "TRL made no update"
    pairs = list(zip(rollouts, steps, strict=True))
    return [{"rollout": rollout, "update": step - rollout} for rollout, step in pairs[1:]], before


def their_model(ours: Qwen3):
    """transformers' class with the weights of ours."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**ours.config.to_hf("float32", eos_token_id=0), pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(ours.state_dict())
    return model


def their_tokenizer(vocab_size: int):
    """A tokenizer for which the word t17 has the id 17."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<end>": 0}
    for number in range(1, vocab_size):
        vocabulary[f"t{number}"] = number
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>", padding_side="left"
    )


def measure(name: str, settings: Settings) -> dict:
    """Run one side in a process of its own."""
    python = sys.executable if SIDES[name].program == "ours" else settings.trl_python
    command = [python, __file__, "--here", "--side", name, "--steps", str(settings.steps)]
    if settings.model:
        command += ["--model", settings.model]
    try:
        found = run_apart(command)
    except RuntimeError as error:
        sys.exit(f"error: {name}: {error}")
    seconds = [round(step["rollout"] + step["update"], 2) for step in found["steps"]]
    print(f"{name}: {seconds} s", flush=True)
    return found


def summary(runs: list[dict]) -> dict[str, float]:
    """Medians of one side: over all timed steps, and over the processes."""
    steps = [step for run in runs for step in run["steps"]]
    return {
        "step": statistics.median(step["rollout"] + step["update"] for step in steps),
        "rollout": median_of(steps, "rollout"),
        "update": median_of(steps, "update"),
        "peak": median_of(runs, "peak"),
        "beyond": median_of(runs, "beyond"),
    }


def check_trl(python: str) -> None:
    """Refuse to begin where TRL is not installed."""
    if subprocess.run([python, "-c", "import trl"], capture_output=True).returncode:
        way_out = "pip install trl==1.16.0, or name another --trl-python"
        print(f"error: TRL is not installed: {way_out}", file=sys.stderr)
        sys.exit(2)


def main(settings: Settings) -> None:
    if settings.here:
        side = SIDES[settings.side[0]]
        run = run_ours if side.program == "ours" else run_trl
        steps, before = run(side, settings)
        peak = peak_memory(CPU)
        print(json.dumps({"steps": steps, "peak": peak, "beyond": peak - before}))
        return
    if any(SIDES[name].program == "trl" for name in settings.side):
        check_trl(settings.trl_python)

    # 1. Measure.
    runs: dict[str, list[dict]] = {name: [] for name in settings.side}
    for _ in range(settings.repeats):
        for name in settings.side:
            runs[name].append(measure(name, settings))

    # 2. Compare with the first side.
    first = summary(runs[settings.side[0]])
    rows = []
    for name in settings.side:
        found = summary(runs[name])
        row = [
            name,
            f"{found['step']:.2f}",
            f"{found['rollout']:.2f}",
            f"{found['update']:.2f}",
            f"{found['step'] / first['step']:.2f}",
            f"{found['peak'] / 1e6:,.0f}",
            f"{found['peak'] / first['peak']:.2f}",
            f"{found['beyond'] / 1e6:,.0f}",
        ]
        rows.append(row)
    columns = ["", "step, s", "rollout, s", "update, s", "time / first", "peak, MB", "peak / first"]
    title = f"one GRPO step, {WORK.prompts} x {WORK.samples} x {WORK.new_tokens} new tokens: medians"
    print_table(title, [*columns, "beyond imports, MB"], rows)


if __name__ == "__main__":
    main(tyro.cli(Settings))

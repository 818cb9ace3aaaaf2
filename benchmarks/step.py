"""One whole GRPO step, rollout and update, of this project and of TRL's GRPOTrainer, on the same work.

    pip install trl==1.16.0                        # needed here only
    python benchmarks/step.py                      # about ten minutes on two cores
    python benchmarks/step.py --model FOLDER       # the weights of a folder or hub id, not random ones

Weights, prompts and sizes are the same; prompts are random ids. Each side runs in its own process, so that their memory does not
mix, and they take turns. All completions have full length: ours has no stop ids, TRL's may not end before.
Rewards are the same function of a completion's number in its group. Both make one AdamW update per step, in
float32, with the gradient's norm clipped to one and no reference model. The first step of each process is
not timed.

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
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import tyro
from memory import RandomTask, held_memory, random_model
from rich.console import Console
from rich.table import Table

from lab.device import peak_memory
from model import Qwen3, Qwen3Config, load_model
from rl.optimizer import OptimizerSettings

CONFIG = Qwen3Config(151936, 256, 768, 4, 4, 2, 64)
PROMPTS, SAMPLES, PROMPT_LENGTH, NEW_TOKENS = 4, 8, 140, 64
ROWS = PROMPTS * SAMPLES


def trl_batches(size: int, checkpointing: bool) -> dict:
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": ROWS // size,
        "gradient_checkpointing": checkpointing,
    }


SIDES = {
    "ours": {},
    "ours, checkpointing": {"activation_checkpointing": True},
    "TRL, one batch": trl_batches(ROWS, False),
    "TRL, 4 batches of 8": trl_batches(8, False),
    "TRL, 16 batches of 2, checkpointing": trl_batches(2, True),
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
    here: Literal["ours", "trl"] | None = None
    """Run one side in this process and print JSON; what the others are started with."""
    options: str = "{}"
    """Options of OptimizerSettings or of TRL's GRPOConfig, as JSON, for --here."""


def weights(settings: Settings) -> Qwen3:
    """The model of both sides, in float32."""
    if settings.model is None:
        return random_model(CONFIG, torch.float32, "cpu")
    return load_model(settings.model, dtype=torch.float32)[0]


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, vocab_size, (PROMPTS, PROMPT_LENGTH), generator=generator).tolist()


def run_ours(settings: Settings) -> dict:
    """(rollout, update) seconds of each step."""
    from lab.device import return_freed_blocks
    from lab.memory_plan import plan_memory, work_of
    from lab.recipe import EvaluationSettings, Recipe
    from model.memory import free_memory
    from rl.grpo import GRPOStage, grpo_step
    from rl.optimizer import Optimizer
    from rl.rollout import SamplingSettings
    from rl.trainer import Trainer

    return_freed_blocks()
    before = held_memory(torch.device("cpu"))
    model = weights(settings)
    kept = OptimizerSettings(**json.loads(settings.options))
    model.model.checkpoint_activations = kept.activation_checkpointing
    stage = GRPOStage(prompts_per_step=PROMPTS, samples_per_prompt=SAMPLES, updates_per_step=1)
    sampling = SamplingSettings(max_new_tokens=NEW_TOKENS)
    evaluation = EvaluationSettings(problems=1)
    recipe = Recipe(sampling=sampling, optimizer=kept, evaluation=evaluation, stages=(stage,))
    plan = plan_memory(model, kept, work_of(recipe, PROMPT_LENGTH), free_memory(model.device))
    trainer = Trainer(model, Optimizer(model, kept), plan.micro_batch_tokens)
    task = RandomTask(model.config.vocab_size, PROMPTS, PROMPT_LENGTH)
    options = {"settings": stage, "sampling": sampling, "learning_rate": 1e-6}
    times = []
    for step in range(1 + settings.steps):
        start = time.perf_counter()
        problems = list(range(PROMPTS))
        groups, _, metrics = grpo_step(trainer, task, task, problems, seed=step, **options)
        rollout = metrics["rollout_seconds"]
        times.append((rollout, time.perf_counter() - start - rollout))
        assert all(len(r.completion.token_ids) == NEW_TOKENS for group in groups for r in group)
        assert metrics["grad_norm"] > 0
    return {"times": times[1:], "before": before}


def run_trl(settings: Settings) -> dict:
    """The same of TRL, from a checkpoint and a tokenizer that are made for it."""
    import trl
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

    before = held_memory(torch.device("cpu"))
    ours = weights(settings)
    vocab_size = ours.config.vocab_size
    vocabulary = {"<end>": 0} | {f"t{number}": number for number in range(1, vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>", padding_side="left"
    )
    theirs = AutoConfig.for_model(**ours.config.to_hf("float32", eos_token_id=0), pad_token_id=0)
    model = AutoModelForCausalLM.from_config(theirs)
    model.load_state_dict(ours.state_dict())
    del ours
    times, rollout_seconds = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter() - self.start)

    class Trainer(trl.GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            start = time.perf_counter()
            found = super()._generate_and_score_completions(inputs)
            rollout_seconds.append(time.perf_counter() - start)
            shape = (found["prompt_ids"].shape[1], found["completion_ids"].shape[1])
            assert shape == (PROMPT_LENGTH, NEW_TOKENS), shape
            assert found["prompt_ids"][0].tolist() in prompts(vocab_size)
            return found

    def reward(completions, **_):
        return [float(number % 2) for number in range(len(completions))]

    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder,
            num_generations=SAMPLES,
            max_completion_length=NEW_TOKENS,
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
            generation_kwargs={"min_new_tokens": NEW_TOKENS},
            **json.loads(settings.options),
        )
        data = Dataset.from_list(
            [{"prompt": " ".join(f"t{number}" for number in prompt)} for prompt in prompts(vocab_size)]
        )
        trainer = Trainer(
            model, reward, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]
        )
        start = model.lm_head.weight.detach().clone()
        trainer.train()
    assert not torch.equal(start, model.lm_head.weight), "TRL made no update"
    assert len(times) == len(rollout_seconds) == 1 + settings.steps
    return {"times": [(r, t - r) for t, r in zip(times, rollout_seconds, strict=True)][1:], "before": before}


def measure(name: str, settings: Settings) -> dict:
    """Run one side in a process of its own."""
    side = "ours" if name.startswith("ours") else "trl"
    python = sys.executable if side == "ours" else settings.trl_python
    options = ["--steps", str(settings.steps), "--options", json.dumps(SIDES[name])]
    options += ["--model", settings.model] if settings.model else []
    run = subprocess.run([python, __file__, "--here", side, *options], capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"error: {name}: {(run.stderr.strip().splitlines() or ['killed'])[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


def main(settings: Settings) -> None:
    if settings.here:
        found = {"ours": run_ours, "trl": run_trl}[settings.here](settings)
        print(json.dumps(found | {"peak": peak_memory(torch.device("cpu"))}))
        return
    if any("TRL" in name for name in settings.side):
        check = [settings.trl_python, "-c", "import trl"]
        if subprocess.run(check, capture_output=True).returncode:
            print(
                "error: TRL is not installed: pip install trl==1.16.0, or name another --trl-python",
                file=sys.stderr,
            )
            sys.exit(2)
    found: dict[str, list[dict]] = {name: [] for name in settings.side}
    for _ in range(settings.repeats):
        for name in settings.side:
            found[name].append(measure(name, settings))
            print(f"{name}: {[round(sum(step), 2) for step in found[name][-1]['times']]} s", flush=True)
    table = Table(title=f"one GRPO step, {PROMPTS} x {SAMPLES} x {NEW_TOKENS} new tokens: medians")
    for column in (
        "",
        "step, s",
        "rollout, s",
        "update, s",
        "time / ours",
        "peak, MB",
        "peak / ours",
        "beyond imports, MB",
    ):
        table.add_column(column)
    summary = {}
    for name, runs in found.items():
        rollout, update = (
            statistics.median(step[part] for run in runs for step in run["times"]) for part in (0, 1)
        )
        step = statistics.median(sum(step) for run in runs for step in run["times"])
        peak = statistics.median(run["peak"] for run in runs)
        beyond = statistics.median(run["peak"] - run["before"] for run in runs)
        summary[name] = step, rollout, update, peak / 1e6, beyond / 1e6
    ours = summary.get("ours", next(iter(summary.values())))
    for name, (step, rollout, update, peak, beyond) in summary.items():
        times = (f"{x:.2f}" for x in (step, rollout, update, step / ours[0]))
        table.add_row(name, *times, f"{peak:,.0f}", f"{peak / ours[3]:.2f}", f"{beyond:,.0f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings))

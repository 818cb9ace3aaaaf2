"""What a recipe will take on this machine, from the cost of a token measured at the model's true shape.

    python benchmarks/estimate.py 256-0.6b      # random weights, two small GRPO steps; nothing is downloaded

Sampled and learned tokens are timed separately, in a step of fewer prompts than the recipe's, and the
recipe's tokens are counted as if every completion ran to its limit. So this is an upper bound, apart from
loading weights and writing checkpoints; larger batches are faster. Memory is the plan that the run itself
would print (`lab/memory_plan.py`).
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import tyro
from memory import QWEN3_06B, Case, measure, random_model
from rich.console import Console
from rich.table import Table

from lab.memory_plan import gb, plan_memory, work_of
from lab.recipe import Recipe, load_recipe
from model import Qwen3Config
from model.memory import free_memory

QWEN3_17B = Qwen3Config(151936, 2048, 6144, 28, 16, 8, 128)
SHAPES = {"Qwen/Qwen3-0.6B": QWEN3_06B, "Qwen/Qwen3-1.7B": QWEN3_17B}
PROMPT_TOKENS = 68  # of our prompt in Qwen3's tokenizer, chat template included


@dataclass(frozen=True)
class Arguments:
    """Estimate a recipe's time and memory on this machine."""

    recipe: Annotated[str, tyro.conf.Positional] = "256"
    """A name in recipes/, or a path ending in .toml."""
    prompts: int = 4
    """Groups of the measured steps."""
    new_tokens: int = 32
    """Tokens of their completions."""


@dataclass(frozen=True)
class Tokens:
    """How many tokens a recipe samples and learns from if every completion runs to the limit."""

    sampled: int
    learned: int


def tokens_of(recipe: Recipe) -> Tokens:
    """Rollouts are sampled and learned from, prompts once a group; traces are learned; evaluations are
    sampled."""
    new, evaluation = recipe.sampling.max_new_tokens, recipe.evaluation
    sampled = (evaluation.problems + 2 * evaluation.final_problems) * new
    learned = 0
    for stage in recipe.stages:
        if stage.kind == "grpo":
            completions = stage.steps * stage.prompts_per_step * stage.samples_per_prompt * new
            sampled += completions + -(-stage.steps // evaluation.every) * evaluation.problems * new
            learned += completions + stage.steps * stage.prompts_per_step * PROMPT_TOKENS
        else:
            traces = stage.epochs * stage.max_traces
            learned += traces * (new + PROMPT_TOKENS)
            sampled += -(-traces // (stage.batch_size * evaluation.every)) * evaluation.problems * new
    return Tokens(sampled, learned)


def main(arguments: Arguments) -> None:
    _, recipe = load_recipe(arguments.recipe)
    name = "Qwen/Qwen3-1.7B" if recipe.model == "auto" else recipe.model
    config = SHAPES[name]
    samples = next(stage.samples_per_prompt for stage in recipe.stages if stage.kind == "grpo")
    shape = arguments.prompts, samples, PROMPT_TOKENS, arguments.new_tokens
    found = measure(Case(config, torch.bfloat16, recipe.optimizer, *shape))
    sampled = arguments.prompts * samples * arguments.new_tokens
    per_sampled = found["rollout_seconds"] / sampled
    per_learned = found["update_seconds"] / (sampled + arguments.prompts * PROMPT_TOKENS)
    total = tokens_of(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = plan_memory(
        random_model(config, torch.bfloat16, device), recipe.optimizer,
        work_of(replace(recipe, model=name), PROMPT_TOKENS), free_memory(device),
    )  # fmt: skip
    hours = per_sampled * total.sampled / 3600, per_learned * total.learned / 3600
    where = torch.cuda.get_device_name() if device.type == "cuda" else "this CPU"
    table = Table(title=f"{arguments.recipe}: {name} on {where}")
    for column in ("", "a token, ms", "tokens, M", "hours"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("sampling", f"{1000 * per_sampled:.3g}", f"{total.sampled / 1e6:.2f}", f"{hours[0]:.3g}")
    table.add_row("learning", f"{1000 * per_learned:.3g}", f"{total.learned / 1e6:.2f}", f"{hours[1]:.3g}")
    table.add_row("together, at most", "", "", f"{sum(hours):.3g}")
    Console().print(table)
    print(f"memory: {gb(plan.peak)} planned: {plan}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))

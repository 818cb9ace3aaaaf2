"""Accuracy of a model on held-out Countdown problems: `python eval.py runs/256-tiny/checkpoints/step_0080`.

A checkpoint of a run is evaluated on that run's held-out problems, with its sampling; any other model by recipe 256.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from interrupt import ctrl_c_exits

with ctrl_c_exits():
    import tyro
    from rich.console import Console
    from rich.table import Table

    from data.sources import load_problems
    from model import load_model
    from rl.checkpoint import RECIPE
    from rl.console import user_errors
    from rl.evaluate import Evaluation, accuracy_by_difficulty, distinct_answers, evaluate
    from rl.problems import problems_of
    from rl.recipe import EvaluationSettings, Recipe, RecipeError
    from rl.recipe_file import from_dict, load_recipe
    from rl.rollout import pass_at_k
    from rl.stages import EVALUATION_SEED, pick_device, pick_dtype


@dataclass(frozen=True)
class Arguments:
    """Evaluate a model."""

    checkpoint: tyro.conf.Positional[str]
    """A checkpoint folder, tiny, or a hub id."""
    problems: str | None = None
    """hub, generated, a .parquet or a .jsonl; default: the recipe's held-out problems."""
    count: int | None = None
    """How many problems; default: the recipe's."""
    samples: int = 1
    """Completions a problem; above 1, pass@k and the number of different answers are printed too."""
    max_new_tokens: int | None = None
    """Tokens a completion may have; default: the recipe's."""
    temperature: float | None = None
    """0 is greedy; default: the recipe's."""
    top_k: int | None = None
    """Sample from the k likeliest tokens only."""
    top_p: float | None = None
    """Sample from the likeliest tokens of this joint probability only."""
    max_cache_tokens: int | None = None
    """Tokens whose keys and values are in memory at once; default: the recipe's, or what memory allows."""
    thinking: bool | None = None
    """Whether the prompt opens a <think> block; default: the recipe's."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    seed: int = EVALUATION_SEED
    """Of the sampling."""
    examples: int = 3
    """Completions to print for each outcome."""


def recipe_of(arguments: Arguments) -> Recipe:
    """The recipe a checkpoint was trained by, or 256 for models from elsewhere, with what the command line changes."""
    saved = Path(arguments.checkpoint) / RECIPE
    if saved.is_file():
        try:
            recipe = from_dict(Recipe, json.loads(saved.read_text()))
        except ValueError as error:
            raise RecipeError(f"{saved}: {error}") from None
    else:
        tiny = arguments.checkpoint == "tiny"
        recipe = replace(load_recipe("256", "tiny" if tiny else "")[1], model=arguments.checkpoint)
        if arguments.count is not None:
            recipe = replace(recipe, evaluation=EvaluationSettings(problems=arguments.count))
    changes = {
        name: getattr(arguments, name)
        for name in ("max_new_tokens", "max_cache_tokens", "temperature", "top_k", "top_p", "thinking")
        if getattr(arguments, name) is not None
    }
    return replace(
        recipe,
        stages=(),
        device=arguments.device,
        problems=arguments.problems or recipe.problems,
        sampling=replace(recipe.sampling, **changes),
    )


def print_table(result: Evaluation, name: str, examples: int, console: Console) -> None:
    table = Table(title=f"{name}: {len(result.groups)} problems x {len(result.groups[0])}", show_header=False)
    table.add_row("accuracy", f"{100 * result.accuracy:.1f} %")
    table.add_row("95 % interval", f"{100 * result.low:.1f} to {100 * result.high:.1f} %")
    for outcome, count in result.counts.items():
        table.add_row(outcome, str(count))
    table.add_row("mean length", f"{result.completion_length:.1f} tokens")
    table.add_row("truncated", f"{100 * result.truncated_fraction:.1f} %")
    for kind, (accuracy, problems) in accuracy_by_difficulty(result.groups).items():
        table.add_row(kind, f"{100 * accuracy:.1f} % of {problems}")
    samples = len(result.groups[0])
    if samples > 1:
        table.add_row(f"pass@{samples}", f"{100 * pass_at_k(result.groups, samples):.1f} %")
        table.add_row("distinct answers", f"{distinct_answers(result.groups):.1f} a problem")
    console.print(table)
    rollouts = [rollout for group in result.groups for rollout in group]
    for outcome in result.counts:
        chosen = [rollout for rollout in rollouts if rollout.score.outcome == outcome][:examples]
        for rollout in chosen:
            numbers = ", ".join(map(str, rollout.problem.numbers))
            console.rule(f"{outcome} ({rollout.score.reward:.2f}): {numbers} -> {rollout.problem.target}")
            console.print(rollout.text, markup=False, highlight=False)


def main(arguments: Arguments) -> None:
    if arguments.samples < 1:
        raise RecipeError(f"--samples must be at least 1, not {arguments.samples}")
    recipe = recipe_of(arguments)
    device = pick_device(recipe)
    model, tokenizer = load_model(arguments.checkpoint, device, pick_dtype(recipe), recipe.revision)
    if arguments.problems and arguments.problems not in ("hub", "generated"):
        held_out = load_problems(arguments.problems)
    else:
        held_out = problems_of(recipe)[1]
        if arguments.count is not None and arguments.count > len(held_out):
            raise RecipeError(f"--count must be at most {len(held_out)}, since the run was trained on all other problems")
    held_out = held_out[: arguments.count]
    result = evaluate(model, tokenizer, held_out, recipe.sampling, arguments.seed, arguments.samples)
    print_table(result, arguments.checkpoint, arguments.examples, Console())


if __name__ == "__main__":
    with user_errors("lower --max-cache-tokens, or take a smaller model"):
        main(tyro.cli(Arguments, description=__doc__))

"""Accuracy of models on held-out problems: `python eval.py runs/256-tiny/checkpoints/step_0080 tiny`.

A model is a checkpoint folder, `tiny` or a hub id. All get the same held-out problems: those of the first
checkpoint that you name, or of the first model's recipe.
"""

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro
from rich.console import Console

from data.load import fingerprint
from data.task import AnyProblem
from lab.checkpoint import seen_by
from lab.comparison import Candidate, comparison_table, difference, measures
from lab.errors import user_errors
from lab.evaluate import EVALUATION_SEED, Evaluation, evaluate, problems_hash
from lab.named_model import NamedModel, check_one_task, named_model
from lab.output import check_output, check_writable
from lab.recipe import RecipeError, checked, load_recipe, problems_of
from lab.screen import plain_console, printable, progress_bar
from lab.setup import longest_prompt, prompt_form

# The sampling settings that have an option here
SAMPLING = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "max_cache_tokens",
    "thinking",
    "examples",
    "state_limit",
)


@dataclass(frozen=True)
class Arguments:
    """Evaluate one or more models."""

    models: tyro.conf.Positional[tuple[str, ...]]  # Checkpoint folders, tiny, tiny-256, or hub ids
    recipe: str | None = None
    """For models not trained here; default: a trained model's beside it, its own, or 256."""
    problems: str | None = None  # hub or generated (the held-out part), hub-test, a file; default: as trained
    count: int | None = None  # Number of problems; default: all
    samples: int = 4  # Completions per problem, for pass@k
    max_new_tokens: int | None = None  # Token limit of a completion; default: the recipe's
    temperature: float | None = None  # For sampling; 0: greedy only. Default: the recipe's
    top_k: int | None = None  # Sample from the k likeliest tokens only
    top_p: float | None = None  # Sample from the likeliest tokens that together have this probability
    max_cache_tokens: int | None = None  # Tokens of keys and values in memory; default: what fits
    thinking: bool | None = None  # Whether the prompt opens a <think> block; default: the recipe's
    examples: int | None = None  # Solved examples before each problem; default: the recipe's
    state_limit: bool | None = None  # Whether the prompt states the token limit; default: the recipe's
    device: str = "auto"  # auto, cpu, cuda or cuda:N
    seed: int = EVALUATION_SEED  # For sampling; the same seed gives the same completions
    show: int = 1  # Completions to print of each model and outcome
    json: str | None = None  # Write all numbers to this file; - prints them instead of the table


def model_of(source: str, arguments: Arguments) -> NamedModel:
    """The model with the recipe that trained it, or a fitting one, changed by the command line."""
    sampling = {name: getattr(arguments, name) for name in SAMPLING}
    default = load_recipe(arguments.recipe)[1] if arguments.recipe else None
    model = named_model(source, arguments.models, arguments.device, sampling, default)
    recipe = model.recipe
    if arguments.problems:
        recipe = replace(recipe, problems=arguments.problems)
    if arguments.count is not None and not model.trained:
        evaluation = replace(recipe.evaluation, problems=arguments.count, final_problems=0)
        recipe = replace(recipe, evaluation=evaluation)
    return replace(model, recipe=checked(recipe))


def problems_for(models: list[NamedModel], arguments: Arguments) -> list[AnyProblem]:
    """The problems for all models: those of a file, or held-out ones; none that a model was trained on."""
    if arguments.problems and arguments.problems.partition("@")[0] not in ("hub", "generated"):
        problems = models[0].recipe.task.load(arguments.problems)
    else:
        first = ([model for model in models if model.trained] or models)[0]
        problems = problems_of(first.recipe, seen_by(first.source))[1]
    seen = set()
    for model in models:
        seen.update(seen_by(model.source))
        seen.update(map(fingerprint, model.recipe.task.examples(model.recipe.sampling.examples)))
    unseen: dict = {}
    for problem in problems:
        if fingerprint(problem) not in seen:
            unseen.setdefault(problem.key, problem)
    most = len(unseen)
    if most < len(problems):
        reason = "they repeat another, a model was trained on them, or its prompts show them"
        print(f"note: {len(problems) - most} of {len(problems)} problems left out: {reason}", file=sys.stderr)
    if not most:
        raise RecipeError("all problems were trained on by one of the models; give others by --problems")
    if arguments.count is not None and not 1 <= arguments.count <= most:
        raise RecipeError(f"--count must be from 1 to {most}: there are no more problems to evaluate on")
    return list(unseen.values())[: arguments.count]


def check_prompts(model: NamedModel, problems: list[AnyProblem]) -> None:
    """Note a missing chat template. ModelError: too few positions for these problems and completions."""
    tokenizer = model.folder.tokenizer
    if not tokenizer.has_template:
        print(f"note: {model.source} gets prompts in {prompt_form(tokenizer)}", file=sys.stderr)
    longest = longest_prompt(model.recipe, tokenizer, problems)
    model.folder.config.check_positions(longest, model.recipe.sampling.max_new_tokens, model.source)


def candidate_of(model: NamedModel, problems: list[AnyProblem], arguments: Arguments) -> Candidate:
    """A model's completions of the problems, sampled and greedy."""
    recipe = model.recipe
    policy, tokenizer = model.load()

    def evaluated(temperature: float, samples: int) -> Evaluation:
        with progress_bar(model.source, len(problems) * samples) as on_progress:
            return evaluate(
                policy,
                tokenizer,
                recipe.task,
                problems,
                sampling=replace(recipe.sampling, temperature=temperature),
                num_samples=samples,
                seed=arguments.seed,
                on_progress=on_progress,
            )

    greedy = evaluated(0.0, 1)
    temperature = recipe.sampling.temperature
    sampled = evaluated(temperature, arguments.samples) if temperature else greedy
    return Candidate(model.source, recipe, sampled, greedy)


def print_completions(candidate: Candidate, count: int, console: Console) -> None:
    """Print some completions of each outcome."""
    rollouts = [rollout for group in candidate.sampled.groups for rollout in group]
    for outcome in candidate.sampled.counts:
        for rollout in [rollout for rollout in rollouts if rollout.outcome == outcome][:count]:
            console.rule(f"{candidate.name}, {outcome}: {printable(str(rollout.problem))}")
            console.print(printable(rollout.text))


def main(arguments: Arguments) -> None:
    if not arguments.models:
        raise RecipeError("name a model: python eval.py runs/256-tiny/checkpoints/step_0080")
    if arguments.samples < 1:
        raise RecipeError(f"--samples must be at least 1, not {arguments.samples}")
    file = Path(os.path.expanduser(arguments.json)) if arguments.json not in (None, "-") else None
    if file:
        check_writable(file)
    else:
        check_output()
    models = [model_of(source, arguments).opened(arguments.thinking) for source in arguments.models]
    check_one_task({model.source: model.recipe for model in models})
    problems = problems_for(models, arguments)
    for model in models:
        check_prompts(model, problems)
    candidates = [candidate_of(model, problems, arguments) for model in models]
    measured = [measures(candidate) for candidate in candidates]
    differences = [difference(candidates[0], candidate) for candidate in candidates[1:]]
    counted = {"count": len(problems), "sha256": problems_hash(problems)}
    numbers = {"problems": counted, "seed": arguments.seed}
    numbers |= {"models": measured, "differences": differences}
    try:
        if arguments.json == "-":
            print(json.dumps(numbers, indent=2))
        else:
            title = f"{counted['count']:,} problems (sha256 {counted['sha256']}), intervals of 95 %"
            console = plain_console(least_width=80)
            console.print(comparison_table(title, measured, differences))
            for candidate in candidates:
                print_completions(candidate, arguments.show, console)
    finally:
        if file:
            file.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    if not file:
        check_output()


if __name__ == "__main__":
    with user_errors("lower --max-cache-tokens, or take a smaller model"):
        main(tyro.cli(Arguments, description=__doc__))

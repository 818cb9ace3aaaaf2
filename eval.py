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
from lab.checkpoint import saved_recipe, seen_by, untrained_recipe
from lab.comparison import Candidate, comparison_table, difference, measures
from lab.device import pick_device
from lab.errors import user_errors
from lab.evaluate import EVALUATION_SEED, Evaluation, evaluate, problems_hash
from lab.output import check_output, check_writable
from lab.recipe import Recipe, RecipeError, checked, load_recipe, problems_of
from lab.screen import plain_console, printable, progress_bar
from lab.setup import load_policy, longest_prompt, open_policy, prompt_form, without_missing_thinking
from model.weights import ModelFolder, is_bundled, resolve_source

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
    problems: str | None = None  # hub, generated, a .parquet or .jsonl; default: those held out in training
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


@dataclass(frozen=True)
class Model:
    source: str
    recipe: Recipe  # for its evaluation
    trained: bool  # with this recipe
    folder: ModelFolder | None = None  # once it is `opened`


def model_of(source: str, arguments: Arguments) -> Model:
    """The model with the recipe that trained it, or the default one, changed by the command line."""
    recipe = saved_recipe(source)
    trained = recipe is not None
    if not trained:
        named = load_recipe(arguments.recipe)[1] if arguments.recipe else None
        recipe = named or untrained_recipe(source, arguments.models)
        recipe = replace(recipe, model=source, revision=None, adapters=Recipe().adapters)
        if arguments.count is not None:
            evaluation = replace(recipe.evaluation, problems=arguments.count, final_problems=0)
            recipe = replace(recipe, evaluation=evaluation)
    given = {name: getattr(arguments, name) for name in SAMPLING}
    sampling = replace(recipe.sampling, **{name: value for name, value in given.items() if value is not None})
    problems = arguments.problems or recipe.problems
    recipe = replace(recipe, stages=(), device=arguments.device, problems=problems, sampling=sampling)
    return Model(source, checked(recipe), trained)


def of_one_task(models: list[Model]) -> list[Model]:
    """Give models that have no task of their own the task of those that have one."""
    own = [model for model in models if model.trained or is_bundled(model.source)]
    task = (own or models)[0].recipe.task
    for model in own:
        if type(model.recipe.task) is not type(task):
            kinds = f"{own[0].source} is for {task.kind} and {model.source} for {model.recipe.task.kind}"
            raise RecipeError(f"{kinds}: not comparable")
    return [m if m in own else replace(m, recipe=replace(m.recipe, task=task)) for m in models]


def problems_for(models: list[Model], arguments: Arguments) -> list[AnyProblem]:
    """The problems for all models: those of a file, or held-out ones; none that a model was trained on."""
    if arguments.problems and arguments.problems.partition("@")[0] not in ("hub", "generated"):
        listed = models[0].recipe.task.load(arguments.problems)
        different: dict = {}
        for problem in listed:
            different.setdefault(problem.key, problem)
        problems = list(different.values())
        if len(problems) < len(listed):
            repeats = f"{len(listed) - len(problems)} of {len(listed)} problems repeat another"
            print(f"note: {repeats}: each counts once", file=sys.stderr)
    else:
        first = ([model for model in models if model.trained] or models)[0]
        problems = problems_of(first.recipe, seen_by(first.source))[1]
    seen = {mark for model in models for mark in seen_by(model.source)}
    for recipe in (model.recipe for model in models):
        seen.update(map(fingerprint, recipe.task.examples(recipe.sampling.examples)))
    unseen = [problem for problem in problems if fingerprint(problem) not in seen]
    if len(unseen) < len(problems):
        left_out = f"{len(problems) - len(unseen)} of {len(problems)} problems left out"
        print(f"note: {left_out}: a model was trained on them, or its prompts show them", file=sys.stderr)
    most = len(unseen)
    if not most:
        raise RecipeError("all problems were trained on by one of the models; give others by --problems")
    if arguments.count is not None and not 1 <= arguments.count <= most:
        raise RecipeError(f"--count must be from 1 to {most}: there are no more problems to evaluate on")
    return unseen[: arguments.count]


def opened(model: Model, arguments: Arguments) -> Model:
    """The model with its folder, checked, and with prompts that its tokenizer can write."""
    checkpoint = checkpoint_of(model)
    folder = open_policy(model.recipe, checkpoint)
    recipe = model.recipe
    if not model.trained and arguments.thinking is None:
        recipe = without_missing_thinking(recipe, folder.tokenizer)
    if not folder.tokenizer.has_template:
        print(f"note: {model.source} gets prompts in {prompt_form(folder.tokenizer)}", file=sys.stderr)
    return replace(model, recipe=recipe, folder=folder)


def checkpoint_of(model: Model) -> Path | None:
    return resolve_source(model.source) if model.trained else None


def check_positions(model: Model, problems: list[AnyProblem]) -> None:
    """Refuse, by a ModelError, a model with too few positions for these problems and the completions."""
    longest = longest_prompt(model.recipe, model.folder.tokenizer, problems)
    model.folder.config.check_positions(longest, model.recipe.sampling.max_new_tokens, model.source)


def candidate_of(model: Model, problems: list[AnyProblem], arguments: Arguments) -> Candidate:
    """A model's completions of the problems, sampled and greedy."""
    recipe = model.recipe
    policy, tokenizer = load_policy(recipe, checkpoint_of(model), pick_device(recipe), model.folder)
    sampling = recipe.sampling

    def evaluated(temperature: float, samples: int) -> Evaluation:
        with progress_bar(model.source, len(problems) * samples) as on_progress:
            return evaluate(
                policy,
                tokenizer,
                recipe.task,
                problems,
                sampling=replace(sampling, temperature=temperature),
                num_samples=samples,
                seed=arguments.seed,
                on_progress=on_progress,
            )

    greedy = evaluated(0.0, 1)
    sampled = evaluated(sampling.temperature, arguments.samples) if sampling.temperature else greedy
    return Candidate(model.source, recipe, sampled, greedy)


def print_results(candidates: list[Candidate], numbers: dict, show: int) -> None:
    """Print a table of the numbers, and so many completions of each model and outcome."""
    console = plain_console(least_width=80)
    problems = numbers["problems"]
    title = f"{problems['count']:,} problems (sha256 {problems['sha256']}), intervals of 95 %"
    console.print(comparison_table(title, numbers["models"], numbers["differences"]))
    for candidate in candidates:
        print_completions(candidate, show, console)


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
    models = of_one_task([model_of(source, arguments) for source in arguments.models])
    models = [opened(model, arguments) for model in models]
    problems = problems_for(models, arguments)
    for model in models:
        check_positions(model, problems)
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
            print_results(candidates, numbers, arguments.show)
    finally:
        if file:
            file.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    if not file:
        check_output()


if __name__ == "__main__":
    with user_errors("lower --max-cache-tokens, or take a smaller model"):
        main(tyro.cli(Arguments, description=__doc__))

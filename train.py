"""Run a recipe: `python train.py 256` takes `recipes/256.toml`, without a GPU `256-tiny.toml`.

Any field of the recipe can be overridden: `python train.py 256 --stages.0.steps 10 --model Qwen/Qwen3-0.6B`.
"""

import os
import sys
from argparse import ArgumentParser
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import tyro

from lab.device import check_driver
from lab.errors import user_errors
from lab.recipe import Recipe, RecipeError, checked, load_recipe
from lab.stages import train
from model.weights import is_bundled

REAL_MODEL = "Qwen/Qwen3-1.7B"


@dataclass(frozen=True)
class Arguments:
    """Train a model by a recipe."""

    recipe_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """A name in recipes/ (256, 512, baseline, calculus, gsm8k, smoke, ...) or a path ending in .toml."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    resume: bool = False  # Continue from the last checkpoint of the run folder
    quiet: bool = False  # Print nothing but errors
    plain: bool = False  # Draw no progress bars on a terminal
    wandb: bool = False  # Log to Weights & Biases too; it must be installed


def parse(arguments: list[str]) -> Arguments:
    """The recipe named first, or its sibling for a bundled model, with the command line's overrides.

    Model "auto" is Qwen3-1.7B where there is a GPU, and the bundled model elsewhere.
    """
    # 1. The model decides which recipe is the default of the other options.
    name = arguments[0] if arguments and not arguments[0].startswith("-") else "256"
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", nargs="?")  # without a value: that is for tyro to refuse
    requested = parser.parse_known_args(arguments)[0].model
    model = requested = load_recipe(name)[1].model if requested is None else requested
    if requested == "auto":
        model = REAL_MODEL if torch.cuda.is_available() else "tiny"
    run_name, recipe = load_recipe(name, variant="tiny" if is_bundled(model) else "")
    if requested == "auto" and is_bundled(model) and is_bundled(recipe.model):
        model = recipe.model  # the bundled model of this recipe's task

    # 2. Everything else.
    recipe = replace(recipe, model=model, out=recipe.out or f"runs/{run_name}")
    parsed = tyro.cli(
        Arguments,
        args=arguments,
        default=Arguments(name, recipe),
        description=__doc__,
        config=(tyro.conf.AvoidSubcommands,),
    )
    if parsed.recipe_name != name:
        raise RecipeError(f"name the recipe before the options: python train.py {parsed.recipe_name} ...")
    recipe = parsed.recipe
    if requested == "auto":
        recipe = replace(recipe, model=model)
        if recipe.device == "auto":
            check_driver()
        if is_bundled(model) and not parsed.quiet and os.environ.get("RANK", "0") == "0":
            taken = f"taking the bundled {model} model, recipe {run_name}"
            print(f"no CUDA device: {taken} (or --model {REAL_MODEL})")
    return replace(parsed, recipe=checked(recipe))


def main(given: Arguments) -> None:
    train(given.recipe, given.resume, given.quiet, given.plain, given.wandb)


if __name__ == "__main__":
    with user_errors("try --optimizer.activation-checkpointing, or a lower --sampling.max-cache-tokens"):
        main(parse(sys.argv[1:]))

"""Run a recipe: `python train.py 256` goes through the stages of `recipes/256.toml`.

Any field of the recipe can be overridden: `python train.py 256 --stages.0.steps 10 --model Qwen/Qwen3-0.6B`.
"""

import os
import sys
from argparse import ArgumentParser
from dataclasses import dataclass, replace
from typing import Annotated

from interrupt import ctrl_c_exits

with ctrl_c_exits():
    import torch
    import tyro

    from model.weights import is_embedded
    from rl.console import fail, user_errors
    from rl.recipe import Recipe, RecipeError
    from rl.recipe_file import load_recipe
    from rl.runfolder import RunFolder
    from rl.stages import train
    from rl.workers import lost_another

REAL_MODEL = "Qwen/Qwen3-1.7B"


@dataclass(frozen=True)
class Arguments:
    """Train a model by a recipe."""

    recipe_name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """A name in recipes/ (256, 512, baseline, calculus, gsm8k, smoke, ...) or a path ending in .toml."""
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    resume: bool = False
    """Go on from the last checkpoint of the run folder."""
    quiet: bool = False
    """Print nothing but errors."""
    plain: bool = False
    """Print a line a step on a terminal too, where else a picture of the run stays up to date."""
    wandb: bool = False
    """Log to Weights & Biases too, which has to be installed."""


def requested_model(arguments: list[str]) -> str | None:
    """The value of --model, before the recipe that defines the other options is known."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", nargs="?")  # without a value: that is for tyro to refuse
    return parser.parse_known_args(arguments)[0].model


def parse(arguments: list[str]) -> Arguments:
    """The recipe named first, with the sibling recipe's values for the embedded model and the command line's over all.

    Model "auto" is Qwen3-1.7B where there is a GPU to run it, and the embedded model elsewhere.
    """
    name = arguments[0] if arguments and not arguments[0].startswith("-") else "256"
    asked = requested_model(arguments)
    model = asked = load_recipe(name)[1].model if asked is None else asked
    if asked == "auto":
        model = REAL_MODEL if torch.cuda.is_available() else "tiny"
    run_name, recipe = load_recipe(name, variant="tiny" if is_embedded(model) else "")
    if asked == "auto" and is_embedded(model) and is_embedded(recipe.model):
        model = recipe.model  # the one that this task has
    recipe = replace(recipe, model=model, out=recipe.out or f"runs/{run_name}")
    default = Arguments(recipe_name=name, recipe=recipe)
    parsed = tyro.cli(Arguments, args=arguments, default=default, description=__doc__, config=(tyro.conf.AvoidSubcommands,))
    if parsed.recipe_name != name:
        raise RecipeError(f"name the recipe before the options: python train.py {parsed.recipe_name} ...")
    if asked == "auto" and is_embedded(model) and not parsed.quiet and os.environ.get("RANK", "0") == "0":
        print(f"no CUDA device: taking the embedded {model} model, by recipe {run_name} (--model {REAL_MODEL} overrides)")
    return replace(parsed, recipe=replace(parsed.recipe, model=model if asked == "auto" else parsed.recipe.model))


def main(arguments: Arguments) -> None:
    recipe = arguments.recipe
    try:
        train(recipe, arguments.resume, arguments.quiet, arguments.plain, arguments.wandb)
    except RuntimeError as error:
        if not lost_another(error):
            raise
        fail("another process of this run has ended, see what it said; --resume goes on from the last checkpoint")
    except KeyboardInterrupt as stop:
        if stop.args or not RunFolder(recipe.out).holds_run:
            raise  # it says where it goes on, or there is nothing to go on with
        raise KeyboardInterrupt("Go on with the same command and --resume.") from None


if __name__ == "__main__":
    with user_errors(
        "try --optimizer.activation-checkpointing or a lower --sampling.max-cache-tokens, or take a smaller --model"
    ):
        main(parse(sys.argv[1:]))

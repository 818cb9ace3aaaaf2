"""The models that eval.py and play.py are given by name, each with the recipe by which it is asked."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from lab.checkpoint import saved_recipe
from lab.device import pick_device
from lab.recipe import Recipe, RecipeError, checked, recipe_for
from lab.setup import load_policy, open_policy
from model import Qwen3, Tokenizer
from model.weights import ModelFolder, is_bundled, resolve_source


@dataclass(frozen=True)
class NamedModel:
    source: str  # a checkpoint, a bundled model, a folder or a hub id
    recipe: Recipe
    trained: bool  # with this recipe
    folder: ModelFolder | None = None  # once it is opened

    @property
    def checkpoint(self) -> Path | None:
        return resolve_source(self.source) if self.trained else None

    def opened(self, thinking: bool | None = None) -> "NamedModel":
        """The model with its folder, checked.

        If `thinking` is None, a model from elsewhere whose tokenizer has no `<think>` is asked without it.
        """
        folder = open_policy(self.recipe, self.checkpoint)
        recipe = self.recipe
        if thinking is None and not self.trained and not folder.tokenizer.knows_thinking:
            recipe = replace(recipe, sampling=replace(recipe.sampling, thinking=False))
        return replace(self, recipe=recipe, folder=folder)

    def load(self) -> tuple[Qwen3, Tokenizer]:
        return load_policy(self.recipe, self.checkpoint, pick_device(self.recipe), self.folder)


def named_model(
    source: str, beside: Iterable[str], device: str, sampling: dict, default: Recipe | None = None
) -> NamedModel:
    """The model with the recipe that trained it, changed by those values of `sampling` that are not None.

    A model that was not trained here gets the `default`, or else `fitting_recipe`.
    """
    recipe = saved_recipe(source)
    trained = recipe is not None
    if not trained:
        recipe = default or fitting_recipe(source, beside)
        recipe = replace(recipe, model=source, revision=None, adapters=Recipe().adapters)
    given = {name: value for name, value in sampling.items() if value is not None}
    recipe = replace(recipe, stages=(), device=device, sampling=replace(recipe.sampling, **given))
    return NamedModel(source, checked(recipe), trained)


def fitting_recipe(source: str, beside: Iterable[str]) -> Recipe:
    """The recipe to ask a model by that was not trained here. A bundled model gets its own.

    Another gets that of the first model `beside` it that has one, so that both get the same task, prompts and
    limits; else the recipe that names it, or 256.
    """
    for name in [source] if is_bundled(source) else beside:
        recipe = saved_recipe(name) or (recipe_for(name) if is_bundled(name) else None)
        if recipe:
            return recipe
    return recipe_for(source)


def check_one_task(recipes: dict[str, Recipe]) -> None:
    """Refuse, by a RecipeError, to compare models, here by name, of different tasks."""
    kinds = {recipe.task.kind: source for source, recipe in recipes.items()}
    if len(kinds) > 1:
        tasks = " and ".join(f"{source} is for {kind}" for kind, source in kinds.items())
        raise RecipeError(f"{tasks}: not comparable, name models of one task at a time")

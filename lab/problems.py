"""The problems of a run: which are held out, and in what order the others come."""

import numpy as np

from data import DataError, split_problems
from model.weights import is_embedded
from lab.recipe import Recipe
from data.task import Problem


def problems_of(recipe: Recipe) -> tuple[list[Problem], list[Problem]]:
    """(train, held-out) problems of a recipe, which share none; a baseline has no use for the first."""
    source = recipe.problems
    if source == "auto":
        source = "generated" if is_embedded(recipe.model) else "hub"
    if source == "generated":
        try:
            problems = recipe.task.generate(recipe.generated_problems, recipe.seed)
        except ValueError as error:
            raise DataError(f"task: {error}") from None
    else:
        problems = recipe.task.load(source)
    return split_problems(problems, recipe.evaluation.held_out, recipe.seed)


def endless_problems(problems: list[Problem], seed: int, position: int, count: int) -> list[Problem]:
    """`count` problems from `position` on in an endless sequence that goes through all of them, newly shuffled each time."""
    taken = []
    while len(taken) < count:
        epoch, offset = divmod(position + len(taken), len(problems))
        order = np.random.default_rng([seed, epoch]).permutation(len(problems))
        taken += [problems[i] for i in order[offset : offset + count - len(taken)]]
    return taken

"""Checkpoints: a Hugging Face folder that any tool loads, plus what resuming needs. Safetensors and JSON only.

There is no random state to save. Every random choice is made from the recipe's seed and a counter (see
`rl.stages.Progress`), so the counters are the random state and the position in the data.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors
import safetensors.torch

from model import ModelError, Qwen3, Tokenizer, adapter_state, load_adapter_state, save_model
from rl.optimizer import Optimizer
from rl.recipe import Recipe, RecipeError
from rl.recipe_file import from_dict, to_dict

STATE, OPTIMIZER, RECIPE = "trainer_state.json", "optimizer.safetensors", "recipe.json"
ADAPTERS = "adapters.safetensors"


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        stage, stage_step: the stage at work and how many of its steps are done.
        step: steps done in all stages.
        grpo_steps: of these, GRPO steps; the paper's tables count in them.
        problems_seen: position in the endless shuffled sequence of training problems.
    """

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    grpo_steps: int = 0
    problems_seen: int = 0


def save_checkpoint(
    folder: Path, model: Qwen3, tokenizer: Tokenizer, optimizer: Optimizer | None, progress: Progress, recipe: Recipe
) -> None:
    """Write `folder` whole or not at all: into a temporary neighbour first, then renamed.

    `optimizer` is None at the end of a stage, since the next stage starts with an optimizer of its own.
    """
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    save_model(temporary, model, tokenizer)
    if adapters := {name: matrix.cpu() for name, matrix in adapter_state(model).items()}:
        safetensors.torch.save_file(adapters, temporary / ADAPTERS)  # the model itself is saved with these merged
    if optimizer is not None:
        tensors = {name: tensor.cpu().contiguous() for name, tensor in optimizer.state_tensors()}
        safetensors.torch.save_file(tensors, temporary / OPTIMIZER)
    (temporary / STATE).write_text(json.dumps(asdict(progress), indent=2) + "\n")
    (temporary / RECIPE).write_text(json.dumps(to_dict(recipe), indent=2) + "\n")
    if folder.exists():
        remove_checkpoint(folder)
    os.replace(temporary, folder)


def load_progress(folder: Path) -> Progress:
    """The counters of a checkpoint.

    Raises:
        RecipeError: the folder is no checkpoint of a run, or its state is damaged.
    """
    try:
        return Progress(**json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RecipeError(f"{folder / STATE}: not the state of a run: {error}") from None


def load_optimizer(folder: Path, optimizer: Optimizer) -> None:
    """Put the saved moments and master weights back into `optimizer`."""
    try:
        tensors = safetensors.torch.load_file(folder / OPTIMIZER)
        optimizer.load_state_tensors(tensors)
    except (OSError, safetensors.SafetensorError, KeyError, IndexError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{folder / OPTIMIZER}: cannot be resumed from: {error}") from None


def load_adapters(folder: Path, model: Qwen3) -> None:
    """Put the saved adapters into `model`, which has the same base as when they were saved."""
    try:
        load_adapter_state(model, safetensors.torch.load_file(folder / ADAPTERS))
    except (OSError, safetensors.SafetensorError, ModelError) as error:
        raise RecipeError(f"{folder / ADAPTERS}: cannot be resumed from: {error}") from None


def checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def prune_checkpoints(run: Path, keep: int) -> None:
    """Delete all but the latest `keep` checkpoints and those at a stage's end."""
    for folder in checkpoints(run)[:-keep]:
        if load_progress(folder).stage_step != 0:
            remove_checkpoint(folder)


def remove_checkpoint(folder: Path) -> None:
    """Delete `folder`; stopped on the way, this leaves nothing that looks like a checkpoint."""
    doomed = folder.with_name(folder.name + ".removed")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def saved_recipe(folder: str | Path) -> Recipe | None:
    """The recipe that a checkpoint was trained by; None where it comes from elsewhere.

    Raises:
        RecipeError: the recipe in the folder cannot be read.
    """
    path = Path(folder) / RECIPE
    if not path.is_file():
        return None
    try:
        return from_dict(Recipe, json.loads(path.read_text()))
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None

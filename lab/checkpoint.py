"""Checkpoints: a Hugging Face folder that any tool loads, plus what resuming needs. Safetensors and JSON only.

There is no random state to save. Every random choice is made from the recipe's seed and a counter (see
`Progress`), so the counters are the random state and the position in the data.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model import ModelError, Qwen3, Tokenizer, adapter_state, load_adapter_state, save_model
from model.weights import read_json
from rl.optimizer import Optimizer
from lab.recipe import Recipe, RecipeError
from lab.recipe_file import from_dict, to_dict

STATE, OPTIMIZER, RECIPE = "trainer_state.json", "optimizer.safetensors", "recipe.json"
ADAPTERS, DIGESTS = "adapters.safetensors", "sha256.json"
PARTIAL, REMOVED = ".partial", ".removed"  # what a folder's name ends in while it is written, or deleted


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
    """Write `folder` whole or not at all: into a temporary neighbour, to the disk itself, and only then renamed.

    `optimizer` is None at the end of a stage, since the next stage starts with an optimizer of its own.

    Raises:
        RecipeError: it cannot be written, a full disk for one; what was there before still is.
    """
    temporary = folder.with_name(folder.name + PARTIAL)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        save_model(temporary, model, tokenizer)
        if adapters := {name: matrix.cpu() for name, matrix in adapter_state(model).items()}:
            safetensors.torch.save_file(adapters, temporary / ADAPTERS)  # the model itself is saved with these merged
        if optimizer is not None:
            tensors = {name: tensor.cpu().contiguous() for name, tensor in optimizer.state_tensors()}
            safetensors.torch.save_file(tensors, temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps(asdict(progress), indent=2) + "\n")
        (temporary / RECIPE).write_text(json.dumps(to_dict(recipe), indent=2) + "\n")
        digests = {path.name: digest(path) for path in sorted(temporary.iterdir())}
        (temporary / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        if folder.exists():
            remove_checkpoint(folder)
        os.replace(temporary, folder)
        sync(folder.parent)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(
            f"{folder} cannot be written ({reason}); the checkpoints before it are whole: put that right, then --resume"
        ) from None


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk, where a power cut leaves it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, by the SHA-256 written beside them; None if nothing is."""
    try:
        digests = read_json(folder / DIGESTS)
        for name in {STATE, "model.safetensors", *digests}:
            if digest(folder / name) != digests.get(name):
                return f"{name} is not what was written"
        load_progress(folder)
    except (OSError, ValueError, AttributeError) as error:
        return str(getattr(error, "filename", None) or error) + " cannot be read"
    return None


def newest_checkpoint(run: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest checkpoint of a run that is undamaged; damaged ones are named and put aside.

    What a killed process left half written or half deleted is removed on the way.
    """
    for leftover in [*(run / "checkpoints").glob(f"*{PARTIAL}"), *(run / "checkpoints").glob(f"*{REMOVED}")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for folder in reversed(checkpoints(run)):
        found = damage(folder)
        if found is None:
            return folder
        aside = folder.with_name(folder.name + ".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        say(f"{folder} is damaged ({found}): kept as {aside.name}, going on from the checkpoint before")
    return None


def load_progress(folder: Path) -> Progress:
    """The counters of a checkpoint.

    Raises:
        RecipeError: the folder is no checkpoint of a run, or its state is damaged.
    """
    try:
        progress = Progress(**read_json(folder / STATE))
        if not all(type(value) is int and 0 <= value <= 10**12 for value in asdict(progress).values()):
            raise TypeError("its counters must be whole numbers")
    except (ModelError, TypeError) as error:
        raise RecipeError(f"{folder / STATE}: not the state of a run: {error}") from None
    return progress


def load_optimizer(folder: Path, optimizer: Optimizer) -> None:
    """Put the saved moments and master weights back into `optimizer`."""
    resume_from(folder / OPTIMIZER, optimizer.load_state_tensors)


def load_adapters(folder: Path, model: Qwen3) -> None:
    """Put the saved adapters into `model`, which has the same base as when they were saved."""
    resume_from(folder / ADAPTERS, partial(load_adapter_state, model))


def resume_from(path: Path, take: Callable[[dict[str, Tensor]], None]) -> None:
    try:
        take(safetensors.torch.load_file(path))
    except torch.OutOfMemoryError:
        raise
    except (OSError, safetensors.SafetensorError, KeyError, IndexError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{path}: cannot be resumed from: {error}") from None


def checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(found, key=step_of)


def prune_checkpoints(run: Path, keep: int, accuracies: dict[int, float]) -> None:
    """Delete all but the latest `keep` checkpoints, those at a stage's end, and the best by `accuracies`, given by step."""
    folders = checkpoints(run)
    best = max(folders, key=lambda folder: accuracies.get(step_of(folder), -1.0), default=None)
    for folder in folders[:-keep]:
        if folder != best and load_progress(folder).stage_step != 0:
            remove_checkpoint(folder)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def remove_checkpoint(folder: Path) -> None:
    """Delete `folder`; stopped on the way, this leaves nothing that looks like a checkpoint."""
    doomed = folder.with_name(folder.name + REMOVED)
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
        return from_dict(Recipe, read_json(path))
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None

"""Checkpoints: Hugging Face folders that any tool loads, with what resuming needs; no pickle."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

import safetensors
import safetensors.torch
import torch
from annotated_types import Interval
from torch import Tensor

from data.load import fingerprint
from data.task import AnyProblem
from lab.recipe import Recipe, RecipeError, from_dict
from lab.runfolder import step_of, sync
from model import Qwen3, Tokenizer, adapter_state, load_adapter_state, save_model
from model.weights import content_digest, read_json, resolve_source, weight_files
from rl.optimizer import Optimizer, PieceWithMaster

STATE, OPTIMIZER, RECIPE = "trainer_state.json", "optimizer.safetensors", "recipe.json"
ADAPTERS, DIGESTS = "adapters.safetensors", "sha256.json"
PARTIAL, REMOVED = ".partial", ".removed"  # suffixes of folders that are being written, or deleted
WholeNumber = Annotated[int, Interval(ge=0, le=10**12)]


@dataclass
class TrainState:
    """The progress of a run. It has no random state: random choices follow from seed and counters."""

    stage: WholeNumber = 0
    stage_step: WholeNumber = 0  # steps done in this stage
    step: WholeNumber = 0  # steps done in all stages
    grpo_steps: WholeNumber = 0  # of them, GRPO steps; the paper's tables count these
    problems_seen: WholeNumber = 0  # position in the endless shuffled sequence of training problems
    problems: dict[str, str] = field(default_factory=dict)  # hashes of the lists "train" and "held_out"
    seen: list[str] = field(default_factory=list)  # fingerprints of all problems that it was trained on
    base: str = ""  # `content_digest` of the weights that it began with, where these are needed again

    def see(self, problems: Iterable[AnyProblem]) -> None:
        """Note that the model is trained on `problems`."""
        self.seen = sorted({*self.seen, *map(fingerprint, problems)})


def save_checkpoint(
    folder: Path,
    model: Qwen3,
    tokenizer: Tokenizer,
    optimizer: Optimizer | None,
    state: TrainState,
    recipe: Recipe,
) -> None:
    """Write `folder` whole or not at all: write a folder beside it, sync it to the disk, then rename it.

    `optimizer` is None at a stage's end: the next one has its own. RecipeError: `folder` cannot be written.
    """
    temporary = folder.with_name(folder.name + PARTIAL)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        save_model(temporary, model, tokenizer)
        adapters = {name: matrix.cpu() for name, matrix in adapter_state(model).items()}
        if adapters:  # which `save_model` has merged
            safetensors.torch.save_file(adapters, temporary / ADAPTERS)
        if optimizer is not None:
            on_cpu = {name: tensor.cpu().contiguous() for name, tensor in state_tensors(optimizer)}
            safetensors.torch.save_file(on_cpu, temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n")
        (temporary / RECIPE).write_text(json.dumps(asdict(recipe), indent=2) + "\n")
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
        advice = "the checkpoints before it are whole: put that right, then --resume"
        raise RecipeError(f"{folder} cannot be written ({reason}); {advice}") from None


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def damage(folder: Path) -> str | None:
    """The damage to a checkpoint, by the SHA-256 written beside its files; None if nothing is."""
    try:
        digests = read_json(folder / DIGESTS)
        for name in {STATE, "model.safetensors", *digests}:
            if digest(folder / name) != digests.get(name):
                return f"{name} is not what was written"
        load_state(folder)
    except (OSError, ValueError, AttributeError) as error:
        return str(getattr(error, "filename", None) or error) + " cannot be read"
    return None


def newest_checkpoint(run: Path, say: Callable[[str], None] = print) -> Path | None:
    """The newest whole checkpoint of a run. Damaged ones are renamed, half-written ones removed."""
    for leftover in [*run.glob(f"checkpoints/*{PARTIAL}"), *run.glob(f"checkpoints/*{REMOVED}")]:
        shutil.rmtree(leftover, ignore_errors=True)
    for folder in reversed(checkpoints(run)):
        fault = damage(folder)
        if fault is None:
            return folder
        aside = folder.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        say(f"{folder} is damaged ({fault}): kept as {aside.name}, going on from the checkpoint before")
    return None


def load_state(folder: Path) -> TrainState:
    """The counters of a checkpoint. RecipeError: the folder is no checkpoint of a run, or it is damaged."""
    try:
        state = from_dict(TrainState, read_json(folder / STATE))
        if state.problems_seen and not state.seen:
            raise ValueError("an older version did not note which problems it has seen; train it again")
    except ValueError as error:
        raise RecipeError(f"{folder / STATE}: not the state of a run: {error}") from None
    return state


def seen_by(model: str, revision: str | None = None) -> list[str]:
    """The fingerprints of the problems that a model was trained on; empty for a model from elsewhere.

    RecipeError: a model that was trained here has lost them.
    """
    folder = resolve_source(model, revision)
    trained_here = (folder / STATE).is_file() or (folder / RECIPE).is_file()
    return load_state(folder).seen if trained_here else []


def base_digest(recipe: Recipe) -> str:
    """The digest of the weights that a run of `recipe` begins with, as they are now."""
    return content_digest(weight_files(resolve_source(recipe.model, recipe.revision)))


def check_base(recipe: Recipe, state: TrainState, needed_by: Path) -> None:
    """Refuse, by a RecipeError, to go on over other weights than those that `needed_by` began with."""
    if state.base and base_digest(recipe) != state.base:
        advice = "put them back, or go on in a new run from a checkpoint as --model"
        raise RecipeError(
            f"the weights in {recipe.model} are not those that {needed_by} began with: {advice}"
        )


def load_optimizer(optimizer: Optimizer, folder: Path) -> None:
    """Put the state of a checkpoint's optimizer back. RecipeError: it does not fit."""
    with stored_tensors(folder / OPTIMIZER) as tensors:
        load_state_tensors(optimizer, tensors)


def load_adapters(model: Qwen3, folder: Path) -> None:
    """Put a checkpoint's adapters back. RecipeError: they do not fit."""
    with stored_tensors(folder / ADAPTERS) as tensors:
        load_adapter_state(model, tensors)


@contextlib.contextmanager
def stored_tensors(path: Path) -> Iterator[dict[str, Tensor]]:
    """The tensors of a file, for a block that loads them. RecipeError: it cannot, or they do not fit."""
    try:
        yield safetensors.torch.load_file(path)
    except torch.OutOfMemoryError:
        raise
    except (OSError, safetensors.SafetensorError, KeyError, IndexError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{path}: cannot be resumed from: {error}") from None


def checkpoints(run: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step_*")
    return sorted((path for path in folders if path.name[5:].isdigit()), key=step_of)


def prune_checkpoints(run: Path, keep: int, accuracies: dict[int, float]) -> None:
    """Delete all but the latest `keep` checkpoints, stage ends, and the best of `accuracies` (by step)."""
    folders = checkpoints(run)
    evaluated = [folder for folder in folders if step_of(folder) in accuracies]
    best = max(evaluated, key=lambda folder: accuracies[step_of(folder)], default=None)
    for folder in folders[:-keep]:
        with contextlib.suppress(RecipeError):  # one that cannot be read is left as it is
            if folder != best and load_state(folder).stage_step != 0:
                remove_checkpoint(folder)


def remove_checkpoint(folder: Path) -> None:
    """Delete `folder`; a kill on the way leaves nothing that looks like a checkpoint."""
    doomed = folder.with_name(folder.name + REMOVED)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def saved_recipe(source: str | Path) -> Recipe | None:
    """The recipe that a model was trained by, or None for one from elsewhere. RecipeError: it is damaged."""
    path = resolve_source(source) / RECIPE
    if not path.is_file():
        return None
    try:
        return from_dict(Recipe, read_json(path))
    except ValueError as error:
        raise RecipeError(f"{path}: {error}") from None


def state_tensors(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's state as (name, tensor): masters of rounded weights, and Adam's moments."""
    yield "updates", torch.tensor(optimizer.updates)
    for name, pieces in optimizer.pieces.items():
        for number, piece in enumerate(pieces):
            for key, value in piece.adamw.state[piece.master].items():
                yield f"{name}|{number}|{key}", torch.as_tensor(value)
            if isinstance(piece, PieceWithMaster):
                yield f"{name}|{number}|master", piece.master.detach()


@torch.no_grad()
def load_state_tensors(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Take back what `state_tensors` gave, for a model with the same parameters."""
    optimizer.updates = int(tensors["updates"])
    for full_name in tensors.keys() - {"updates"}:
        name, number, key = full_name.split("|")
        value, piece = tensors[full_name], optimizer.pieces[name][int(number)]
        if key == "master":
            piece.master.copy_(value)
            continue
        count = key == "step" and not value.is_floating_point()  # bitsandbytes counts in a plain integer
        state = piece.adamw.state[piece.master]
        state[key] = int(value) if count else value.to(piece.master.device)

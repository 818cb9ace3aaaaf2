"""Checkpoints are whole or not there: writes that stop anywhere, damage, full disks, and what is kept."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers import ragged_samples, random_model, trainer_for

import lab.checkpoint
from lab.checkpoint import TrainState, checkpoints, damage, newest_checkpoint, save_checkpoint
from lab.recipe import Recipe, RecipeError
from model import Tokenizer, load_model
from model.weights import TINY
from rl.sft import sft_step
from rl.trainer import Trainer

TOKENIZER = Tokenizer(TINY)
STATE = TrainState(10**12, 1, 2, 3, 4, {"train": "a hash"}, ["a fingerprint"])


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    """One of a small model, which has taken a step."""
    trainer = trainer_for(random_model(vocab_size=len(TOKENIZER)))
    sft_step(trainer, ragged_samples(3), 1e-2)
    return trainer


def save(run: Path, number: int, trainer: Trainer) -> Path:
    folder = run / "checkpoints" / f"step_{number:04d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, trainer.model, TOKENIZER, trainer.optimizer, STATE, Recipe())
    return folder


class Killed(BaseException):
    """No handler catches it, as none would run in a killed process."""


def kill_at(patch, count: int) -> list[int]:
    """Stops the `count`-th operation on the disk, with a file half written or a folder half deleted."""
    left = [count]

    def counted(name, real):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0]:
                return real(*arguments, **options)
            if name == "write_text":
                path, text = arguments
                real(path, text[: len(text) // 2])
            if name == "rmtree" and arguments[0].exists():
                (arguments[0] / "config.json").unlink()
            raise Killed

        return call

    places = {"replace": os, "fsync": os, "rmtree": shutil, "write_text": Path, "digest": lab.checkpoint}
    for name, owner in places.items():
        patch.setattr(owner, name, counted(name, getattr(owner, name)))
    return left


def test_wherever_a_write_is_cut_off_a_whole_checkpoint_is_found(tmp_path, trainer, monkeypatch):
    """Over an older checkpoint, and over one of the same step, as after a resume."""
    old = save(tmp_path, 10, trainer)
    for operation in itertools.count(1):
        same = save(tmp_path, 20, trainer)
        with monkeypatch.context() as patch:
            left = kill_at(patch, operation)
            with contextlib.suppress(Killed):
                save(tmp_path, 20, trainer)
        newest = newest_checkpoint(tmp_path)
        assert newest in (old, same), operation
        assert damage(newest) is None, operation
        load_model(newest)
        assert {path.name for path in old.parent.iterdir()} <= {"step_0010", "step_0020"}
        if left[0] > 0:  # the write had fewer operations
            break
    assert operation > 20


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, trainer):
    """The damaged one is renamed, so that it is put aside."""
    assert newest_checkpoint(tmp_path) is None
    whole = save(tmp_path, 10, trainer)
    assert lab.checkpoint.load_state(whole) == STATE
    digests = json.loads((whole / "sha256.json").read_text())
    for file in [path.name for path in whole.iterdir()]:
        content = (whole / file).read_bytes()
        assert file == "sha256.json" or digests[file] == hashlib.sha256(content).hexdigest()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 64]) + content[middle + 1 :]
        for fault in (flipped, content[:-3], None):
            newest = shutil.copytree(whole, whole.with_name("step_0020"))
            (newest / file).unlink()
            if fault is not None:
                (newest / file).write_bytes(fault)
            said = []
            assert newest_checkpoint(tmp_path, said.append) == whole
            (message,) = said
            assert "step_0020 is damaged" in message
            assert "step_0020.damaged" in message
            assert file == "sha256.json" or file in message
            assert newest.with_suffix(".damaged").is_dir()
            assert checkpoints(tmp_path) == [whole]
    (whole / "config.json").write_text("{}")
    assert newest_checkpoint(tmp_path) is None


def test_a_full_disk_leaves_what_was_there_and_says_so(tmp_path, trainer, monkeypatch):
    kept = save(tmp_path, 10, trainer)

    def full(path, *arguments, **options):
        raise OSError(28, "No space left on device", str(path))

    message = r"step_0020 cannot be written \(No space left on device\).*--resume"
    for module, name in (
        (lab.checkpoint.safetensors.torch, "save_file"),
        (Path, "write_text"),
        (os, "fsync"),
    ):
        with monkeypatch.context() as patch, pytest.raises(RecipeError, match=message):
            patch.setattr(module, name, full)
            save(tmp_path, 20, trainer)
        assert list(kept.parent.iterdir()) == [kept]
        assert newest_checkpoint(tmp_path) == kept


@pytest.mark.parametrize(
    "keep, accuracies, left",
    [(2, {}, {2, 5, 6}), (1, {0: 0.9, 1: 0.1, 3: 0.8, 4: 0.2}, {2, 3, 6}), (9, {3: 0.5}, {1, 2, 3, 4, 5, 6})],
)
def test_pruning_keeps_the_latest_the_stage_ends_and_the_best(keep, accuracies, left, tmp_path):
    """The second of six steps ended a stage. There is no checkpoint of step 0."""
    for step in range(1, 7):
        folder = tmp_path / "checkpoints" / f"step_{step:04d}"
        folder.mkdir(parents=True)
        state = TrainState(step=step, stage_step=0 if step == 2 else 1)
        (folder / "trainer_state.json").write_text(json.dumps(asdict(state)))
    lab.checkpoint.prune_checkpoints(tmp_path, keep, accuracies)
    assert {int(folder.name[5:]) for folder in checkpoints(tmp_path)} == left

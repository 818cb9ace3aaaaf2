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
from helpers import largest_gap, ragged_samples, random_model, trainer_for, weights
from hypothesis import given, settings
from hypothesis import strategies as st

import lab.checkpoint
from lab.checkpoint import (
    TrainState,
    checkpoints,
    damage,
    load_state,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from lab.recipe import Recipe, RecipeError
from model import Tokenizer, load_model
from model.weights import TINY
from rl.sft import sft_step


@pytest.fixture(scope="module")
def parts():
    tokenizer = Tokenizer(TINY)
    model = random_model(vocab_size=len(tokenizer))
    trainer = trainer_for(model)
    sft_step(trainer, ragged_samples(3), 1e-2)
    return model, tokenizer, trainer.optimizer


def save(run: Path, number: int, parts) -> Path:
    folder = run / "checkpoints" / f"step_{number:04d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, *parts, TrainState(step=number, stage_step=5), Recipe())
    return folder


class Killed(BaseException):
    """No handler catches it, as none would run in a killed process."""


def kill_at(monkeypatch, count: int) -> list[int]:
    """Stops the `count`-th operation on the disk, with a file half written or a folder half deleted."""
    left, rmtree = [count], shutil.rmtree

    def counted(real):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                if real is Path.write_text:
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                if real is rmtree and arguments[0].exists():
                    (arguments[0] / "config.json").unlink()
                raise Killed
            return real(*arguments, **options)

        return call

    for owner, name in (
        (os, "replace"),
        (os, "fsync"),
        (shutil, "rmtree"),
        (Path, "write_text"),
        (lab.checkpoint, "digest"),
    ):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return left


def test_wherever_a_write_is_cut_off_a_whole_checkpoint_is_found(tmp_path, parts, monkeypatch):
    """Over an older checkpoint, and over one of the same step, as after a resume."""
    for operation in itertools.count(1):
        run = tmp_path / str(operation)
        old, same = save(run, 10, parts), save(run, 20, parts)
        with monkeypatch.context() as patch:
            left = kill_at(patch, operation)
            with contextlib.suppress(Killed):
                save(run, 20, parts)
        newest = newest_checkpoint(run)
        assert newest in (old, same) and damage(newest) is None, operation
        assert load_model(newest)[0].num_tokens == parts[0].config.vocab_size
        assert {path.name for path in (run / "checkpoints").iterdir()} <= {"step_0010", "step_0020"}
        if left[0] > 0:  # the write had fewer operations
            break
    assert operation > 20


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, parts):
    """The damaged one is renamed, so that it is put aside."""
    whole = save(tmp_path, 10, parts)
    digests = json.loads((whole / "sha256.json").read_text())
    for file in [path.name for path in whole.iterdir()]:
        content = (whole / file).read_bytes()
        assert file == "sha256.json" or digests[file] == hashlib.sha256(content).hexdigest()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 64
        for fault in (flipped, content[:-3], None):
            newest = save(tmp_path, 20, parts)
            (newest / file).unlink() if fault is None else (newest / file).write_bytes(fault)
            said = []
            assert newest_checkpoint(tmp_path, said.append) == whole
            assert len(said) == 1
            assert "step_0020 is damaged" in said[0]
            assert "step_0020.damaged" in said[0]
            assert file == "sha256.json" or file in said[0]
            assert (tmp_path / "checkpoints" / "step_0020.damaged").is_dir()
            assert checkpoints(tmp_path) == [whole]


def test_without_a_whole_checkpoint_there_is_none(tmp_path, parts):
    assert newest_checkpoint(tmp_path) is None
    for file in ("config.json", "sha256.json"):
        (save(tmp_path, 10, parts) / file).write_text("{}")
        assert newest_checkpoint(tmp_path, lambda text: None) is None


def test_a_full_disk_leaves_what_was_there_and_says_so(tmp_path, parts, monkeypatch):
    kept = save(tmp_path, 10, parts)

    def full(path, *arguments, **options):
        raise OSError(28, "No space left on device", str(path))

    for module, name in (
        (lab.checkpoint.safetensors.torch, "save_file"),
        (Path, "write_text"),
        (os, "fsync"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(
                RecipeError, match=r"step_0020 cannot be written \(No space left on device\).*--resume"
            ):
                save(tmp_path, 20, parts)
        assert newest_checkpoint(tmp_path) == kept
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0010"]


def test_counters_weights_and_moments_come_back_and_go_on_alike(tmp_path, parts):
    model = random_model(vocab_size=len(parts[1]))
    trainer = trainer_for(model)
    sft_step(trainer, ragged_samples(3), 1e-2)
    state = TrainState(10**12, 1, 2, 3, 4, {"train": "a hash"}, ["a fingerprint"])
    save_checkpoint(tmp_path / "step_0001", model, parts[1], trainer.optimizer, state, Recipe())
    assert load_state(tmp_path / "step_0001") == state
    loaded, _ = load_model(tmp_path / "step_0001")
    resumed = trainer_for(loaded)
    lab.checkpoint.load_optimizer(resumed.optimizer, tmp_path / "step_0001")
    sft_step(trainer, ragged_samples(3, seed=1), 1e-2)
    sft_step(resumed, ragged_samples(3, seed=1), 1e-2)
    assert largest_gap(weights(model), weights(loaded)) == 0


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 99), min_size=1, max_size=8), st.data())
def test_pruning_keeps_the_latest_the_stage_ends_and_the_best(tmp_path_factory, steps, data):
    ends = data.draw(st.sets(st.sampled_from(sorted(steps))))
    accuracies = data.draw(st.dictionaries(st.sampled_from(sorted(steps)), st.floats(0, 1)))
    keep = data.draw(st.integers(1, 4))
    run = tmp_path_factory.mktemp("run")
    for number in steps:
        folder = run / "checkpoints" / f"step_{number:04d}"
        folder.mkdir(parents=True)
        state = asdict(TrainState(step=number, stage_step=0 if number in ends else 1))
        (folder / "trainer_state.json").write_text(json.dumps(state))
    prune_checkpoints(run, keep, accuracies)
    left = {int(folder.name[5:]) for folder in checkpoints(run)}
    must = set(sorted(steps)[-keep:]) | ends
    assert must <= left <= steps
    assert len(left - must) <= 1
    assert left - must <= accuracies.keys()
    best = max(accuracies.values(), default=None)
    assert best is None or any(accuracies.get(number) == best for number in left)

"""Checkpoints are whole or not there: writes that stop anywhere, damage afterwards, full disks, and what is kept."""

import hashlib
import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import optimizer_for, random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lab.checkpoint
from lab.checkpoint import TrainState, checkpoints, damage, load_state, newest_checkpoint, prune_checkpoints, save_checkpoint
from lab.recipe import Recipe, RecipeError
from model import Tokenizer, load_model
from model.weights import TINY

MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def step(model, optimizer, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step(1e-3)


@pytest.fixture(scope="module")
def parts():
    tokenizer = Tokenizer(TINY)
    model = random_model(vocab_size=len(tokenizer))
    optimizer = optimizer_for(model)
    step(model, optimizer)
    return model, tokenizer, optimizer


def save(run: Path, number: int, parts) -> Path:
    folder = run / "checkpoints" / f"step_{number:04d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder, *parts, TrainState(step=number, stage_step=5), Recipe())
    return folder


class Killed(BaseException):
    """No handler catches it, as none would run in a killed process."""


def kill_at(monkeypatch, count: int) -> list[int]:
    """Stops the `count`-th operation on the disk, with half of a file written, or a folder deleted in part."""
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

    for owner, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree"), (Path, "write_text"), (lab.checkpoint, "digest")):
        monkeypatch.setattr(owner, name, counted(getattr(owner, name)))
    return left


def test_wherever_a_write_is_cut_off_a_whole_checkpoint_is_found(tmp_path, parts, monkeypatch):
    """Over an older checkpoint, and over one of the same step, as after a resume."""
    operation = 0
    stopped = True
    while stopped:
        operation += 1
        run = tmp_path / str(operation)
        old, same = save(run, 10, parts), save(run, 20, parts)
        with monkeypatch.context() as patch:
            left = kill_at(patch, operation)
            try:
                save(run, 20, parts)
                stopped = False
            except Killed:
                pass
        newest = newest_checkpoint(run)
        assert newest in (old, same) and damage(newest) is None, operation
        assert load_model(newest)[0].num_tokens == parts[0].config.vocab_size
        assert {path.name for path in (run / "checkpoints").iterdir()} <= {"step_0010", "step_0020"}
    assert operation > 20 and left[0] > 0


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "tokenizer.json", "sha256.json"]
)
def test_a_damaged_checkpoint_is_named_put_aside_and_the_one_before_is_taken(tmp_path, parts, file):
    whole = save(tmp_path, 10, parts)
    content = (whole / file).read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1 if file != "sha256.json" else 64
    for fault in (flipped, content[:-3], None):
        newest = save(tmp_path, 20, parts)
        (newest / file).unlink() if fault is None else (newest / file).write_bytes(fault)
        said = []
        assert newest_checkpoint(tmp_path, said.append) == whole
        assert len(said) == 1 and "step_0020 is damaged" in said[0] and "step_0020.damaged" in said[0]
        assert file == "sha256.json" or file in said[0]
        assert (tmp_path / "checkpoints" / "step_0020.damaged").is_dir() and checkpoints(tmp_path) == [whole]


def test_without_a_whole_checkpoint_there_is_none(tmp_path, parts):
    assert newest_checkpoint(tmp_path) is None
    for file in ("config.json", "sha256.json"):
        (save(tmp_path, 10, parts) / file).write_text("{}")
        assert newest_checkpoint(tmp_path, lambda text: None) is None


def test_a_full_disk_leaves_what_was_there_and_says_so(tmp_path, parts, monkeypatch):
    kept = save(tmp_path, 10, parts)

    def full(path, *arguments, **options):
        raise OSError(28, "No space left on device", str(path))

    for module, name in ((lab.checkpoint.safetensors.torch, "save_file"), (Path, "write_text"), (os, "fsync")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(RecipeError, match=r"step_0020 cannot be written \(No space left on device\).*--resume"):
                save(tmp_path, 20, parts)
        assert newest_checkpoint(tmp_path) == kept
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_0010"]


@MANY
@given(data=st.data())
def test_whatever_single_byte_changes_it_is_noticed_or_says_the_same(tmp_path, parts, data):
    folder = tmp_path / "checkpoints" / "step_0010"
    if not folder.exists():
        save(tmp_path, 10, parts)
        digests = json.loads((folder / "sha256.json").read_text())
        assert set(digests) == {path.name for path in folder.iterdir()} - {"sha256.json"}
        assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == value for name, value in digests.items())
    path = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        assert damage(folder) or (path.name == "sha256.json" and json.loads(changed) == json.loads(whole))
    finally:
        path.write_bytes(whole)
    assert damage(folder) is None


@settings(MANY, max_examples=20)
@given(
    counters=st.lists(st.integers(0, 10**12), min_size=5, max_size=5),
    kind=st.sampled_from(["adamw", "adamw8bit"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rounding=st.sampled_from(["masters", "stochastic"]),
    steps=st.integers(0, 3),
)
def test_counters_weights_and_moments_come_back_and_go_on_alike(tmp_path, parts, counters, kind, dtype, rounding, steps):
    tokenizer, folder = parts[1], tmp_path / "step_0001"
    model = random_model(dtype=dtype, vocab_size=len(tokenizer))
    optimizer = optimizer_for(model, kind=kind, rounding=rounding)
    for number in range(steps):
        step(model, optimizer, number)
    save_checkpoint(folder, model, tokenizer, optimizer, TrainState(*counters), Recipe())
    assert load_state(folder) == TrainState(*counters)
    loaded, _ = load_model(folder)
    resumed = optimizer_for(loaded, kind=kind, rounding=rounding)
    lab.checkpoint.load_optimizer(folder, resumed)
    step(model, optimizer, 99)
    step(loaded, resumed, 99)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@MANY
@given(st.sets(st.integers(0, 99), min_size=1, max_size=8), st.data())
def test_whatever_is_pruned_the_latest_stay_and_so_do_stage_ends_and_the_best(tmp_path, steps, data):
    ends = data.draw(st.sets(st.sampled_from(sorted(steps))))
    accuracies = data.draw(st.dictionaries(st.sampled_from(sorted(steps)), st.floats(0, 1)))
    keep = data.draw(st.integers(1, 4))
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    for number in steps:
        folder = tmp_path / "checkpoints" / f"step_{number:04d}"
        folder.mkdir(parents=True)
        state = asdict(TrainState(step=number, stage_step=0 if number in ends else 1))
        (folder / "trainer_state.json").write_text(json.dumps(state))
    prune_checkpoints(tmp_path, keep, accuracies)
    left = {int(folder.name[5:]) for folder in checkpoints(tmp_path)}
    must = set(sorted(steps)[-keep:]) | ends
    assert must <= left <= steps and len(left - must) <= 1
    best = max(accuracies.values(), default=None)
    assert best is None or any(accuracies.get(number) == best for number in left)

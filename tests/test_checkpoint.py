"""Checkpoints are whole or not there: writes that stop anywhere, damage afterwards, full disks, and what is kept."""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers import random_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lab.checkpoint
from model import Tokenizer, load_model
from model.weights import TINY
from lab.checkpoint import (
    Progress,
    checkpoints,
    damage,
    load_optimizer,
    load_progress,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)  # fmt: skip
from rl.optimizer import Optimizer
from lab.recipe import Recipe, RecipeError


@pytest.fixture(scope="module")
def parts():
    tokenizer = Tokenizer(TINY)
    model = random_model(vocab_size=len(tokenizer))
    optimizer = Optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    return model, tokenizer, optimizer


def save(run: Path, step: int, parts, stage_step: int = 5) -> Path:
    folder = run / "checkpoints" / f"step_{step:04d}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    model, tokenizer, optimizer = parts
    save_checkpoint(folder, model, tokenizer, optimizer, Progress(step=step, stage_step=stage_step), Recipe())
    return folder


class Killed(BaseException):
    """No handler catches it, as none would run in a killed process."""


@pytest.fixture
def killed_at(monkeypatch):
    """Stops the n-th operation on the disk, with half of a written file's content there."""

    def arm(n: int):
        left = [n]

        def count(real):
            def call(*arguments, **options):
                left[0] -= 1
                if left[0] == 0:
                    if real is Path.write_text:
                        real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                    raise Killed
                return real(*arguments, **options)

            return call

        monkeypatch.setattr(os, "replace", count(os.replace))
        monkeypatch.setattr(os, "fsync", count(os.fsync))
        monkeypatch.setattr(shutil, "rmtree", count(shutil.rmtree))
        monkeypatch.setattr(Path, "write_text", count(Path.write_text))
        monkeypatch.setattr(lab.checkpoint, "digest", count(lab.checkpoint.digest))
        return left

    return arm


def test_wherever_a_write_is_cut_off_a_whole_checkpoint_is_found(tmp_path, parts, killed_at, monkeypatch):
    """Over an older checkpoint, and over one of the same step, as after a resume."""
    operation, stopped = 0, True
    while stopped:
        operation += 1
        run = tmp_path / str(operation)
        old, same = save(run, 10, parts), save(run, 20, parts)
        left = killed_at(operation)
        try:
            save(run, 20, parts)
            stopped = False
        except Killed:
            pass
        monkeypatch.undo()
        found = newest_checkpoint(run)
        assert found in (old, same) and damage(found) is None, operation
        assert load_model(found)[0].num_tokens == parts[0].config.vocab_size
        assert {path.name for path in (run / "checkpoints").iterdir()} <= {"step_0010", "step_0020"}
    assert operation > 20 and left[0] > 0


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "tokenizer.json", "sha256.json"]
)
@pytest.mark.parametrize("fault", ["flipped bit", "cut short", "gone"])
def test_a_damaged_checkpoint_is_named_put_aside_and_the_one_before_is_taken(tmp_path, parts, file, fault):
    before, newest = save(tmp_path, 10, parts), save(tmp_path, 20, parts)
    content = bytearray((newest / file).read_bytes())
    if fault == "flipped bit":
        content[len(content) // 2] ^= 1 if file != "sha256.json" else 64
    (newest / file).write_bytes(content if fault == "flipped bit" else content[:-3])
    if fault == "gone":
        (newest / file).unlink()
    said = []
    assert newest_checkpoint(tmp_path, said.append) == before
    assert len(said) == 1 and "step_0020 is damaged" in said[0] and "step_0020.damaged" in said[0]
    assert file == "sha256.json" or file in said[0]
    assert (tmp_path / "checkpoints" / "step_0020.damaged").is_dir() and checkpoints(tmp_path) == [before]


def test_without_a_whole_checkpoint_there_is_none(tmp_path, parts):
    assert newest_checkpoint(tmp_path) is None
    (save(tmp_path, 10, parts) / "config.json").write_text("{}")
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


def test_the_latest_the_best_and_stage_ends_are_kept(tmp_path, parts):
    for step in range(10, 80, 10):
        save(tmp_path, step, parts, stage_step=0 if step == 30 else step)
    accuracies = {10: 0.1, 20: 0.5, 40: 0.4, 50: 0.45, 60: 0.3}
    prune_checkpoints(tmp_path, 2, accuracies)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step_0020", "step_0030", "step_0060", "step_0070"]
    prune_checkpoints(tmp_path, 1, accuracies | {70: 0.6})
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step_0030", "step_0070"]


def test_the_digests_are_sha256_of_every_file(tmp_path, parts):
    import hashlib

    folder = save(tmp_path, 10, parts)
    digests = json.loads((folder / "sha256.json").read_text())
    assert set(digests) == {path.name for path in folder.iterdir()} - {"sha256.json"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == value for name, value in digests.items())
    assert load_progress(folder) == replace(Progress(), step=10, stage_step=5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_single_byte_changes_it_is_noticed_or_says_the_same(tmp_path, parts, data):
    folder = tmp_path / "checkpoints" / "step_0010"
    if not folder.exists():
        save(tmp_path, 10, parts)
    path = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(changed)
    try:
        found = damage(folder)
        assert found or (path.name == "sha256.json" and json.loads(changed) == json.loads(whole))
    finally:
        path.write_bytes(whole)
    assert damage(folder) is None


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counters=st.lists(st.integers(0, 10**12), min_size=5, max_size=5),
    kind=st.sampled_from(["adamw", "adamw8bit"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rounding=st.sampled_from(["masters", "stochastic"]),
    steps=st.integers(0, 3),
)
def test_counters_weights_and_moments_come_back_and_go_on_alike(tmp_path, parts, counters, kind, dtype, rounding, steps):
    def step(model, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step(1e-3)

    tokenizer, folder = parts[1], tmp_path / "checkpoints" / "step_0001"
    folder.parent.mkdir(exist_ok=True)
    model = random_model(dtype=dtype, vocab_size=len(tokenizer))
    optimizer = Optimizer(model, kind, rounding=rounding)
    for number in range(steps):
        step(model, optimizer, number)
    save_checkpoint(folder, model, tokenizer, optimizer, Progress(*counters), Recipe())
    assert load_progress(folder) == Progress(*counters)
    loaded, _ = load_model(folder)
    resumed = Optimizer(loaded, kind, rounding=rounding)
    load_optimizer(folder, resumed)
    for pair in (model, optimizer), (loaded, resumed):
        step(*pair, seed=99)
    pairs = zip(model.parameters(), loaded.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(0, 99), min_size=1, max_size=8), st.data())
def test_whatever_is_pruned_the_latest_stay_and_so_do_stage_ends_and_the_best(tmp_path, parts, steps, data):
    ends = data.draw(st.sets(st.sampled_from(sorted(steps))))
    accuracies = data.draw(st.dictionaries(st.sampled_from(sorted(steps)), st.floats(0, 1)))
    keep = data.draw(st.integers(1, 4))
    shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    for step in steps:
        folder = tmp_path / "checkpoints" / f"step_{step:04d}"
        folder.mkdir(parents=True)
        state = asdict(Progress(step=step, stage_step=0 if step in ends else 1))
        (folder / "trainer_state.json").write_text(json.dumps(state))
    prune_checkpoints(tmp_path, keep, accuracies)
    left = {int(folder.name[5:]) for folder in checkpoints(tmp_path)}
    must = set(sorted(steps)[-keep:]) | ends
    assert must <= left <= steps and len(left - must) <= 1
    best = max(accuracies.values(), default=None)
    assert best is None or any(accuracies.get(step) == best for step in left)

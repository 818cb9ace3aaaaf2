"""A run killed at any moment, as often as one likes, ends as if it had not been killed."""

import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import SMALL, smoke, terse, timeless

import lab.checkpoint
from lab.checkpoint import checkpoints
from lab.runfolder import RunFolder
from lab.stages import train

KILLS = 10
OPTIONS = "--evaluation.every 3 --stages.0.steps 4"


def attempt(out: str) -> None:
    # As on a slow disk: a checkpoint takes a tenth of a second.
    lab.checkpoint.sync = lambda path: time.sleep(0.01)
    torch.set_num_threads(1)
    terse(pytest.MonkeyPatch())
    train(smoke("--out", out, SMALL, OPTIONS), resume=RunFolder(out).holds_run, quiet=True)


def result(run: Path) -> dict:
    """Everything that must not depend on how often a run was killed."""
    paths = [*(run / "rollouts").iterdir(), run / "traces.jsonl", run / "curve.md"]
    paths += [path for folder in checkpoints(run) for path in folder.iterdir()]
    # Two of a checkpoint's files name the run's folder.
    paths = [path for path in paths if path.name not in ("recipe.json", "sha256.json")]
    return {path.relative_to(run): path.read_bytes() for path in paths} | {"metrics": timeless(run)}


def writing(run: Path) -> bool:
    return any((run / "checkpoints").glob("*.partial"))


def modified(run: Path) -> float:
    metrics = RunFolder(run).metrics_path
    return metrics.stat().st_mtime if metrics.exists() else 0.0


def test_a_run_killed_ten_times_ends_bit_for_bit_the_same(tmp_path, monkeypatch):
    context = multiprocessing.get_context("forkserver")
    # Everything is imported before the fork, which saves seconds. Python 3.11 does not tell the server of
    # sys.path.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    context.set_forkserver_preload(["test_kill", "torch.utils.tensorboard", "matplotlib.figure"])

    def start(run: Path) -> multiprocessing.Process:
        process = context.Process(target=attempt, args=(str(run),))
        process.start()
        return process

    process = start(tmp_path / "whole")
    process.join()
    assert process.exitcode == 0
    expected = result(tmp_path / "whole")
    names = [folder.name for folder in checkpoints(tmp_path / "whole")]
    assert "step_0004" in names
    assert len(names) <= 5, "the latest two, the ends of two stages before, and the best"
    rng = random.Random(7)
    kills = in_writes = finished = 0
    while kills < KILLS or finished < 1:
        run = tmp_path / f"run_{finished}"
        before = modified(run)
        process = start(run)
        if kills < KILLS:
            while process.is_alive() and modified(run) == before:  # until it is past its imports and at work
                time.sleep(0.001)
            in_write = kills % 3 == 0
            until = time.monotonic() + rng.uniform(0.0, 0.5)
            while process.is_alive() and not (writing(run) if in_write else time.monotonic() > until):
                time.sleep(0.001)
            process.kill()
        process.join()
        if process.exitcode == 0:
            assert result(run) == expected
            finished += 1
        else:
            assert process.exitcode == -9
            kills += 1
            in_writes += writing(run)
    assert in_writes >= 2, "no kill came while a checkpoint was being written"

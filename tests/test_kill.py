"""A run killed at any moment, as often as one likes, ends as if it had not been: same weights, metrics, rollouts, traces."""

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch
from test_commands import smoke, timeless

import lab.checkpoint
from lab.checkpoint import checkpoints
from lab.runfolder import RunFolder
from lab.stages import train

KILLS = 20
OPTIONS = ["--checkpoint-every", 1, "--keep-checkpoints", 2, "--stages.0.steps", 6, "--stages.2.steps", 4]


def attempt(out: str) -> None:
    def slow_sync(path: Path) -> None:
        time.sleep(0.02)

    lab.checkpoint.sync = slow_sync  # as on a slow disk: a checkpoint takes a quarter of a second
    torch.set_num_threads(1)
    train(smoke("--out", out, *OPTIONS).recipe, resume=RunFolder(out).holds_run, quiet=True)


def result(run: Path) -> dict:
    """Everything that must not depend on how often a run was killed."""
    texts = {path.name: path.read_bytes() for path in [*(run / "rollouts").iterdir(), run / "traces.jsonl", run / "curve.md"]}
    saved = {
        f"{folder.name}/{path.name}": path.read_bytes()
        for folder in checkpoints(run) for path in folder.iterdir() if path.name not in ("recipe.json", "sha256.json")
    }  # fmt: skip
    return texts | saved | {"metrics": timeless(run)}


def writing(run: Path) -> bool:
    return any((run / "checkpoints").glob("*.partial"))


def modified(run: Path) -> float:
    metrics = RunFolder(run).metrics_path
    return metrics.stat().st_mtime if metrics.exists() else 0.0


@pytest.fixture
def processes():
    """Processes that begin with everything imported, so that one costs what a run costs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_kill"])
    return context


def test_a_run_killed_twenty_times_ends_bit_for_bit_as_if_it_had_not_been(tmp_path, processes):
    whole = tmp_path / "whole"
    process = processes.Process(target=attempt, args=(str(whole),))
    process.start()
    process.join()
    assert process.exitcode == 0
    expected = result(whole)
    rng, kills, in_writes, finished, number = random.Random(7), 0, 0, 0, 0
    while kills < KILLS or finished < 1:
        run = tmp_path / f"run_{finished}"
        process = processes.Process(target=attempt, args=(str(run),))
        process.start()
        number += 1
        if kills < KILLS:
            before = modified(run)
            while process.is_alive() and modified(run) == before:  # until it is past its imports and at work
                time.sleep(0.001)
            in_write, until = number % 3 == 0, time.monotonic() + rng.uniform(0.0, 1.0)
            while process.is_alive() and not (writing(run) if in_write else time.monotonic() > until):
                time.sleep(0.001)
            process.kill()
        process.join()
        in_writes += process.exitcode != 0 and writing(run)
        if process.exitcode == 0:
            assert result(run) == expected
            finished += 1
        else:
            assert process.exitcode == -9
            kills += 1
    assert in_writes >= 3, "no kill came while a checkpoint was being written"

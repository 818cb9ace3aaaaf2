"""A run killed at any moment, as often as one likes, ends as if it had not been killed."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure  # noqa: F401  (what a run imports on the way, once for all runs)
import pytest
import torch
import torch.utils.tensorboard
from helpers import SMALL, smoke, terse, timeless

import lab.checkpoint
from lab.checkpoint import checkpoints
from lab.runfolder import RunFolder
from lab.stages import train

KILLS = 10
OPTIONS = "--evaluation.every 3 --stages.0.steps 4"


def start(run: Path) -> int:
    """A process of its own in which a run begins, or goes on."""
    child = os.fork()
    if not child:
        try:
            # As on a slow disk: a checkpoint takes a tenth of a second.
            lab.checkpoint.sync = lambda path: time.sleep(0.01)
            torch.set_num_threads(1)
            terse(pytest.MonkeyPatch())
            train(smoke("--out", run, SMALL, OPTIONS), resume=RunFolder(run).holds_run, quiet=True)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def wait(child: int, until: Callable[[], bool]) -> None:
    """Wait for a moment, or for the end of a process, whichever is first."""
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None and not until():
        time.sleep(0.001)


def modified(run: Path) -> float:
    metrics = run / "metrics.jsonl"
    return metrics.stat().st_mtime if metrics.exists() else 0.0


def is_writing(run: Path) -> bool:
    return any((run / "checkpoints").glob("*.partial"))


def killed(run: Path, delay: float | None) -> int:
    """The exit status of a run that is killed `delay` after its first step, or, if None, within a write."""
    before = modified(run)
    child = start(run)
    wait(child, lambda: modified(run) != before)
    end = time.monotonic() + (delay or 0)
    wait(child, lambda: is_writing(run) if delay is None else time.monotonic() > end)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def result(run: Path) -> dict:
    """Everything that must not depend on how often a run was killed."""
    paths = [*(run / "rollouts").iterdir(), run / "traces.jsonl", run / "curve.md"]
    for folder in checkpoints(run):
        paths += folder.iterdir()
    # Two of a checkpoint's files name the run's folder.
    paths = [path for path in paths if path.name not in ("recipe.json", "sha256.json")]
    return {path.relative_to(run): path.read_bytes() for path in paths} | {"metrics": timeless(run)}


def test_a_run_killed_ten_times_ends_bit_for_bit_the_same(tmp_path):
    whole = tmp_path / "whole"
    assert os.waitpid(start(whole), 0)[1] == 0
    expected = result(whole)
    names = [folder.name for folder in checkpoints(whole)]
    assert "step_0004" in names
    assert len(names) <= 5, "the latest two, the ends of two stages before, and the best"
    rng = random.Random(7)
    kills = in_writes = finished = 0
    while kills < KILLS or not finished:
        run = tmp_path / f"run_{finished}"
        if kills < KILLS:
            status = killed(run, rng.uniform(0.0, 0.5) if kills % 3 else None)
        else:
            _, status = os.waitpid(start(run), 0)
        if status == 0:
            assert result(run) == expected
            finished += 1
        else:
            assert status == signal.SIGKILL
            kills += 1
            in_writes += is_writing(run)
    assert in_writes >= 2, "no kill came while a checkpoint was being written"

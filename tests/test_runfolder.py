"""One run folder, one run at a time; what is logged comes back, and goes to the trackers too."""

import json
import math
import os
import signal
import sys
import time
from types import SimpleNamespace
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lab.boards import Boards
from lab.recipe import Recipe, RecipeError
from lab.runfolder import RunFolder


def test_a_second_process_is_refused_and_a_dead_one_is_ignored(tmp_path):
    """A dead process's lock is none."""
    run = RunFolder(tmp_path / "run")
    reader, writer = os.pipe()
    holder = os.fork()
    if not holder:
        try:
            with run.locked():
                os.write(writer, b"held")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.read(reader, 4) == b"held"
    with pytest.raises(RecipeError, match="in use by another process.*--out"), run.locked():
        pass
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert (run.path / "lock").exists()  # stale: nothing to clean up by hand
    with run.locked():
        run.create(Recipe(), {})
    assert run.holds_run


def test_the_lock_ends_with_the_block_and_leaves_no_empty_folder(tmp_path):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(KeyError), run.locked():
        with pytest.raises(RecipeError, match="in use"), RunFolder(run.path).locked():
            pass
        raise KeyError
    assert not run.path.exists()


def test_what_is_not_finite_is_null_in_metrics_and_nan_when_read(tmp_path):
    run = RunFolder(tmp_path)
    row = {"step": 0, "kind": "grpo", "reward_mean": 0.5}
    run.log(row | {"entropy": math.nan, "loss": -math.inf})
    for _ in range(2):
        assert json.loads(run.metrics_path.read_text()) == row | {"entropy": None, "loss": None}
        (read,) = run.metrics()
        assert math.isnan(read.pop("entropy"))
        assert math.isnan(read.pop("loss"))
        assert read == row
        run.rewind(0)  # which writes them again


def test_a_row_goes_to_tensorboard_and_wandb(tmp_path, monkeypatch):
    wandb = mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    boards = Boards(tmp_path)
    boards.start_wandb({"seed": 3})
    boards.log({"step": 0, "kind": "grpo", "eval_accuracy": 0.07})
    boards.log({"step": 1, "kind": "grpo", "reward_mean": 0.25})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["eval_accuracy", "reward_mean"]
    (event,) = events.Scalars("reward_mean")
    assert (event.step, event.value) == (1, 0.25)
    options = wandb.init.call_args.kwargs
    assert options["config"] == {"seed": 3}
    assert options["resume"] == "allow"
    expected = [mock.call({"eval_accuracy": 0.07}, step=0), mock.call({"reward_mean": 0.25}, step=1)]
    assert wandb.init.return_value.log.call_args_list == expected


def test_a_wandb_that_does_not_start_says_what_to_do(tmp_path, monkeypatch):
    def refuses(**options):
        raise RuntimeError("no API key")

    # None is what Python leaves there for a package that is not installed.
    for package, advice in ((None, "pip install wandb"), (SimpleNamespace(init=refuses), "no API key")):
        monkeypatch.setitem(sys.modules, "wandb", package)
        with pytest.raises(RecipeError, match=advice):
            Boards(tmp_path).start_wandb({})

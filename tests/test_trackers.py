"""Trackers show what metrics.jsonl says: TensorBoard always, Weights & Biases when asked for and installed."""

import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lab.recipe import RecipeError
from lab.runfolder import RunFolder
from lab.trackers import WandB

ROWS = [{"step": 0, "kind": "grpo", "eval_accuracy": 0.07}, {"step": 1, "kind": "grpo", "reward_mean": 0.25}]


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package; holds what it was told."""
    told = []

    def init(**options):
        told.append(options)
        return SimpleNamespace(log=lambda row, step: told.append((row, step)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, told=told))
    return told


def test_a_row_goes_to_metrics_tensorboard_and_wandb(tmp_path, wandb):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    run.trackers.append(WandB(run.path, {"seed": 3}))
    for row in ROWS:
        run.log(row)
    assert run.metrics() == ROWS
    events = EventAccumulator(str(run.path)).Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("reward_mean")] == [(1, 0.25)]
    assert events.Tags()["scalars"] == ["eval_accuracy", "reward_mean"]
    options, *logged = wandb
    assert options["config"] == {"seed": 3} and options["resume"] == "allow" and options["id"].endswith("-run")
    assert logged == [({"eval_accuracy": 0.07}, 0), ({"reward_mean": 0.25}, 1)]


def test_without_wandb_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # what Python does where it is not installed
    with pytest.raises(RecipeError, match="pip install wandb"):
        WandB(tmp_path, {})


def test_a_wandb_that_does_not_start_says_why(tmp_path, wandb, monkeypatch):
    def refuses(**options):
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuses)
    with pytest.raises(RecipeError, match="no API key"):
        WandB(tmp_path, {})

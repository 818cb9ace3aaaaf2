"""Updates that are not finite are skipped and counted; five in a row end the run."""

import itertools
import math
from unittest import mock

import pytest
import torch
from helpers import fails, one_step, ragged_samples, random_model, sampler_that_is_off, take_step, trainer_for

import rl.grpo
from lab.checkpoint import state_tensors
from lab.runfolder import RunFolder
from lab.stages import train
from model import ModelError, generate
from model.sampler import TokenChoice, sample_completion, sample_tokens
from rl.grpo import grpo_loss
from rl.sft import sft_step
from rl.trainer import Trainer


def copies(trainer: Trainer) -> list[list]:
    """The weights and everything that the optimizer would save."""
    state = [tensor for _, tensor in state_tensors(trainer.optimizer)]
    return [tensor.tolist() for tensor in [*trainer.model.parameters(), *state]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("source", ["loss", "gradient", "sampler"])
def test_an_update_that_is_not_finite_is_skipped_and_counted(source, bad, monkeypatch):
    """It changes nothing, and the next one is taken."""
    trainer = trainer_for(random_model(), budget=30)
    sft_step(trainer, ragged_samples(3), 1e-2)  # so that the optimizer has a state
    before, take = [], trainer.optimizer.step

    def step(*arguments, **options):
        before.append(copies(trainer))
        return take(*arguments, **options)

    monkeypatch.setattr(trainer.optimizer, "step", step)
    if source == "loss":  # of one micro-batch of the first update; its gradient is finite
        errors = itertools.chain([0.0, bad], itertools.repeat(0.0))

        def loss(*arguments, **options):
            return grpo_loss(*arguments, **options) + next(errors)

        monkeypatch.setattr(rl.grpo, "grpo_loss", loss)
    if source == "gradient":
        trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * (1.0 if before else bad))
    if source == "sampler":  # a log-probability of the first group's first sample, first of the first update
        shift = mock.Mock(side_effect=itertools.chain([bad], itertools.repeat(0.0)))
        monkeypatch.setattr(rl.grpo, "collect_rollouts", sampler_that_is_off(shift))
    _, _, metrics = take_step(trainer, updates_per_step=2)
    assert metrics["skipped_updates"] == 1
    assert trainer.optimizer.skipped_in_a_row == 0
    first, second = before
    assert first == second
    assert second != copies(trainer)
    assert all(map(math.isfinite, metrics.values()))
    assert metrics["grad_norm"] > 0
    assert metrics["policy_entropy"] > 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sampler_whose_logits_are_not_finite_says_so(bad):
    model = random_model()
    with torch.no_grad():
        model.model.norm.weight[3] = bad
    with pytest.raises(ModelError, match="logits that are not finite"):
        generate(model, [[1, 2, 3]], max_new_tokens=4)
    with pytest.raises(ModelError, match="logits that are not finite"):
        list(sample_completion(model, [1, 2, 3], torch.rand(4), (), TokenChoice()))
    ids, logprobs = sample_tokens(torch.full((2, 7), bad), torch.tensor([0.1, 0.9]), 5, TokenChoice())
    assert ids.max() < 5
    assert logprobs.isnan().all()


def test_a_run_goes_on_past_faults_until_five_in_a_row(tmp_path, monkeypatch, capsys):
    """They are counted, and it ends with advice."""
    calls = itertools.count(1)

    def loss(*arguments, **options):
        fine = next(calls) in (1, 2, 5, 6)
        return grpo_loss(*arguments, **options) * (1.0 if fine else math.nan)

    monkeypatch.setattr(rl.grpo, "grpo_loss", loss)
    rewards = mock.Mock(side_effect=itertools.count())  # no two are equal
    monkeypatch.setattr("rl.rollout.reward_for", rewards)
    recipe = one_step(f"--out {tmp_path} --stages.0.steps 9")
    message = fails(capsys, lambda: train(recipe, quiet=True))
    assert "6 updates in a row" in message
    assert "learning rate" in message
    rows = RunFolder(tmp_path).metrics()
    assert [row["skipped_updates"] for row in rows[1:]] == [0, 2, 0, 2, 2, 2]
    for row in (rows[1], rows[3]):
        assert all(math.isfinite(value) for value in row.values() if isinstance(value, float))

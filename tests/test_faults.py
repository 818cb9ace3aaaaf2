"""Losses, gradients and log-probabilities that are not finite: left out, counted, kept for study, and the end if it goes on."""

import json
import math

import pytest
import torch
from helpers import learner, ragged_samples, random_model
from test_commands import smoke

import rl.grpo
import lab.steps
from model import generate
from model.sampler import sample
from lab.errors import user_errors
from rl.grpo import grpo_loss
from lab.recipe import RecipeError
from lab.runfolder import RunFolder
from rl.sft import sft_step
from lab.stages import train

BAD = [math.nan, math.inf, -math.inf]


def weights(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def unchanged(model, before) -> bool:
    return all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("bad", BAD)
def test_an_update_with_a_bad_gradient_changes_nothing_and_the_next_one_is_taken(bad):
    pupil = learner(random_model())
    samples = ragged_samples(3)
    sft_step(pupil, samples, 1e-2)
    before, state = weights(pupil.model), [t.clone() for _, t in pupil.optimizer.state_tensors()]
    handle = pupil.model.lm_head.weight.register_hook(lambda gradient: gradient * bad)
    found = sft_step(pupil, samples, 1e-2)
    assert found == {"loss": 0.0, "grad_norm": 0.0, "skipped_updates": 1, "tokens": found["tokens"]}
    assert unchanged(pupil.model, before) and all(p.grad is None for p in pupil.model.parameters())
    assert all(torch.equal(old, new) for old, (_, new) in zip(state, pupil.optimizer.state_tensors(), strict=True))
    assert pupil.faulty == samples and pupil.skipped_in_a_row == 1
    handle.remove()
    assert sft_step(pupil, samples, 1e-2)["skipped_updates"] == 0
    assert pupil.skipped_in_a_row == 0 and not unchanged(pupil.model, before)


@pytest.mark.parametrize("bad", BAD)
def test_only_the_micro_batch_with_a_bad_loss_is_kept(bad):
    """The log-probability that a sampler wrote down is what is bad here."""
    import lab.recipe
    from rl.grpo import accumulate_gradient

    pupil = learner(random_model(), budget=20)
    samples = ragged_samples(8)
    broken = samples[3]
    broken.old_logprobs[0] = bad
    before = weights(pupil.model)
    accumulate_gradient(pupil, samples, lab.recipe.GRPOStage())
    assert pupil.step(1e-2) is None and unchanged(pupil.model, before)
    assert broken in pupil.faulty and len(pupil.faulty) < 8


def test_bad_weights_still_sample_something():
    model = random_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    ((completion,),) = generate(model, [[1, 2, 3]], max_new_tokens=4)
    assert len(completion.token_ids) == 4 and all(map(math.isnan, completion.logprobs))
    ids, logprobs = sample(torch.full((2, 7), math.nan), torch.tensor([0.1, 0.9]), 5, 1.0)
    assert ids.max() < 5 and logprobs.isnan().all()


def faulty_run(tmp_path, monkeypatch, times: range, *overrides):
    """A small run whose losses are NaN in some of the updates."""
    updates = [0]

    def loss(*arguments, **options):
        updates[0] += 1
        return grpo_loss(*arguments, **options) * (math.nan if updates[0] in times else 1.0)

    monkeypatch.setattr(rl.grpo, "grpo_loss", loss)
    options = ["--out", tmp_path / "run", "--stages.0.steps", 6, "--optimizer.micro-batch-tokens", 10**6, *overrides]
    train(smoke(*options).recipe, quiet=True)


def test_a_run_goes_on_past_a_fault_counts_it_and_keeps_its_samples(tmp_path, monkeypatch, capsys):
    faulty_run(tmp_path, monkeypatch, range(3, 5))
    run = RunFolder(tmp_path / "run")
    rows = [row for row in run.metrics() if row["kind"] == "grpo" and row["step"]]
    assert sum(row["skipped_updates"] for row in rows) == 2
    assert all(math.isfinite(value) for row in run.metrics() for value in row.values() if isinstance(value, float))
    kept = sorted((run.path / "faults").iterdir())
    assert kept and json.loads(kept[0].read_text().splitlines()[0]).keys() >= {"prompt", "completion", "advantage", "logprobs"}


def test_too_many_faults_in_a_row_end_the_run_with_advice(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit_, user_errors():
        faulty_run(tmp_path, monkeypatch, range(3, 99), "--optimizer.max-skipped-updates", 3)
    message = capsys.readouterr().err
    assert exit_.value.code == 2 and message.count("\n") == 1
    assert "updates in a row" in message and "faults" in message and "learning rate" in message


def test_what_is_not_finite_is_null_in_metrics_and_nan_when_read(tmp_path):
    run = RunFolder(tmp_path)
    run.log({"step": 1, "kind": "grpo", "entropy": math.nan, "loss": -math.inf, "reward_mean": 0.5})
    assert json.loads(run.metrics_path.read_text()) == {
        "step": 1, "kind": "grpo", "entropy": None, "loss": None, "reward_mean": 0.5,
    }  # fmt: skip
    (row,) = run.metrics()
    assert math.isnan(row["entropy"]) and math.isnan(row["loss"]) and row["reward_mean"] == 0.5
    run.rewind(1)
    assert "null" in run.metrics_path.read_text()


def test_the_limit_must_be_a_number_of_updates():
    with pytest.raises(RecipeError, match="max_skipped_updates"):
        smoke("--optimizer.max-skipped-updates", 0)

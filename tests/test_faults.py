"""Losses, gradients and log-probabilities that are not finite: the update is skipped and counted; five in a row end the run."""

import math

import pytest
import torch
from helpers import PROBLEM, optimizer_for, ragged_samples, random_model

import rl.grpo
from data.task import CORRECT, WRONG
from lab.errors import user_errors
from lab.optimizer_state import state_tensors
from lab.runfolder import RunFolder
from lab.stages import train
from model import Completion, generate
from model.sampler import sample
from rl.grpo import GRPOStage, grpo_loss, grpo_step
from rl.rollout import Rollout, SamplingSettings
from rl.sft import sft_step
from train import parse

BAD = [math.nan, math.inf, -math.inf]


def copies(model, optimizer) -> list[torch.Tensor]:
    """The weights and everything that the optimizer would save."""
    state = [tensor for _, tensor in state_tensors(optimizer, model.dtype)]
    return [tensor.detach().clone() for tensor in [*model.parameters(), *state]]


def equal(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("bad", BAD)
def test_an_update_with_a_bad_gradient_changes_nothing_and_the_next_one_is_taken(bad):
    model, samples = random_model(), ragged_samples(3)
    optimizer = optimizer_for(model)
    sft_step(model, optimizer, samples, 1e-2)
    before = copies(model, optimizer)
    handle = model.lm_head.weight.register_hook(lambda gradient: gradient * bad)
    metrics = sft_step(model, optimizer, samples, 1e-2)
    assert metrics == {"loss": 0.0, "grad_norm": 0.0, "skipped_updates": 1, "tokens": metrics["tokens"]}
    assert equal(before, copies(model, optimizer)) and all(p.grad is None for p in model.parameters())
    assert optimizer.skipped_in_a_row == 1
    handle.remove()
    assert sft_step(model, optimizer, samples, 1e-2)["skipped_updates"] == 0
    assert optimizer.skipped_in_a_row == 0 and not equal(before, copies(model, optimizer))


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_log_probability_of_the_sampler_skips_only_the_update_that_has_it(bad, monkeypatch):
    good = Rollout(PROBLEM, [1, 2], Completion([3, 4], [-1.0, -2.0], True), "", CORRECT)
    groups = [[good, Rollout(PROBLEM, [1, 2], Completion([5], [logprob], True), "", WRONG)] for logprob in (-1.5, bad)]
    options = {"sampling": SamplingSettings(), "learning_rate": 1e-2, "seed": 0}
    ends = []
    for count in (1, 2):
        model = random_model()
        optimizer = optimizer_for(model)
        monkeypatch.setattr(rl.grpo, "collect_rollouts", lambda *_, count=count, **__: groups[:count])
        settings = GRPOStage(updates_per_step=count)  # a group each
        _, _, metrics = grpo_step(model, None, optimizer, None, [None] * count, settings=settings, **options)
        assert metrics["skipped_updates"] == count - 1 and all(map(math.isfinite, metrics.values()))
        ends.append(copies(model, optimizer))
    assert equal(*ends) and not equal(ends[0], copies(random_model(), optimizer))


def test_bad_weights_still_sample_something():
    model = random_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    ((completion,),) = generate(model, [[1, 2, 3]], max_new_tokens=4)
    assert len(completion.token_ids) == 4 and all(map(math.isnan, completion.logprobs))
    ids, logprobs = sample(torch.full((2, 7), math.nan), torch.tensor([0.1, 0.9]), 5, 1.0)
    assert ids.max() < 5 and logprobs.isnan().all()


def test_a_run_goes_on_past_a_fault_and_counts_it_and_five_in_a_row_end_it_with_advice(tmp_path, monkeypatch, capsys):
    losses = [0]

    def loss(*arguments, **options):
        losses[0] += 1
        return grpo_loss(*arguments, **options) * (1.0 if losses[0] in (1, 2, 5, 6) else math.nan)

    monkeypatch.setattr(rl.grpo, "grpo_loss", loss)
    options = ["--out", str(tmp_path), "--stages.0.steps", "9", "--optimizer.micro-batch-tokens", "1000000"]
    with pytest.raises(SystemExit) as exit_, user_errors():
        train(parse(["smoke", "--model", "tiny", *options]).recipe, quiet=True)
    message = capsys.readouterr().err
    assert exit_.value.code == 2 and message.count("\n") == 1
    assert "6 updates in a row" in message and "learning rate" in message
    rows = RunFolder(tmp_path).metrics()
    assert [row["skipped_updates"] for row in rows[1:]] == [0, 2, 0, 2, 2, 2]
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))

"""Supervised fine-tuning: the loss that transformers computes, every sample once, and the right traces."""

import math
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import largest_gap, ragged_samples, random_model, smoke, trainer_for, weights
from reference import reference_model, same_weights

import lab.run
import lab.stages
from data import Countdown, DataError, Problem
from data.load import endless_problems
from data.task import Task
from data.traces import Trace, load_traces, save_traces
from lab.checkpoint import TrainState, seen_by
from lab.recipe import Recipe, RecipeError, problems_of
from lab.runfolder import RunFolder
from lab.stages import traces_for, train
from model import Completion, Tokenizer
from model.weights import TINY
from rl.batch import Sample
from rl.rollout import Rollout
from rl.sft import SFTStage, sft_schedule, sft_step


@pytest.mark.parametrize("budget", [10_000, 30])
def test_loss_and_update_are_transformers_on_completion_tokens(budget):
    """Whatever the micro-batches; the update is torch's AdamW on the gradient of transformers' loss."""
    theirs = reference_model(vocab_size=48, tie_word_embeddings=True)
    ours, samples = same_weights(theirs), ragged_samples(6, seed=2)
    ids = torch.zeros(6, max(map(len, samples)), dtype=torch.int64)
    labels = torch.full(ids.shape, -100)
    for row, sample in enumerate(samples):
        start, end = len(sample.prompt_ids), len(sample)
        ids[row, :end] = torch.tensor(sample.prompt_ids + sample.completion_ids)
        labels[row, start:end] = ids[row, start:end]
    expected = theirs(ids, labels=labels).loss
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
    torch.optim.AdamW(theirs.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.0).step()

    result = sft_step(trainer_for(ours, budget), samples, learning_rate=1e-3)
    assert result == {
        "loss": pytest.approx(expected.item(), rel=1e-5), "grad_norm": pytest.approx(norm.item(), rel=1e-4),
        "tokens": sum(len(sample.completion_ids) for sample in samples), "skipped_updates": 0,
    }  # fmt: skip
    assert largest_gap(dict(ours.named_parameters()), dict(theirs.named_parameters())) < 1e-4


def test_an_update_that_is_not_finite_is_skipped():
    """The next one is taken."""
    model, samples = random_model(), ragged_samples(4)
    trainer, before = trainer_for(model), weights(model)
    hook = model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    assert sft_step(trainer, samples, 1e-2)["skipped_updates"] == 1
    assert largest_gap(weights(model), before) == 0
    hook.remove()
    losses = [sft_step(trainer, samples, 1e-2)["loss"] for _ in range(20)]
    assert losses[1] < losses[0]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("count, batch_size", [(10, 3), (8, 4), (3, 64)])
def test_every_epoch_visits_every_sample_once(count, batch_size):
    """Each epoch has its own order, made from the seed."""
    samples = [Sample([1], [number]) for number in range(count)]
    steps = sft_schedule(samples, batch_size, epochs=3, seed=7)
    assert len(steps) == 3 * math.ceil(count / batch_size)
    assert max(map(len, steps)) <= batch_size
    visited = [sample.completion_ids[0] for step in steps for sample in step]
    epochs = [visited[start : start + count] for start in (0, count, 2 * count)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    assert not epochs[0] == epochs[1] == epochs[2]
    assert sft_schedule(samples, batch_size, epochs=3, seed=7) == steps
    assert sft_schedule(samples, batch_size, epochs=3, seed=8) != steps


PROBLEMS = [Problem((2, 3, 5), 30), Problem((79, 60, 17), 36), Problem((1, 2, 3), 6)]
ANSWERS = ["2*3*5", "79-60+17", "1+2+3"]


@pytest.fixture
def recipe(tmp_path, monkeypatch) -> Recipe:
    """An SFT stage on one trace of each of PROBLEMS; its run draws no pictures, which take seconds."""
    monkeypatch.setattr(lab.run, "write_curve", lambda *_: None)
    monkeypatch.setattr(lab.run, "write_report", lambda *_: None)
    texts = [f"so\n</think>\n<answer>{answer}</answer>" for answer in ANSWERS]
    save_traces(tmp_path / "own.jsonl", map(Trace, PROBLEMS, texts))
    stage = SFTStage(traces=str(tmp_path / "own.jsonl"), batch_size=1, epochs=2, learning_rate=6e-3)
    options = "--sampling.max-new-tokens 8 --evaluation.problems 1 --evaluation.final-problems 0"
    return replace(smoke("--out", tmp_path / "run", options), stages=(stage,))


@pytest.fixture
def steps(monkeypatch) -> mock.Mock:
    """`sft_step`, which is not taken; its calls can be looked at."""
    steps = mock.Mock(return_value={"loss": 1.0, "grad_norm": 1.0, "tokens": 1})
    monkeypatch.setattr(lab.stages, "sft_step", steps)
    return steps


def test_traces_of_held_out_problems_are_left_out(recipe, tmp_path):
    """In any order of their numbers: 17, 79, 60 -> 36 is the problem of the second trace."""
    run = SimpleNamespace(recipe=recipe, folder=RunFolder(tmp_path), state=TrainState())
    run.held_out = [Problem((17, 79, 60), 36)]
    assert [trace.problem for trace in traces_for(run)] == PROBLEMS[::2]
    run.held_out = PROBLEMS
    with pytest.raises(DataError, match="held-out"):
        traces_for(run)


def test_a_cold_start_learns_right_worked_solutions(recipe, steps):
    """GRPO begins with other problems; held-out ones and the prompts' examples are not among them."""
    stage = SFTStage(traces="worked", max_traces=40, batch_size=10, epochs=1)
    sampling = replace(recipe.sampling, examples=2)
    recipe = replace(recipe, stages=(stage,), generated_problems=100, sampling=sampling)
    train(recipe, quiet=True)
    task = recipe.task
    traces = load_traces(
        RunFolder(recipe.out).path / "worked.jsonl",
        task.problem_from_row,
        lambda text, problem: task.score(text, problem).outcome == "correct",
    )
    problems = problems_of(recipe, seen_by(recipe.model))[0]  # without the held-out ones and the examples
    later = endless_problems(problems, recipe.seed, 0, len(problems))[-40:]
    assert {trace.problem for trace in traces} == set(later)
    learned = [sample.completion_ids for call in steps.call_args_list for sample in call.args[1]]
    expected = {trace.completion + "<|im_end|>" for trace in traces}
    assert set(map(Tokenizer(TINY).decode, learned)) == expected


def test_a_task_without_solutions_is_refused_before_any_step(recipe, monkeypatch):
    monkeypatch.setattr(Countdown, "work_out", Task.work_out)
    with pytest.raises(RecipeError, match="stages.0.traces: countdown cannot write worked solutions"):
        train(replace(recipe, stages=(SFTStage(traces="worked"),)), quiet=True)
    assert not RunFolder(recipe.out).metrics()


def test_a_step_learns_prompt_trace_and_end_of_turn(recipe, steps):
    """The learning rate falls linearly to zero."""
    train(recipe, quiet=True)
    *_, samples, rates = zip(*(call.args for call in steps.call_args_list))
    assert rates == pytest.approx([6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3])
    decode = Tokenizer(TINY).decode
    learned = {decode(sample.completion_ids): decode(sample.prompt_ids) for (sample,) in samples}
    for problem, answer in zip(PROBLEMS, ANSWERS):
        prompt = learned[f"so\n</think>\n<answer>{answer}</answer><|im_end|>"]
        assert prompt.endswith(recipe.task.prompt(problem) + "<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert all(not sample.old_logprobs and sample.advantage == 0 for (sample,) in samples)


def test_checkpoints_take_their_share_of_the_time(recipe, monkeypatch):
    """Short steps are evaluated four times.

    Steps take 10 s and checkpoints 2 s: number k + 1 comes where 2 k + 2 <= 0.05 (10 step + 2 k), and one at
    the end.
    """
    clock, saved = [0.0], []

    def step(*arguments, cancel) -> dict:
        clock[0] += 10
        return {"loss": 1.0, "grad_norm": 1.0, "tokens": 1}

    def save(folder, model, tokenizer, optimizer, state, recipe) -> None:
        clock[0] += 2
        saved.append(state.step)

    monkeypatch.setattr(lab.run, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    monkeypatch.setattr(lab.stages, "sft_step", step)
    monkeypatch.setattr(lab.run, "save_checkpoint", save)
    stages = (replace(recipe.stages[0], epochs=10),)
    evaluation = replace(recipe.evaluation, every=1)
    train(replace(recipe, stages=stages, evaluation=evaluation, checkpoint_share=0.05), quiet=True)
    assert saved == [1, 8, 12, 16, 20, 23, 27, 30]
    rows = RunFolder(recipe.out).metrics()
    assert [row["step"] for row in rows if "eval_accuracy" in row] == [0, 8, 16, 24, 30]
    assert rows[-1]["checkpoint_seconds"] == 2 * 7


def test_only_finished_correct_rollouts_become_traces(tmp_path):
    """U+0085 and U+2028 end a line for some readers of text; a completion may well contain them."""
    run = RunFolder(tmp_path)
    run.create(Recipe(), {})
    correct = Rollout(PROBLEMS[0], [1], Completion([2], [-1.0], True), "b", "correct", 1.0)
    odd = replace(correct, text="so\n\r\x85\u2028\u2029\x1e</think>")
    near = replace(correct, outcome="near")
    cut = replace(correct, completion=Completion([2], [-1.0], False))
    run.save_rollouts(3, 0, [[odd, near, cut, correct]], torch.zeros(1, 4))
    run.save_rollouts(4, 2, [[correct]], torch.zeros(1, 1))  # of another stage
    run.save_rollouts(10, 0, [[replace(correct, text="c")]], torch.zeros(1, 1))
    for step, stage in ((3, 0), (4, 2), (10, 0)):
        run.log({"step": step, "stage": stage})
    expected = [Trace(PROBLEMS[0], text, step) for text, step in ((odd.text, 3), ("b", 3), ("c", 10))]
    assert run.correct_traces(0, Countdown()) == expected

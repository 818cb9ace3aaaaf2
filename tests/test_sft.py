"""Supervised fine-tuning: the loss that transformers computes, every sample once an epoch, the stop token included."""

import json

import numpy as np
import pytest
import torch
from helpers import gradients, largest, largest_gap, learner, ragged_samples, random_model
from reference import reference_model, same_weights

from data import DataError, Problem
from data.traces import Trace
from model import Completion, Tokenizer
from model.weights import TINY
from rl.batch import Sample, completion_logprobs, make_batch
from lab.checkpoint import Progress
from rl.grpo import group_samples
from lab.lab import Lab
from rl.learner import Learner
from rl.optimizer import Optimizer
from lab.recipe import OptimizerSettings, Recipe, SFTStage
from rl.rollout import Rollout
from lab.runfolder import RunFolder
from rl.sft import sft_schedule, sft_step
from lab.steps import sft_stage
from data import Countdown
from data.task import Score

END = 1


def test_loss_and_gradient_equal_transformers_cross_entropy_over_completion_tokens_only():
    theirs = reference_model(vocab_size=48, tie_word_embeddings=True)
    ours = same_weights(theirs)
    samples = ragged_samples(6, seed=2)
    longest = max(map(len, samples))
    ids = torch.zeros(6, longest, dtype=torch.int64)
    labels = torch.full((6, longest), -100)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.tensor(sample.prompt_ids + sample.completion_ids)
        labels[row, len(sample.prompt_ids) : len(sample)] = torch.tensor(sample.completion_ids)
    expected = theirs(ids, labels=labels).loss
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1e9)

    result = sft_step(learner(ours, 30), samples, learning_rate=0.0)
    assert result["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert result["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert result["tokens"] == sum(len(sample.completion_ids) for sample in samples)


def test_a_step_does_not_depend_on_micro_batches():
    samples = ragged_samples(10, seed=5)
    outcomes = []
    for budget in (10_000, 40, 1):
        model = random_model()
        result = sft_step(learner(model, budget), samples, learning_rate=1e-3)
        outcomes.append((result, {name: p.detach() for name, p in model.named_parameters()}))
    for result, weights in outcomes[1:]:
        assert result == pytest.approx(outcomes[0][0], rel=1e-5)
        assert largest_gap(weights, outcomes[0][1]) < 1e-4


def test_prompts_have_no_loss():
    """The same completion behind another prompt of the same ids but the last: only the conditioning changes."""
    model = random_model(dtype=torch.float64)
    batch = make_batch([Sample([5, 6, 7], [8])])
    completion_logprobs(model, batch).sum().backward()
    whole = gradients(model)
    ids = torch.tensor([[5, 6, 7]])
    model(ids)[0, 2].log_softmax(-1)[8].backward()
    assert largest_gap(gradients(model), whole) < 1e-6 * largest(whole)


@pytest.mark.parametrize("count, batch_size", [(10, 3), (8, 4), (3, 64)])
def test_every_epoch_visits_every_sample_once_in_an_order_of_its_own(count, batch_size):
    samples = [Sample([1], [number]) for number in range(count)]
    steps = sft_schedule(samples, batch_size, epochs=3, seed=7)
    per_epoch = -(-count // batch_size)
    assert len(steps) == 3 * per_epoch and all(1 <= len(step) <= batch_size for step in steps)
    orders = []
    for epoch in range(3):
        visited = [sample for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for sample in step]
        orders.append([sample.completion_ids[0] for sample in visited])
        assert sorted(orders[-1]) == list(range(count))
    assert len({tuple(order) for order in orders}) > 1


def test_the_schedule_is_made_from_the_seed_alone():
    samples = [Sample([1], [number]) for number in range(20)]
    np.random.seed(0)
    first = sft_schedule(samples, 4, 2, seed=7)
    np.random.seed(1)
    assert sft_schedule(samples, 4, 2, seed=7) == first
    assert sft_schedule(samples, 4, 2, seed=8) != first


def test_steps_lower_the_loss():
    model, samples = random_model(), ragged_samples(8)
    pupil = learner(model)
    losses = [sft_step(pupil, samples, 1e-2)["loss"] for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]
    assert losses[1] < losses[0]


def test_the_end_token_is_learned_where_completions_end_and_nowhere_else():
    """Completions of 1, 2 or 3 times the prompt's token, as told by the prompt, then the end token."""
    model = random_model()
    samples = [Sample([10 + n, 20], [30] * n + [END]) for n in (1, 2, 3)]
    pupil = learner(model)
    for _ in range(60):
        sft_step(pupil, samples, 1e-2)
    for sample in samples:
        ids = torch.tensor([sample.prompt_ids + sample.completion_ids])
        ending = model(ids)[0].softmax(-1)[:, END]
        assert ending[-2] > 0.9 and (ending[1:-2] < 0.1).all()


PROBLEMS = [Problem((2, 3, 5), 30), Problem((79, 60, 17), 36), Problem((1, 2, 3), 6)]
ANSWERS = ["2*3*5", "79-60+17", "1+2+3"]


class TraceStage:
    """An sft stage over one trace of each of PROBLEMS; `learned` collects the samples that it takes steps on."""

    def __init__(self, tmp_path, monkeypatch, held_out=(), max_grad_norm=1.0, **stage):
        rows = [
            {"numbers": p.numbers, "target": p.target, "completion": f"so\n</think>\n<answer>{answer}</answer>"}
            for p, answer in zip(PROBLEMS, ANSWERS, strict=True)
        ]
        path = tmp_path / "traces.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        stage = SFTStage(traces=str(path), **stage)
        recipe = Recipe(stages=(stage,), optimizer=OptimizerSettings(max_grad_norm=max_grad_norm))
        self.tokenizer, self.learned = Tokenizer(TINY), []

        def recording_step(pupil, samples, rate):
            self.learned += samples
            return sft_step(pupil, samples, rate)

        monkeypatch.setattr("lab.steps.sft_step", recording_step)
        self.model = random_model(vocab_size=512)
        lab = Lab(recipe, self.model, self.tokenizer, [], list(held_out), RunFolder(tmp_path), 8192)
        pupil = Learner(self.model, Optimizer(self.model), recipe, lab.micro_batch_tokens)
        take_step, steps = sft_stage(lab, stage, pupil, Progress())
        self.rows = [take_step(Progress(stage_step=step)) for step in range(steps)]


def test_traces_of_held_out_problems_are_not_learned_trap_traces_leak_into_evaluation(tmp_path, monkeypatch):
    """In any order of their numbers: 17, 79, 60 -> 36 is the problem of the second trace."""
    stage = TraceStage(tmp_path, monkeypatch, [Problem((17, 79, 60), 36)], epochs=1)
    learned = [stage.tokenizer.decode(sample.completion_ids) for sample in stage.learned]
    assert len(learned) == 2 and not any("79-60+17" in text for text in learned)
    with pytest.raises(DataError, match="held-out"):
        TraceStage(tmp_path, monkeypatch, PROBLEMS)


def test_samples_of_traces_are_prompt_then_completion_then_end_of_turn(tmp_path, monkeypatch):
    stage = TraceStage(tmp_path, monkeypatch, epochs=1)
    decode = stage.tokenizer.decode
    assert len(stage.learned) == 3
    for sample in stage.learned:
        prompt, completion = decode(sample.prompt_ids), decode(sample.completion_ids)
        problem = next(p for p, answer in zip(PROBLEMS, ANSWERS, strict=True) if answer in completion)
        assert f"numbers {', '.join(map(str, problem.numbers))} exactly" in prompt and prompt.endswith("<think>\n")
        assert completion.startswith("so\n</think>") and completion.endswith("</answer><|im_end|>")
        assert sample.completion_ids[-1] == stage.tokenizer.end_of_turn_id
        assert sample.old_logprobs is None and sample.advantage == 0


def test_the_sft_rate_falls_linearly_to_zero_over_the_stage(tmp_path, monkeypatch):
    stage = TraceStage(tmp_path, monkeypatch, batch_size=1, epochs=2, learning_rate=6e-3)
    assert [row["lr"] for row in stage.rows] == pytest.approx([6e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3])


def test_gradients_are_clipped_to_the_recipes_norm(tmp_path, monkeypatch):
    """A norm far below Adam's epsilon makes almost nothing of a step; without a clip, weights move by the rate."""
    before = dict(random_model(vocab_size=512).named_parameters())
    moved = []
    for max_grad_norm in (1e9, 1e-12):
        stage = TraceStage(tmp_path, monkeypatch, max_grad_norm=max_grad_norm, epochs=1, learning_rate=1e-2)
        moved.append(largest_gap(before, dict(stage.model.named_parameters())))
    assert moved[0] == pytest.approx(1e-2, rel=1e-2) and moved[1] < 1e-5


def test_only_finished_correct_rollouts_of_the_stage_become_traces_whatever_characters_they_hold(tmp_path):
    """U+0085 and U+2028 end a line for some readers of text; a completion may well contain them."""
    run = RunFolder(tmp_path)
    run.create(Recipe())

    def rollout(text, outcome="correct", finished=True):
        reward = float(outcome == "correct")
        return Rollout(PROBLEMS[0], [1], Completion([2], [-1.0], finished), text, Score(reward, outcome))

    def save(step, stage, *groups):
        run.save_rollouts(step, stage, groups, group_samples(groups))

    odd = "so\n\r\x85\u2028\u2029\x1e</think>"
    save(3, 0, [rollout(odd), rollout("near", "near")], [rollout("cut", finished=False), rollout("b")])
    save(4, 2, [rollout("of another stage")])
    save(10, 0, [rollout("c")])
    expected = [(odd, 3), ("b", 3), ("c", 10)]
    assert run.correct_traces(0, Countdown()) == [Trace(PROBLEMS[0], text, step) for text, step in expected]

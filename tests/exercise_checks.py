"""What the solutions of docs/exercises.md promise; tests/test_exercises.py runs it in trees that have them.

Values worked out by hand, or runs of the smallest size. What only a solution defines is imported where it is
used.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import PROBLEM, smoke

import lab.run
from data import Countdown, Problem, score
from data.load import read_jsonl
from data.task import CORRECT, WRONG
from lab.recipe import Recipe, load_recipe
from lab.runfolder import RunFolder
from lab.stages import train
from model import Completion, load_model
from rl.advantage import group_advantages
from rl.grpo import GRPOStage
from rl.reward import RewardSettings, reward_for


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take seconds, and are not checked here."""
    monkeypatch.setattr(lab.run, "write_curve", lambda *_: None)
    monkeypatch.setattr(lab.run, "write_report", lambda *_: None)


def small(recipe: Recipe, out: Path, stages: int = 1, **changes) -> Recipe:
    """The first `stages` of a recipe with the bundled model; those of GRPO have one step unless changed."""
    sizes = {"steps": 1, "prompts_per_step": 4, "samples_per_prompt": 8} | changes
    shrunk = []
    for stage in recipe.stages[:stages]:
        shrunk.append(replace(stage, **sizes) if stage.kind == "grpo" else replace(stage, epochs=1))
    options = "--generated-problems 60 --evaluation.problems 4 --evaluation.final-problems 0"
    settings = smoke("--out", out, options, "--keep-checkpoints 3 --sampling.max-new-tokens 64")
    return replace(settings, task=recipe.task, stages=tuple(shrunk))


def run(recipe: Recipe, resume: bool = False) -> list[dict]:
    """The metrics of a run; the first row is from before any step."""
    train(recipe, resume, quiet=True)
    return RunFolder(recipe.out).metrics()


def rollouts(recipe: Recipe) -> list[list[dict]]:
    """The rollouts of a run, [step][sample]."""
    return [[row for _, row in read_jsonl(path, "")] for path in RunFolder(recipe.out).rollout_files()]


@pytest.mark.parametrize(
    ("answer", "reward"),
    [("79-60+17", 1.0), ("79-60-17+0", 0.1), ("79+60+17", 0.2), ("79+60", 0.1), ("no", 0.1)],
)
def test_every_number_once(answer, reward):
    assert score(f"so</think><answer>{answer}</answer>", PROBLEM).reward == reward


def test_every_number_once_earns_no_less_than_a_larger_miss():
    near = score("so</think><answer>79-60+17</answer>", Problem((79, 60, 17), 37))
    assert reward_for(near, "", Completion([], [], True), RewardSettings(near_miss=False)) == 0.2


@pytest.mark.parametrize(
    ("verdict", "tokens", "text", "expected"),
    [
        (CORRECT, 64, "79", 1.3),
        (CORRECT, 300, "79", 1.0),  # a long completion loses nothing
        (WRONG, 64, "79", 0.1),
        (CORRECT, 64, "七", 0.0),
    ],
)
def test_length_bonus(verdict, tokens, text, expected):
    settings = RewardSettings(length_bonus=0.4, latin_only=True)
    completion = Completion([5] * tokens, [-0.5] * tokens, True)
    assert reward_for(verdict, text, completion, settings) == pytest.approx(expected)
    assert RewardSettings().length_bonus == 0.0


def test_kl_is_no_penalty_before_the_policy_leaves_its_reference(tmp_path):
    recipe = load_recipe("256-kl")[1]
    assert {stage.kl_coef for stage in recipe.stages if stage.kind == "grpo"} == {0.04}
    losses = []
    for coef in (0.04, 0.0):
        rows = run(small(recipe, tmp_path / str(coef), steps=2, updates_per_step=1, kl_coef=coef))
        losses.append([row["loss"] for row in rows[1:]])
    first, second = (abs(a - b) for a, b in zip(*losses))
    assert first < 1e-7 < second


def test_leave_one_out_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.4], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    by_hand = [1 - 0.4 / 3, -1.4 / 3, -1.4 / 3, 0.4 - 1 / 3]
    advantages = group_advantages(rewards, scale_by_std=False, leave_one_out=True)
    torch.testing.assert_close(advantages, torch.tensor([by_hand, [0.0] * 4], dtype=torch.float64))
    assert group_advantages(torch.tensor([[1.0]]), leave_one_out=True).tolist() == [[0.0]]
    assert not GRPOStage().leave_one_out


def test_leave_one_out_scales_the_advantages_of_groups_of_eight(tmp_path):
    recipe = load_recipe("smoke")[1]
    plain = small(recipe, tmp_path / "plain", updates_per_step=1)
    others = small(recipe, tmp_path / "others", updates_per_step=1, leave_one_out=True)
    norm = run(plain)[1]["grad_norm"]
    assert norm > 0
    assert run(others)[1]["grad_norm"] == pytest.approx(norm * 8 / 7, rel=1e-4)


def test_stage_order(tmp_path):
    recipe = load_recipe("256-loops")[1]
    assert [stage.kind for stage in recipe.stages] == ["grpo", "sft"] * 3
    assert sum(stage.steps for stage in recipe.stages if stage.kind == "grpo") == 180
    rows = run(small(recipe, tmp_path, stages=3, prompts_per_step=8))
    kinds = dict.fromkeys((row["stage"], row["kind"]) for row in rows[1:])
    assert list(kinds) == [(0, "grpo"), (1, "sft"), (2, "grpo")]


def test_curriculum_orders_problems():
    from data.load import easiest

    sums = [Problem((1, 2, 3), 6), Problem((1, 2, 4), 7)]
    others = [Problem((1, 2, 3, 4), 10), Problem((11, 12, 3), 36)]  # the latter needs a product
    assert easiest([others[0], sums[0], others[1], sums[1]], Countdown().difficulty) == sums


def test_curriculum_of_a_run_and_of_one_that_is_resumed(tmp_path):
    recipe = small(load_recipe("smoke")[1], tmp_path, steps=3, easy_steps=2)
    run(recipe)
    sampled = rollouts(recipe)
    classes = []
    for rows in sampled:
        problems = map(recipe.task.problem_from_row, rows)
        classes.append(set(map(recipe.task.difficulty, problems)))
    assert classes[0] == classes[1] == {"3 numbers, + and - suffice"}
    assert len(classes[2]) > 1
    for number in (2, 3):
        shutil.rmtree(tmp_path / f"checkpoints/step_{number:04d}")
    run(recipe, resume=True)
    assert rollouts(recipe) == sampled


def test_sorting(tmp_path):
    from data.sorting import Sorting, Unsorted

    task, problem = Sorting(), Unsorted((7, 3, 12))
    for text in (task.solution(problem), "3, 7, 12", "3 7 12"):
        assert task.score(f"</think><answer>{text}</answer>", problem) == CORRECT
    for text in ("7, 3, 12", "٣, 7, 12", "x"):
        assert task.score(f"</think><answer>{text}</answer>", problem).outcome == "wrong"
    assert task.problem_from_row(problem.row()) == task.parse_input("7 3,12") == problem
    assert problem.key == Unsorted((12, 7, 3)).key
    problems = task.generate(300, seed=1)
    assert problems == task.generate(300, seed=1)
    assert len({problem.key for problem in problems}) == 300
    assert run(small(load_recipe("sorting")[1], tmp_path))[1]["tokens"] > 0


def test_int8_rollout(tmp_path):
    from model.quantize import int8_copy

    exact = small(load_recipe("smoke")[1], tmp_path / "exact")
    rounded = replace(exact, out=str(tmp_path / "rounded"), sampling=replace(exact.sampling, int8=True))
    assert run(exact)[1]["log_ratio_std"] < 1e-4 < run(rounded)[1]["log_ratio_std"] < 1
    model = load_model("tiny-256")[0]
    assert model.graphed
    assert not int8_copy(model).graphed  # no CUDA graph around the copy's kernels; the policy stays exact

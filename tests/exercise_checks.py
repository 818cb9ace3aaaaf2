"""What the solutions of docs/exercises.md promise; tests/test_exercises.py runs it in a patched tree.

Run by tests/test_exercises.py in a patched tree.

`PYTHONPATH=. python tests/exercise_checks.py 2 6` checks these two, whose solutions must be in the tree, and
prints {exercise: what went wrong, or null} as JSON. Values worked out by hand, or a run of the smallest size.
What only a solution defines is imported where it is used.
"""

import json
import shutil
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from helpers import PROBLEM

import lab.run
import lab.stages
from data import Countdown, Problem, score
from data.task import CORRECT, WRONG, Score
from lab.recipe import EvaluationSettings, Recipe, load_recipe
from lab.runfolder import RunFolder
from model import Completion, load_model
from rl.advantage import group_advantages
from rl.grpo import GRPOStage
from rl.reward import RewardSettings, reward_for


def shrunk(recipe: Recipe, out: str, sampling: dict | None = None, **stage_changes) -> Recipe:
    """`recipe` for the bundled model at the smallest size; GRPO stages have one step unless changed."""
    small = {"steps": 1, "prompts_per_step": 4, "samples_per_prompt": 8} | stage_changes
    stages = tuple(replace(s, **small) if s.kind == "grpo" else replace(s, epochs=1) for s in recipe.stages)
    return replace(
        recipe, model="tiny-256", problems="generated", generated_problems=60, out=out, checkpoint_every=1,
        stages=stages, sampling=replace(recipe.sampling, max_new_tokens=64, **sampling or {}),
        evaluation=EvaluationSettings(problems=4),
    )  # fmt: skip


def run(recipe: Recipe, resume: bool = False) -> list[dict]:
    """The metrics of a run, each GRPO step's with its `rollouts`."""
    lab.stages.train(recipe, resume, quiet=True)
    rows = RunFolder(recipe.out).metrics()
    for row in rows:
        path = Path(recipe.out) / "rollouts" / f"step_{row['step']:04d}.jsonl"
        row["rollouts"] = (
            [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        )
    return rows


def small(recipe: Recipe, stages: int = 1, **changes) -> list[dict]:
    """The metrics of the first `stages` of a recipe, shrunk; the first row is from before any step."""
    with tempfile.TemporaryDirectory() as folder:
        return run(shrunk(replace(recipe, stages=recipe.stages[:stages]), folder, **changes))


def every_number_once() -> None:
    def of(answer: str) -> float:
        return score(f"so</think><answer>{answer}</answer>", PROBLEM).reward

    assert (of("79-60+17"), of("79-60-17+0"), of("79+60+17"), of("79+60"), of("no")) == (
        1.0,
        0.1,
        0.2,
        0.1,
        0.1,
    )
    near = score("so</think><answer>79-60+17</answer>", Problem((79, 60, 17), 37))
    assert reward_for(near, "", Completion([], [], True), RewardSettings(near_miss=False)) == 0.2, (
        "no less than for a larger miss"
    )


def length_bonus() -> None:
    settings = RewardSettings(length_bonus=0.4, latin_only=True)

    def reward(verdict: Score, tokens: int, text: str = "79") -> float:
        return reward_for(verdict, text, Completion([5] * tokens, [-0.5] * tokens, True), settings)

    assert (reward(CORRECT, 64), reward(CORRECT, 128)) == (1.0 + 0.4 * 0.75, 1.0 + 0.4 * 0.5)
    assert reward(CORRECT, 256) == reward(CORRECT, 300) == 1.0, "a long completion loses nothing"
    assert (reward(WRONG, 64), reward(CORRECT, 64, text="七")) == (0.1, 0.0), (
        "only a correct completion earns it"
    )
    assert RewardSettings().length_bonus == 0.0


def kl() -> None:
    recipe = load_recipe("256-kl")[1]
    assert {stage.kl_coef for stage in recipe.stages if stage.kind == "grpo"} == {0.04}
    with_kl, without = (small(recipe, steps=2, updates_per_step=1, kl_coef=coef) for coef in (0.04, 0.0))
    gaps = [abs(a["loss"] - b["loss"]) for a, b in zip(with_kl[1:], without[1:], strict=True)]
    assert gaps[0] < 1e-7 < gaps[1], f"{gaps}: no penalty before the policy has left its reference"


def leave_one_out() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.4], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    by_hand = [1 - 0.4 / 3, -1.4 / 3, -1.4 / 3, 0.4 - 1 / 3]
    advantages = group_advantages(rewards, scale_by_std=False, leave_one_out=True)
    torch.testing.assert_close(advantages, torch.tensor([by_hand, [0.0] * 4], dtype=torch.float64))
    assert group_advantages(torch.tensor([[1.0]]), leave_one_out=True).tolist() == [[0.0]]
    assert not GRPOStage().leave_one_out
    plain, others = (
        small(load_recipe("smoke")[1], updates_per_step=1, leave_one_out=on)[1] for on in (False, True)
    )
    assert plain["grad_norm"] > 0 and abs(others["grad_norm"] / plain["grad_norm"] - 8 / 7) < 1e-4, (
        "groups of 8"
    )
    for a, b in zip(plain["rollouts"], others["rollouts"], strict=True):
        assert abs(b["advantage"] - a["advantage"] * 8 / 7) < 2e-4, "rounded to four digits in the record"


def stage_order() -> None:
    recipe = load_recipe("256-loops")[1]
    assert [stage.kind for stage in recipe.stages] == ["grpo", "sft"] * 3
    assert sum(stage.steps for stage in recipe.stages if stage.kind == "grpo") == 180
    rows = small(recipe, stages=3, prompts_per_step=8)
    kinds = [(row["stage"], row["kind"]) for row in rows[1:]]
    assert list(dict.fromkeys(kinds)) == [(0, "grpo"), (1, "sft"), (2, "grpo")], kinds


def curriculum() -> None:
    from data.load import easiest

    problems = [
        Problem((1, 2, 3, 4), 10),
        Problem((1, 2, 3), 6),
        Problem((11, 12, 3), 36),
        Problem((1, 2, 4), 7),
    ]
    difficulty = Countdown().difficulty  # the third needs a product
    assert easiest(problems, difficulty) == [problems[1], problems[3]]
    with tempfile.TemporaryDirectory() as folder:
        recipe = load_recipe("smoke")[1]
        recipe = replace(recipe, stages=recipe.stages[:1], keep_checkpoints=3)
        recipe = shrunk(recipe, folder, steps=3, easy_steps=2)
        rows = run(recipe)
        classes = [
            {difficulty(Problem(r["numbers"], r["target"])) for r in row["rollouts"]} for row in rows[1:]
        ]
        assert classes[0] == classes[1] == {"3 numbers, + and - suffice"} and len(classes[2]) > 1, classes
        for number in (2, 3):
            shutil.rmtree(f"{folder}/checkpoints/step_{number:04d}")
        again = run(recipe, resume=True)
        assert [row["rollouts"] for row in again] == [row["rollouts"] for row in rows], (
            "resumed after the first step"
        )


def sorting() -> None:
    from data.sorting import Sorting, Unsorted

    task, problem = Sorting(), Unsorted((7, 3, 12))
    for text, outcome in (
        ("3, 7, 12", "correct"),
        ("3 7 12", "correct"),
        ("7, 3, 12", "wrong"),
        ("٣, 7, 12", "wrong"),
        ("x", "wrong"),
    ):
        assert task.score(f"</think><answer>{text}</answer>", problem).outcome == outcome, text
    assert task.problem_from_row(problem.row()) == problem
    assert task.solution(problem) == "3, 7, 12"
    assert task.parse_input("7 3,12") == problem
    assert problem.key == Unsorted((12, 7, 3)).key
    problems = task.generate(300, seed=1)
    assert problems == task.generate(300, seed=1)
    assert len({problem.key for problem in problems}) == 300
    recipe = load_recipe("sorting")[1]
    rows = small(replace(recipe, optimizer=load_recipe("smoke")[1].optimizer))
    assert rows[1]["tokens"] > 0


def int8_rollout() -> None:
    from model.quantize import int8_copy

    recipe = load_recipe("smoke")[1]
    exact, rounded = small(recipe)[1], small(recipe, sampling={"int8": True})[1]
    assert exact["log_ratio_std"] < 1e-4 < rounded["log_ratio_std"] < 1, (exact, rounded)
    model = load_model("tiny-256")[0]
    assert model.graphed and not int8_copy(model).graphed, (
        "no CUDA graph around the copy's kernels; the policy stays exact"
    )


CHECKS = (every_number_once, length_bonus, kl, leave_one_out, stage_order, curriculum, sorting, int8_rollout)

if __name__ == "__main__":
    torch.set_num_threads(1)
    lab.run.write_curve = lab.run.write_report = lambda *_: (
        None
    )  # plots take seconds, and are not checked here
    errors = {}
    for number in map(int, sys.argv[1:]):
        try:
            CHECKS[number - 1]()
            errors[number] = None
        except Exception:
            errors[number] = traceback.format_exc()
    assert Path.cwd() == Path(lab.stages.__file__).parent.parent, "not the patched tree"
    print(json.dumps(errors))

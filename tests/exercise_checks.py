"""What the solutions of docs/exercises.md promise, each in a function; run by tests/test_exercises.py in a patched tree.

`python exercise_checks.py` prints {exercise: what went wrong, or null} as JSON. Hand-worked values where there are any, else
a run of the smallest size.
"""

import json
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from tasks.sorting import Heap, Sorting

from data import Problem
from model import Completion
from rl.advantage import group_advantages
from rl.problems import easiest
from rl.recipe import EvaluationSettings, GRPOStage, Recipe
from rl.recipe_file import load_recipe
from rl.reward import RewardSettings, Score, score
from rl.rollout import Rollout, paid
from rl.runfolder import RunFolder
from rl.stages import train

PROBLEM = Problem((79, 60, 17), 36)


def small(recipe: Recipe, **changes) -> list[dict]:
    """The metrics of a run of `recipe` on the embedded model, each stage cut to a step."""
    with tempfile.TemporaryDirectory() as folder:
        stages = tuple(
            replace(stage, steps=1, prompts_per_step=4, samples_per_prompt=8, **changes.get("stage", {}))
            if isinstance(stage, GRPOStage)
            else replace(stage, epochs=1, **changes.get("sft", {}))
            for stage in recipe.stages
        )
        sampling = replace(recipe.sampling, max_new_tokens=64, **changes.get("sampling", {}))
        recipe = replace(
            recipe, model="tiny", problems="generated", generated_problems=60, out=folder, stages=stages, sampling=sampling,
            evaluation=EvaluationSettings(problems=4),
        )  # fmt: skip
        train(recipe, quiet=True)
        return RunFolder(folder).metrics()


def every_number_once() -> None:
    def of(answer: str) -> float:
        return score(f"so</think><answer>{answer}</answer>", PROBLEM).reward

    assert (of("79-60+17"), of("79-60-17+0"), of("79+60+17"), of("79+60"), of("no")) == (1.0, 0.1, 0.2, 0.1, 0.1)


def length_bonus() -> None:
    def rollout(outcome: str, tokens: int) -> Rollout:
        completion = Completion([0] * tokens, [0.0] * tokens, True)
        return Rollout(PROBLEM, [1], completion, "", Score({"correct": 1.0, "wrong": 0.1}[outcome], outcome))

    groups = [[rollout("correct", 10), rollout("correct", 40)], [rollout("wrong", 10), rollout("correct", 30)]]
    rewards = [[r.score.reward for r in group] for group in paid(groups, RewardSettings(length_bonus=0.4))]
    assert rewards == [[1.3, 1.0], [0.1, 1.1]], rewards
    assert [[r.score for r in group] for group in paid(groups, RewardSettings())] == [[r.score for r in g] for g in groups]


def kl() -> None:
    recipe = load_recipe("256-kl")[1]
    assert {stage.kl_coef for stage in recipe.stages if stage.kind == "grpo"} == {0.04}
    first = replace(recipe, stages=recipe.stages[:1])
    with_kl, without = small(first, stage={"updates_per_step": 2}), small(first, stage={"updates_per_step": 2, "kl_coef": 0.0})
    assert with_kl[1]["reward_mean"] == without[1]["reward_mean"] and with_kl[1]["loss"] != without[1]["loss"]


def leave_one_out() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.4], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    by_hand = [1 - 0.4 / 3, -1.4 / 3, -1.4 / 3, 0.4 - 1 / 3]
    found = group_advantages(rewards, scale_by_std=False, leave_one_out=True)
    torch.testing.assert_close(found, torch.tensor([by_hand, [0.0] * 4], dtype=torch.float64))
    assert group_advantages(torch.tensor([[1.0]]), leave_one_out=True).tolist() == [[0.0]]
    assert not GRPOStage().leave_one_out and small(load_recipe("smoke")[1], stage={"leave_one_out": True})


def stage_order() -> None:
    recipe = load_recipe("256-loops")[1]
    assert [stage.kind for stage in recipe.stages] == ["grpo", "sft"] * 3
    assert sum(stage.steps for stage in recipe.stages if stage.kind == "grpo") == 180


def curriculum() -> None:
    problems = [Problem((1, 2, 3, 4), 10), Problem((1, 2, 3), 6), Problem((11, 12, 13), 36), Problem((1, 2, 4), 7)]
    assert easiest(problems, 0.5) == easiest(problems[::-1], 0.5) == [problems[1], problems[3]]
    rows = small(load_recipe("smoke")[1], stage={"easy_steps": 1})
    assert [row["kind"] for row in rows if row["kind"] == "grpo"]


def sorting() -> None:
    task, heap = Sorting(), Heap((7, 3, 12))
    verdicts = {
        text: task.score(f"</think><answer>{text}</answer>", heap).outcome for text in ("3, 7, 12", "3 7 12", "7, 3, 12", "x")
    }
    assert list(verdicts.values()) == ["correct", "correct", "wrong", "wrong"]
    assert task.problem(heap.row()) == heap and task.solution(heap) == "3, 7, 12" and heap.key == Heap((12, 7, 3)).key
    problems = task.generate(300, seed=1)
    assert problems == task.generate(300, seed=1) and len({problem.key for problem in problems}) == 300
    recipe = load_recipe("sorting")[1]
    rows = small(replace(recipe, stages=recipe.stages[:1], optimizer=load_recipe("smoke")[1].optimizer))
    assert rows[1]["tokens"] > 0


def int8_rollout() -> None:
    recipe = load_recipe("smoke")[1]
    recipe = replace(recipe, stages=recipe.stages[:1])
    exact, rounded = small(recipe), small(recipe, sampling={"int8": True}, stage={"importance_cap": 2.0})
    assert exact[1]["log_ratio_std"] < 1e-4 < rounded[1]["log_ratio_std"] < 1, (exact[1], rounded[1])


CHECKS = (every_number_once, length_bonus, kl, leave_one_out, stage_order, curriculum, sorting, int8_rollout)

if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {}
    for number, check in enumerate(CHECKS, 1):
        try:
            check()
            found[number] = None
        except Exception:
            found[number] = traceback.format_exc()
    assert Path.cwd() == Path(sys.modules["rl.stages"].__file__).parent.parent, "not the patched tree"
    print(json.dumps(found))

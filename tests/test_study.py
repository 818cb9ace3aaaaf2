"""The study: arms that change one thing each, runs made once, and figures that follow from their results."""

import contextlib
import json
import math
import pickle
import shutil
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from helpers import changed_fields, made_up

import lab.run
import lab.stages
from experiments.study import report
from experiments.study import run as study
from experiments.study.results import Estimate, Run, paired_difference
from experiments.study.run import Arguments, execute, load_arms, next_run, plan, run_study
from lab.checkpoint import checkpoints
from lab.recipe import RECIPES, RecipeError, build_recipe, load_recipe
from lab.runfolder import RunFolder

SMALL = """
extends = "{recipes}/smoke.toml"
[sampling]
max_new_tokens = 16
[evaluation]
problems = 2
final_problems = 2
[grpo]
prompts_per_step = 2
samples_per_prompt = 4
[[stages]]
kind = "grpo"
steps = 2
[main]
grpo = {{}}
staged = {{ stages = [{{ kind = "grpo", steps = 1 }}, {{ kind = "sft" }}, {{ kind = "grpo", steps = 1 }}] }}
[ablations]
"no std" = {{ grpo = {{ scale_by_std = false }} }}
"""


class InProcess(contextlib.nullcontext):
    """A pool that runs everything at once in this process, and records which runs these were."""

    def __init__(self, made: list):
        super().__init__(self)
        self.made = made

    def submit(self, function, run):
        self.made.append((run.arm.name, run.seed))
        future = study.Future()
        future.set_result(function(pickle.loads(pickle.dumps(run))))  # as it reaches another process
        return future


@pytest.fixture
def made(monkeypatch) -> list:
    """The runs that a study makes; they draw no pictures."""
    made = []
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *_, **__: InProcess(made))
    monkeypatch.setattr(lab.run, "write_curve", lambda *_: None)
    monkeypatch.setattr(lab.run, "write_report", lambda *_: None)
    return made


def no_report(results, arms) -> None:
    """A report of a study that takes no time."""


def cells(table: str) -> list[list[str]]:
    """The cells of a table in Markdown, row by row."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def small_study(folder, text: str = SMALL) -> Arguments:
    path = folder / "arms.toml"
    path.write_text(text.format(recipes=RECIPES))
    return Arguments(recipe=path, results=folder / "results", out=folder / "runs", workers=2)


def test_the_main_arms_differ_in_stages_alone():
    """They take the same GRPO steps at the recipe's rates."""
    first, _, last = load_recipe("256-tiny")[1].stages
    arms = {arm.name: arm for arm in load_arms(Arguments().recipe) if arm.is_main}
    recipes = {name: build_recipe(arm.tables, RECIPES) for name, arm in arms.items()}
    [grpo], staged = recipes["grpo"].stages, recipes["staged"].stages
    assert [stage.kind for stage in staged] == ["grpo", "sft", "grpo"]
    begun = replace(grpo, steps=staged[0].steps, learning_rate=first.learning_rate)
    ended = replace(grpo, steps=grpo.steps - begun.steps, learning_rate=last.learning_rate)
    assert recipes["restart"].stages == staged[::2] == (begun, ended)
    assert recipes["grpo-512"].stages == (grpo,)
    assert recipes["sft"].stages == (replace(staged[1], traces="staged"),)
    sampling = replace(recipes["grpo"].sampling, max_new_tokens=512)
    assert recipes["grpo-512"] == replace(recipes["grpo"], sampling=sampling)
    for name in ("staged", "restart"):
        assert replace(recipes[name], stages=(grpo,)) == recipes["grpo"]


def test_every_ablation_changes_one_thing_in_grpo_alone():
    arms = [arm for arm in load_arms(Arguments().recipe) if arm.name == "grpo" or not arm.is_main]
    _, changed = changed_fields(arms, RECIPES, "grpo")
    pairs = [{"clip_low", "clip_high"}, {"prompts_per_step", "samples_per_prompt"}]
    for names in changed.values():
        assert len(names) == 1 or names in pairs


def test_a_run_waits_for_the_run_whose_traces_it_learns_from():
    runs = {(run.arm.name, run.seed): run for run in plan(Arguments(arms=("staged", "sft"), seeds=2))}
    sft, staged = runs["sft", 1], runs["staged", 1]
    assert sft.needs == {staged.recipe.out}
    assert sft.recipe.stages[0].traces == f"{staged.recipe.out}/traces.jsonl"
    assert next_run([sft, staged], []) is staged
    assert next_run([sft], [staged]) is None
    assert next_run([sft], [runs["staged", 0]]) is sft


def test_an_arm_may_begin_with_the_model_of_another(tmp_path, made):
    """That model is made again if it is lost."""
    arguments = small_study(tmp_path, SMALL + 'later = {{ model = "grpo", problems = "generated" }}\n')
    arguments = replace(arguments, arms=("grpo", "later"))
    run_study(arguments, no_report)
    assert made == [("grpo", 0), ("later", 0)]
    grpo, later = (arguments.out / arm / "seed_0" for arm in ("grpo", "later"))
    config = json.loads((later / "config.json").read_text())
    assert config["recipe"]["model"] == str(checkpoints(grpo)[-1])
    shutil.rmtree(grpo)
    run_study(arguments, no_report)
    assert made[2:] == []
    (arguments.results / "runs" / "later.0.json").unlink()
    run_study(arguments, no_report)
    assert made[2:] == [("grpo", 0), ("later", 0)]


def test_an_arm_that_does_not_exist_is_named(tmp_path):
    """So is one that changes what does not exist."""
    with pytest.raises(RecipeError, match="no arm 'grop'"):
        list(plan(replace(small_study(tmp_path), arms=("grop",))))
    for arm, message in (("{{ grpo = {{ clip = 1 }} }}", "grpo.clip"), ("3", "must be a table")):
        with pytest.raises(RecipeError, match=message):
            list(plan(small_study(tmp_path, f'{SMALL}"x" = {arm}\n')))


def test_a_study_makes_each_run_once(tmp_path, made):
    """A run is made again only if its recipe has changed."""
    arguments = small_study(tmp_path)
    run_study(replace(arguments, arms=("no std",)), no_report)
    run_study(arguments, no_report)
    assert made == [("no std", 0), ("grpo", 0), ("staged", 0)]

    older = arguments.results / "runs" / "grpo.0.json"
    result = json.loads(older.read_text())
    del result["recipe"]["adapters"]  # as a result from before this field existed
    older.write_text(json.dumps(result))
    small_study(tmp_path, SMALL.replace("scale_by_std = false", "scale_by_std = false, clip_low = 0.1"))
    run_study(arguments, no_report)
    assert made[3:] == [("no std", 0)]
    result = json.loads((arguments.results / "runs" / "no-std.0.json").read_text())
    assert result["recipe"]["stages"][0]["clip_low"] == 0.1


def test_a_result_holds_the_metrics_of_its_run_and_is_reported(tmp_path, made):
    arguments = small_study(tmp_path)
    run_study(arguments, no_report)
    report.write_report(arguments.results, load_arms(arguments.recipe))
    for written in "results.md", "accuracy.png", "training.png", "ablations.png":
        assert (arguments.results / written).stat().st_size > 500
    assert "nan" not in (arguments.results / "results.md").read_text()  # one seed of an arm has no interval
    result = json.loads((arguments.results / "runs" / "staged.0.json").read_text())
    rows = RunFolder(arguments.out / "staged" / "seed_0").metrics()
    sampled = [row["tokens"] for row in rows if row["kind"] == "grpo" and row["step"]]
    assert len(sampled) == 2
    assert result["steps"]["tokens"] == sampled
    last = result["evaluations"][-1]
    assert last["generated_tokens"] == sum(sampled)
    assert last["eval_accuracy"] == rows[-1]["eval_accuracy"]
    assert result["final"]["final_accuracy"] == rows[-1]["final_accuracy"]


def test_a_study_resumes_a_run_that_was_stopped(tmp_path, made, monkeypatch):
    arguments = replace(small_study(tmp_path), arms=("grpo",))
    [run] = plan(arguments)
    step = mock.Mock(wraps=lab.stages.grpo_step)
    step.side_effect = [mock.DEFAULT, KeyboardInterrupt, mock.DEFAULT]
    monkeypatch.setattr(lab.stages, "grpo_step", step)
    with pytest.raises(KeyboardInterrupt):
        execute(run)
    result = execute(run)
    assert step.call_count == 3  # the second step again, the first one not
    step.side_effect = None
    whole = execute(replace(run, recipe=replace(run.recipe, out=str(tmp_path / "whole"))))
    for part in "evaluations", "final", "steps":
        assert result[part] == whole[part]


def test_the_interval_is_students():
    estimate = Estimate.of([1.0, 2.0, 6.0])
    variance = (4 + 1 + 9) / 2
    assert estimate.half_width == pytest.approx(4.302653 * math.sqrt(variance / 3), rel=1e-4)
    assert str(estimate) == "3.0 ± 6.6"
    assert str(Estimate.of([4.25])) == "4.2"
    assert Estimate.of([0.0, 1.0] * 10).half_width == pytest.approx(2.093 * 0.51299 / math.sqrt(20), rel=1e-3)


def test_differences_are_taken_seed_by_seed():
    grpo = [made_up("grpo", seed, {10: 10.0 * seed}) for seed in (1, 2, 3)]
    staged = [made_up("staged", seed, {10: accuracy}) for seed, accuracy in ((2, 23.0), (1, 12.0), (7, 99.0))]
    difference = paired_difference(staged, grpo)
    assert (difference.mean, difference.count) == (2.5, 2)


@pytest.mark.parametrize(
    "better, relation",
    [
        ((5, 6, 7), "is better than"),
        ((-5, -6, -7), "is worse than"),
        ((-5, 6, 3), "cannot be told apart from"),
    ],
)
def test_a_conclusion_says_no_more_than_its_interval(better, relation):
    grpo = [made_up("grpo", seed, {10: 40.0}) for seed in range(3)]
    staged = [made_up("staged", seed, {10: 40.0 + better[seed]}) for seed in range(3)]
    [sentence] = report.conclusions({"grpo": grpo, "staged": staged})
    assert f"**staged** {relation} **grpo**: {sum(better) / 3:+.1f} (" in sentence
    assert "greedy" not in sentence


def test_a_conclusion_gives_the_greedy_difference_if_there_is_one():
    grpo = [made_up("grpo", seed, {10: 1.0}, final=10.0) for seed in (0, 1)]
    staged = [made_up("staged", seed, {10: 1.0}, final=11.0 + seed) for seed in (0, 1)]
    sentence, _, against = report.conclusions({"grpo": grpo, "staged": staged, "restart": grpo})
    assert "+1.5 (-4.9 to +7.9) points at the end, greedy +3.0 (-9.7 to +15.7) (" in sentence
    assert "**restart**: +1.5" in against


def test_tables_by_hand():
    grpo = [made_up("grpo", seed, {0: 4.0, 10: 20.0 + seed, 20: 10.0 + seed}, final=12.0) for seed in (0, 2)]
    longer = [made_up("longer", 0, {0: 4.0, 20: 44.0}, step_tokens=200)]
    assert longer[0].accuracy_at(1000) == pytest.approx(14.0)
    rows = cells(report.evaluation_table({"grpo": grpo, "longer": longer}))
    assert rows[0] == ["GRPO steps", "grpo", "longer"]
    assert rows[3:] == [["10", "21.0 ± 12.7", ""], ["20", "11.0 ± 12.7", "44.0"]]
    end = cells(report.end_table({"grpo": grpo, "longer": longer}))
    assert end[0][4] == "after 0.00 M generated tokens, %"  # 2,000 of them
    assert end[2][:8] == ["grpo", "2", "12.0 ± 0.0", "24.0 ± 0.0", "11.0 ± 12.7", "0.0", "10.0", "0.00"]


def test_the_take_off_by_hand():
    grpo = [made_up("grpo", seed, {0: 0.0, 10: 5.0, 20: 15.0 + seed}, final=12.0) for seed in (0, 5)]
    late = [made_up("late", seed, {0: 0.0, 70: 9.0, 90: 9.0 + 2 * seed}) for seed in (0, 1)]
    for run in grpo + late:
        run.steps["completion_length"] = np.array([50.0, 70.0])
    assert grpo[0].passes(10.0) == pytest.approx((15.0, 1500.0))
    assert math.isnan(late[0].passes(10.0)[0])
    rows = cells(report.ablation_table(grpo, {"late": late}))
    assert rows[2] == ["grpo", "2", "12.0 ± 0.0", "", "2 of 2", "14 (13 to 15)", "0.00", "24.0 ± 0.0", "60"]
    assert rows[3][4] == "1 of 2"


def test_an_sft_stage_is_one_point_beside_the_last_of_grpo():
    names = ("stage", "kind", "step", "grpo_steps", "eval_accuracy")
    rows = [(0, "grpo", 5, 5, 0.05), (1, "sft", 8, 5, 0.3), (1, "sft", 9, 5, 0.09), (2, "grpo", 14, 10, 0.14)]
    evaluations = [dict(zip(names, row)) for row in rows]
    run = Run("staged", 0, evaluations, {}, {}, 0)
    assert run.points == pytest.approx({(5, False): 5, (5, True): 9, (10, False): 14})

"""The study: arms that change one thing each, runs made once, and figures that follow from their results."""

import contextlib
import json
import math
import shutil
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from helpers import changed_fields, made_up

import lab.stages
from experiments.study import report
from experiments.study import run as study
from experiments.study.results import Estimate, Run, paired_difference
from experiments.study.run import Arguments, execute, load_arms, next_run, plan, run_study
from lab.checkpoint import checkpoints
from lab.recipe import RECIPES, RecipeError, build_recipe, load_recipe

SMALL = """
extends = "{recipes}/smoke.toml"
[sampling]
max_new_tokens = 48
[evaluation]
problems = 4
final_problems = 6
[grpo]
prompts_per_step = 2
samples_per_prompt = 4
[[stages]]
kind = "grpo"
steps = 3
[main]
grpo = {{}}
staged = {{ stages = [{{ kind = "grpo", steps = 1 }}, {{ kind = "sft" }}, {{ kind = "grpo", steps = 2 }}] }}
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
        future.set_result(function(run))
        return future


def small_study(folder, text: str = SMALL) -> Arguments:
    path = folder / "arms.toml"
    path.write_text(text.format(recipes=RECIPES))
    return Arguments(recipe=path, results=folder / "results", out=folder / "runs", workers=2)


def test_the_main_arms_differ_in_stages_alone():
    """They take the same GRPO steps at the recipe's rates."""
    first, _, last = load_recipe("256-tiny")[1].stages
    arms = {
        arm.name: build_recipe(arm.tables, RECIPES) for arm in load_arms(Arguments().recipe) if arm.is_main
    }
    grpo, staged, restart = arms["grpo"].stages[0], arms["staged"].stages, arms["restart"].stages
    for stages in restart, arms["grpo-512"].stages:
        assert sum(stage.steps for stage in stages) == grpo.steps
        for stage, rate in zip(stages, (first.learning_rate, last.learning_rate), strict=False):
            assert replace(stage, steps=grpo.steps) == replace(grpo, learning_rate=rate)
    assert [stage.kind for stage in staged] == ["grpo", "sft", "grpo"]
    assert restart == staged[::2]
    for name in "staged", "restart", "grpo-512":
        assert replace(arms[name], stages=(), sampling=arms["grpo"].sampling) == replace(
            arms["grpo"], stages=()
        )
    assert arms["grpo-512"].sampling == replace(arms["grpo"].sampling, max_new_tokens=512)
    assert arms["sft"].stages == (replace(staged[1], traces="staged"),)


def test_every_ablation_changes_one_thing_in_grpo_alone():
    arms = [arm for arm in load_arms(Arguments().recipe) if arm.name == "grpo" or not arm.is_main]
    firsts = [build_recipe(arm.tables, RECIPES).stages[0] for arm in arms]
    assert len({first.prompts_per_step * first.samples_per_prompt for first in firsts}) == 1
    _, changed = changed_fields(arms, RECIPES, "grpo")
    pairs = [{"clip_low", "clip_high"}, {"prompts_per_step", "samples_per_prompt"}]
    assert all(len(names) == 1 or names in pairs for names in changed.values()), changed
    covered = set().union(*changed.values())
    assert covered >= {
        "scale_by_std",
        "near_miss",
        "format",
        "learning_rate",
        "updates_per_step",
        "samples_per_prompt",
    }


def test_a_run_waits_for_the_run_whose_traces_it_learns_from():
    runs = {(run.arm.name, run.seed): run for run in plan(Arguments(arms=("staged", "sft"), seeds=2))}
    sft, staged = runs["sft", 1], runs["staged", 1]
    assert sft.needs == {staged.recipe.out}
    assert not staged.needs
    assert sft.recipe.stages[0].traces == f"{staged.recipe.out}/traces.jsonl"
    assert next_run([sft, staged], []) is staged
    assert next_run([sft], [staged]) is None
    assert next_run([sft], [runs["staged", 0]]) is sft


def test_an_arm_may_begin_with_the_model_of_another(tmp_path, monkeypatch):
    """That model is made again if it is lost."""
    arguments = small_study(tmp_path, SMALL + 'later = {{ model = "grpo", problems = "generated" }}\n')
    arguments = replace(arguments, arms=("grpo", "later"))
    made = []
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *_, **__: InProcess(made))
    monkeypatch.setattr(study, "write_report", lambda *_: None)
    run_study(arguments)
    assert made == [("grpo", 0), ("later", 0)]
    grpo, later = (arguments.out / arm / "seed_0" for arm in ("grpo", "later"))
    config = json.loads((later / "config.json").read_text())
    assert config["recipe"]["model"] == str(checkpoints(grpo)[-1])
    made.clear()
    shutil.rmtree(grpo)
    run_study(arguments)
    assert made == []
    (arguments.results / "runs" / "later.0.json").unlink()
    run_study(arguments)
    assert made == [("grpo", 0), ("later", 0)]


def test_an_arm_that_does_not_exist_is_named(tmp_path):
    """So is one that changes what does not exist."""
    with pytest.raises(RecipeError, match="no arm 'grop'"):
        list(plan(replace(small_study(tmp_path), arms=("grop",))))
    for arm, message in (("{{ grpo = {{ clip = 1 }} }}", "grpo.clip"), ("3", "must be a table")):
        with pytest.raises(RecipeError, match=message):
            list(plan(small_study(tmp_path, f'{SMALL}"x" = {arm}\n')))


def test_a_study_makes_each_run_once(tmp_path, monkeypatch):
    """A run is made again only if its recipe has changed."""
    arguments = small_study(tmp_path)
    run_study(replace(arguments, arms=("no std",)))
    made = []
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *_, **__: InProcess(made))
    run_study(arguments)
    assert made == [("grpo", 0), ("staged", 0)]
    files = {path.name: path.read_text() for path in (arguments.results / "runs").iterdir()}
    assert set(files) == {"grpo.0.json", "staged.0.json", "no-std.0.json"}
    for name, text in files.items():
        result = json.loads(text)
        folder = arguments.out / result["arm"] / f"seed_{result['seed']}"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        sampled = [row["tokens"] for row in rows if row["kind"] == "grpo" and row["step"]]
        assert result["steps"]["tokens"] == sampled and len(sampled) == 3, name
        assert result["evaluations"][-1]["generated_tokens"] == sum(sampled)
        assert [e["eval_accuracy"] for e in result["evaluations"]] == [
            r["eval_accuracy"] for r in rows if "eval_accuracy" in r
        ]
        assert result["final"]["final_accuracy"] == rows[-1]["final_accuracy"]
    for written in "results.md", "accuracy.png", "training.png", "ablations.png":
        assert (arguments.results / written).stat().st_size > 500
    assert "nan" not in (arguments.results / "results.md").read_text()  # one seed of an arm has no interval

    monkeypatch.setattr(study, "write_report", lambda *_: None)  # takes seconds
    made.clear()
    older = arguments.results / "runs" / "grpo.0.json"
    result = json.loads(older.read_text())
    del result["recipe"]["adapters"]  # as a result from before this field existed
    older.write_text(json.dumps(result))
    run_study(arguments)
    assert made == []
    small_study(tmp_path, SMALL.replace("scale_by_std = false", "scale_by_std = false, clip_low = 0.1"))
    run_study(arguments)
    assert made == [("no std", 0)]
    assert (
        json.loads((arguments.results / "runs" / "no-std.0.json").read_text())["recipe"]["stages"][0][
            "clip_low"
        ]
        == 0.1
    )


def test_a_study_resumes_a_run_that_was_stopped(tmp_path, monkeypatch):
    arguments = replace(small_study(tmp_path), arms=("grpo",), seeds=1)
    (run,) = plan(arguments)
    step = mock.Mock(
        wraps=lab.stages.grpo_step, side_effect=[mock.DEFAULT, mock.DEFAULT, KeyboardInterrupt, mock.DEFAULT]
    )
    monkeypatch.setattr(lab.stages, "grpo_step", step)
    with pytest.raises(KeyboardInterrupt):
        execute(run)
    result = execute(run)
    assert step.call_count == 4, "the third step again, the first two not"
    monkeypatch.undo()
    whole = execute(replace(run, recipe=replace(run.recipe, out=str(tmp_path / "whole"))))
    for part in "evaluations", "final", "steps":
        assert result[part] == whole[part]


def test_the_interval_is_students():
    estimate = Estimate.of([1.0, 2.0, 6.0])
    assert estimate.half_width == pytest.approx(
        4.302653 * math.sqrt(7) / math.sqrt(3), rel=1e-4
    )  # variance (4 + 1 + 9) / 2
    assert str(estimate) == "3.0 ± 6.6"
    assert estimate.count == 3
    assert str(Estimate.of([4.25])) == "4.2"
    assert math.isnan(Estimate.of([4.25]).half_width)
    assert Estimate.of([0.0, 1.0] * 10).half_width == pytest.approx(2.093 * 0.51299 / math.sqrt(20), rel=1e-3)


def test_differences_are_taken_seed_by_seed():
    grpo = [made_up("grpo", seed, {10: 10.0 * seed}) for seed in (1, 2, 3)]
    staged = [
        made_up("staged", seed, {10: 10.0 * seed + better})
        for seed, better in ((2, 3.0), (1, 2.0), (7, 50.0))
    ]
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
    """It gives the greedy difference where there is one."""
    grpo = [made_up("grpo", seed, {10: 40.0 + seed}) for seed in range(3)]
    staged = [made_up("staged", seed, {10: 40.0 + seed + better[seed]}) for seed in range(3)]
    (sentence,) = report.conclusions({"grpo": grpo, "staged": staged})
    assert f"**staged** {relation} **grpo**: {sum(better) / 3:+.1f} (" in sentence
    assert "greedy" not in sentence
    grpo = [made_up("grpo", seed, {10: 1.0}, final=10.0) for seed in (0, 1)]
    staged = [
        made_up("staged", seed, {10: 1.0}, final=11.0 + seed) for seed in (0, 1)
    ]  # greedy twice as much
    sentence, _, against = report.conclusions({"grpo": grpo, "staged": staged, "restart": grpo})
    assert "**restart**: +1.5" in against
    assert "+1.5 (-4.9 to +7.9) points at the end, greedy +3.0 (-9.7 to +15.7) (" in sentence


def test_tables_by_hand():
    grpo = [made_up("grpo", seed, {0: 4.0, 10: 20.0 + seed, 20: 10.0 + seed}, final=12.0) for seed in (0, 2)]
    longer = [made_up("longer", 0, {0: 4.0, 20: 44.0}, step_tokens=200)]
    assert longer[0].accuracy_at(1000) == pytest.approx(14.0)
    assert grpo[0].largest_fall == 10.0
    assert longer[0].largest_fall == 0.0
    rows = [
        line.split(" | ") for line in report.evaluation_table({"grpo": grpo, "longer": longer}).splitlines()
    ]
    assert rows[0] == ["| GRPO steps", "grpo", "longer |"]
    assert rows[3] == ["| 10", "21.0 ± 12.7", " |"]
    assert rows[4] == ["| 20", "11.0 ± 12.7", "44.0 |"]
    end = [
        line.strip("| ").split(" | ")
        for line in report.end_table({"grpo": grpo, "longer": longer}).splitlines()
    ]
    assert end[0][4] == "after 0.00 M generated tokens, %"  # 2,000 of them
    assert end[2][:8] == ["grpo", "2", "12.0 ± 0.0", "24.0 ± 0.0", "11.0 ± 12.7", "0.0", "10.0", "0.00"]
    assert end[3][:5] == ["longer", "1", "44.0", "", "24.0"]


def test_the_take_off_by_hand():
    steps = {"completion_length": np.array([50.0, 70.0])}
    grpo = [
        replace(made_up("grpo", seed, {0: 0.0, 10: 5.0, 20: 15.0 + seed}, final=12.0), steps=steps)
        for seed in (0, 5)
    ]
    late = [
        replace(made_up("late", seed, {0: 0.0, 70: 9.0, 90: 9.0 + 2 * seed}), steps=steps) for seed in (0, 1)
    ]
    assert grpo[0].passes(10.0) == pytest.approx((15.0, 1500.0))
    assert all(map(math.isnan, late[0].passes(10.0)))
    rows = [
        line.strip("| ").split(" | ") for line in report.ablation_table(grpo, {"late": late}).splitlines()
    ]
    assert rows[2] == ["grpo", "2", "12.0 ± 0.0", "", "2 of 2", "14 (13 to 15)", "0.00", "24.0 ± 0.0", "60"]
    assert rows[3][4:7] == ["1 of 2", "80 (80 to 80)", "0.01"]


def test_an_sft_stage_is_one_point_beside_the_last_of_grpo():
    rows = [(0, 0, 0, 0.1), (0, 5, 5, 0.2), (1, 8, 5, 0.3), (1, 9, 5, 0.4), (2, 14, 10, 0.5)]
    names = ("stage", "step", "grpo_steps", "eval_accuracy")
    evaluations = [dict(zip(names, row)) | {"kind": "sft" if row[0] == 1 else "grpo"} for row in rows]
    run = Run("staged", 0, evaluations, {}, {}, 0)
    assert run.points == pytest.approx({(0, False): 10, (5, False): 20, (5, True): 40, (10, False): 50})

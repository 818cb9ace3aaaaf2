"""Recipes: what ships loads, what is written wrong is refused by the name of its field, and nothing is lost on the way."""

import json
from dataclasses import fields, is_dataclass, replace
from typing import get_args, get_type_hints

import pytest

from lab.recipe import RECIPES, Recipe, RecipeError, from_dict, load_recipe, read_tables, to_dict
from rl.grpo import GRPOStage
from rl.rollout import SamplingSettings
from rl.sft import SFTStage

NAMES = sorted(path.stem for path in RECIPES.glob("*.toml"))


def write(folder, text: str, name: str = "mine.toml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def refused(folder, text: str) -> str:
    """The message with which a recipe of this text is refused; it names the file."""
    path = write(folder, text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert str(error.value).startswith(path)
    return str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_and_survives_json(name):
    loaded_name, recipe = load_recipe(name)
    assert loaded_name == name
    again = from_dict(Recipe, json.loads(json.dumps(to_dict(recipe))))
    assert again == recipe and again.stages == recipe.stages
    assert all(type(a) is type(b) for a, b in zip(again.stages, recipe.stages, strict=True))


def test_256_states_the_papers_numbers():
    _, recipe = load_recipe("256")
    assert recipe.sampling.max_new_tokens == 256 and recipe.sampling.temperature == 1.0
    assert recipe.evaluation.every == 10
    assert [stage.kind for stage in recipe.stages] == ["grpo", "sft", "grpo"]
    assert [recipe.stages[0].steps, recipe.stages[2].steps] == [80, 100]
    assert {(stage.clip_low, stage.clip_high) for stage in recipe.stages if stage.kind == "grpo"} == {(0.25, 0.25)}
    assert recipe.optimizer.kind == "adamw8bit"


def test_512_and_the_baseline_state_the_papers_numbers():
    _, recipe = load_recipe("512")
    assert recipe.sampling.max_new_tokens == 512 and recipe.evaluation.every == 10
    (stage,) = recipe.stages
    assert (stage.kind, stage.steps, stage.clip_low, stage.clip_high) == ("grpo", 80, 0.25, 0.25)
    _, recipe = load_recipe("baseline")
    assert recipe.sampling.max_new_tokens == 1024 and recipe.stages == ()


@pytest.mark.parametrize("name", ["256", "512", "baseline"])
def test_the_tiny_sibling_keeps_the_stages_of_the_experiment(name):
    _, recipe = load_recipe(name)
    sibling_name, sibling = load_recipe(name, variant="tiny")
    assert sibling_name == f"{name}-tiny" and sibling.model == "tiny"
    assert sibling.sampling.max_new_tokens == recipe.sampling.max_new_tokens
    assert [stage.kind for stage in sibling.stages] == [stage.kind for stage in recipe.stages]
    assert load_recipe("smoke", variant="tiny")[0] == "smoke"  # has no sibling


def test_extending_merges_tables_and_replaces_values_and_lists(tmp_path):
    base = """
        seed = 1
        model = "base"
        [sampling]
        max_new_tokens = 100
        temperature = 0.5
        [[stages]]
        kind = "grpo"
        [[stages]]
        kind = "sft"
    """
    write(tmp_path, base, "base.toml")
    write(tmp_path, 'extends = "base.toml"\nseed = 2\n[sampling]\nmax_new_tokens = 50', "middle.toml")
    path = write(tmp_path, 'extends = "middle.toml"\n[[stages]]\nkind = "sft"\n[evaluation]\nevery = 3')
    name, recipe = load_recipe(path)
    assert (name, recipe.seed, recipe.model, recipe.evaluation.every) == ("mine", 2, "base", 3)
    assert (recipe.sampling.max_new_tokens, recipe.sampling.temperature) == (50, 0.5)
    assert [stage.kind for stage in recipe.stages] == ["sft"]


def test_shared_tables_fill_the_stages_of_their_kind_and_a_stages_own_fields_come_first(tmp_path):
    text = """
        [grpo]
        learning_rate = 0.5
        clip_low = 0.1
        [sft]
        learning_rate = 0.25
        [[stages]]
        kind = "grpo"
        [[stages]]
        kind = "sft"
        [[stages]]
        kind = "grpo"
        learning_rate = 0.125
    """
    first, second, third = load_recipe(write(tmp_path, text))[1].stages
    assert (first.learning_rate, second.learning_rate, third.learning_rate) == (0.5, 0.25, 0.125)
    assert (first.clip_low, third.clip_low) == (0.1, 0.1)
    assert first.clip_high == GRPOStage().clip_high and second.epochs == SFTStage().epochs


def stage(kind: str, text: str = "") -> str:
    return f'[[stages]]\nkind = "{kind}"\n{text}'


@pytest.mark.parametrize(
    "text, field",
    [
        ("stepps = 3", "stepps"),
        ("[sampling]\nmax_tokens = 3", "sampling.max_tokens"),
        ('[task]\nkind = "gsm8k"\nmax_number = 3', "task.max_number"),
        (stage("grpo") + stage("sft", "steps = 3"), "stages.1.steps"),
        ("[grpo]\nepochs = 3\n" + stage("grpo"), "grpo.epochs"),
        ("stages = []\n[sft]\nsteps = 3", "sft.steps"),
    ],
)
def test_an_unknown_field_is_refused_by_name(tmp_path, text, field):
    assert f"unknown field {field}" in refused(tmp_path, text)


@pytest.mark.parametrize(
    "text, field",
    [
        ('seed = "1"', "seed"),
        ("seed = 1.0", "seed"),
        ("seed = true", "seed"),
        ("sampling = 3", "sampling"),
        ("[sampling]\nthinking = 1", "sampling.thinking"),
        ("[sampling]\ntemperature = nan", "sampling.temperature"),
        ("[sampling]\ntop_k = 2.5", "sampling.top_k"),
        ("[sampling]\ntop_p = 0.0", "sampling.top_p"),
        ("[sampling]\ntop_p = true", "sampling.top_p"),
        (stage("grpo", "learning_rate = [1]"), "stages.0.learning_rate"),
        (stage("grpo", "clip_low = 1.1"), "stages.0.clip_low"),
        (stage("grpo", 'aggregation = "mean"'), "stages.0.aggregation"),
        (stage("grpo", "prompts_per_step = 2\nupdates_per_step = 3"), "stages.0.updates_per_step"),
        (stage("grpo", "prompts_per_step = 10_000\nsamples_per_prompt = 101"), "prompts_per_step x samples_per_prompt"),
        (stage("grpo", "[sampling]\ntemperature = 0.0\n"), "sampling.temperature"),
        (stage("sft", "traces = 1"), "stages.0.traces"),
        (stage("ppo"), "stages.0.kind"),
        ("[[stages]]\nsteps = 3", "stages.0.kind"),
        ('[[stages]]\nkind = ["grpo"]', "stages.0.kind"),
        ('[stages]\nkind = "grpo"', "stages"),
        ("stages = 3", "stages"),
        ("stages = [1]", "stages"),
        ("grpo = 3\n" + stage("grpo"), "grpo"),
        ('[optimizer]\nmicro_batch_tokens = "many"', "optimizer.micro_batch_tokens"),
        ('[task]\nkind = "countdown"\nmin_number = 9\nmax_number = 3', "task"),
        ("[task]\nmax_number = 9", "task.kind"),
        ("task = 3", "task.kind"),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_refused_by_its_fields_name(tmp_path, text, field):
    assert field in refused(tmp_path, text)


def number_fields(settings, where: str = "") -> list[str]:
    """The names of all fields that hold a number, those of nested settings too."""
    names = []
    hints = get_type_hints(type(settings))
    for f in fields(settings):
        value, hint = getattr(settings, f.name), hints[f.name]
        if is_dataclass(value):
            names += number_fields(value, f"{where}{f.name}.")
        elif {int, float} & {hint, *get_args(hint)}:
            names.append(f"{where}{f.name}")
    return names


def test_no_number_of_a_recipe_is_without_bounds_trap_generated_problems_ten_to_the_twelve():
    names = number_fields(Recipe()) + [f"grpo.{n}" for n in number_fields(GRPOStage())]
    names += [f"sft.{n}" for n in number_fields(SFTStage())]
    assert len(names) > 30
    for name in names:
        *tables, field = name.split(".")
        for value in (-1, 10**30):
            values = {field: value} | ({"kind": "countdown"} if tables == ["task"] else {})
            for table in reversed(tables):
                values = {"stages": [{"kind": table} | values]} if table in ("grpo", "sft") else {table: values}
            with pytest.raises(RecipeError, match=f"{field}.* must be "):
                from_dict(Recipe, values)


def test_fields_that_are_gone_are_dropped_at_their_old_default_and_refused_at_any_other():
    """As runs of before have them in their config.json."""
    old = {"max_skipped_updates": 5, "weight_decay": 0.0, "max_grad_norm": 1.0}
    stages = [{"kind": "grpo", "steps": 7, "importance_cap": None}]
    recipe = from_dict(Recipe, {"optimizer": old, "stages": stages})
    assert recipe == Recipe(stages=(GRPOStage(steps=7),))
    for values, field in (
        ({"optimizer": old | {"weight_decay": 0.1}}, "optimizer.weight_decay"),
        ({"stages": [stages[0] | {"importance_cap": 2.0}]}, "stages.0.importance_cap"),
    ):
        with pytest.raises(RecipeError, match=f"{field} is no longer a field"):
            from_dict(Recipe, values)
    with pytest.raises(RecipeError, match="unknown field weight_decay"):
        from_dict(Recipe, {"weight_decay": 0.0})


def test_training_refuses_top_k_and_top_p_trap_scored_under_another_distribution():
    for sampling in (SamplingSettings(top_k=20), SamplingSettings(top_p=0.95)):
        with pytest.raises(RecipeError, match="top_k and sampling.top_p"):
            Recipe(sampling=sampling, stages=(GRPOStage(),))
        Recipe(sampling=sampling, stages=(SFTStage(traces="mine.jsonl"),))


def test_overrides_are_checked_like_a_recipes_own_values():
    _, recipe = load_recipe("256")
    with pytest.raises(RecipeError, match="sampling.max_new_tokens must be from 1 to 1,000,000, not 0"):
        replace(recipe, sampling=replace(recipe.sampling, max_new_tokens=0))


def test_a_missing_recipe_names_those_there_are():
    with pytest.raises(RecipeError, match="no-such.*256-tiny.*smoke"):
        load_recipe("no-such")


def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path):
    for text in ("seed = ", "\ufffe", stage("grpo", "[stages]")):
        refused(tmp_path, text)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    (tmp_path / "folder.toml").mkdir()
    for name in ("bytes.toml", "folder.toml"):
        with pytest.raises(RecipeError, match=name):
            load_recipe(str(tmp_path / name))


@pytest.mark.parametrize("base", ["./mine.toml", "other.toml", "missing.toml", ""])
def test_extending_oneself_in_a_circle_or_nothing_is_refused(tmp_path, base):
    write(tmp_path, 'extends = "mine.toml"', "other.toml")
    path = write(tmp_path, f'extends = "{base}"')
    with pytest.raises(RecipeError, match="extends itself" if base in ("./mine.toml", "other.toml") else "missing|directory"):
        load_recipe(path)


def test_a_damaged_saved_recipe_is_refused_and_no_traceback():
    for values in ([], None, 3, {"stages": 5}, {"stages": [1]}, {"stages": None}, {"stages": {}}):
        with pytest.raises(RecipeError):
            from_dict(Recipe, values)


@pytest.mark.parametrize("name", NAMES)
def test_the_thinking_mode_is_stated_and_not_left_to_a_default_trap_truncation_at_the_start(name):
    """Qwen3-1.7B in thinking mode rarely finishes in 256 tokens at first, so the mode decides what step 0 shows."""
    assert isinstance(read_tables(RECIPES / f"{name}.toml")["sampling"]["thinking"], bool)

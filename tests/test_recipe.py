"""Recipes: what ships loads, a mistake is refused by its field's name, and nothing is lost on the way."""

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from lab.recipe import RECIPES, Recipe, RecipeError, build_recipe, from_dict, load_recipe, read_tables
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


def stage(kind: str, text: str = "") -> str:
    return f'[[stages]]\nkind = "{kind}"\n{text}\n'


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_loads_and_states_its_thinking_mode(name):
    """Qwen3-1.7B rarely finishes thinking in 256 tokens at first, so the mode decides what step 0 shows."""
    loaded_name, recipe = load_recipe(name)
    assert loaded_name == name
    assert from_dict(Recipe, json.loads(json.dumps(asdict(recipe)))) == recipe
    assert isinstance(read_tables(RECIPES / f"{name}.toml")["sampling"]["thinking"], bool)


@pytest.mark.parametrize(
    "name, tokens, steps", [("256", 256, [80, None, 100]), ("512", 512, [80]), ("baseline", 1024, [])]
)
def test_the_recipes_state_the_papers_numbers(name, tokens, steps):
    _, recipe = load_recipe(name)
    assert recipe.sampling.temperature == 1.0
    assert recipe.evaluation.every == 10
    assert recipe.optimizer.kind == "adamw8bit"
    for stage in recipe.stages:
        assert stage.kind == "sft" or (stage.clip_low, stage.clip_high) == (0.25, 0.25)
    sibling_name, sibling = load_recipe(name, variant="tiny")
    assert sibling_name == f"{name}-tiny"
    assert sibling.model == "tiny"
    for each in (recipe, sibling):
        assert each.sampling.max_new_tokens == tokens
        assert [getattr(stage, "steps", None) for stage in each.stages] == steps


def test_extending_merges_tables_and_replaces_values_and_lists(tmp_path):
    base = 'seed = 1\nmodel = "base"\n[sampling]\nmax_new_tokens = 100\ntemperature = 0.5\n'
    write(tmp_path, base + stage("grpo") + stage("sft"), "base.toml")
    write(tmp_path, 'extends = "base.toml"\nseed = 2\n[sampling]\nmax_new_tokens = 50', "middle.toml")
    path = write(tmp_path, 'extends = "middle.toml"\n[evaluation]\nevery = 3\n' + stage("sft"))
    name, recipe = load_recipe(path)
    assert (name, recipe.seed, recipe.model, recipe.evaluation.every) == ("mine", 2, "base", 3)
    assert (recipe.sampling.max_new_tokens, recipe.sampling.temperature) == (50, 0.5)
    assert [stage.kind for stage in recipe.stages] == ["sft"]


def test_shared_tables_fill_the_stages_of_their_kind():
    """A stage's own fields come first."""
    stages = [{"kind": "grpo"}, {"kind": "sft"}, {"kind": "grpo", "learning_rate": 0.125}]
    shared = {"grpo": {"learning_rate": 0.5, "clip_low": 0.1}, "sft": {"learning_rate": 0.25}}
    expected = (
        GRPOStage(learning_rate=0.5, clip_low=0.1),
        SFTStage(learning_rate=0.25),
        GRPOStage(learning_rate=0.125, clip_low=0.1),
    )
    assert build_recipe(shared | {"stages": stages}, Path("mine.toml")).stages == expected


@pytest.mark.parametrize(
    "text, field",
    [
        ("stepps = 3", "unknown field stepps"),
        ('[task]\nkind = "gsm8k"\nmax_number = 3', "unknown field task.max_number"),
        (stage("grpo") + stage("sft", "steps = 3"), "unknown field stages.1.steps"),
        ("[grpo]\nepochs = 3\n" + stage("grpo"), "unknown field grpo.epochs"),
        ("stages = []\n[sft]\nsteps = 3", "unknown field sft.steps"),
        ("seed = true", "seed"),
        ("sampling = 3", "sampling"),
        ("[sampling]\ntemperature = nan", "sampling.temperature"),
        ("[sampling]\ntop_p = 0.0", "sampling.top_p"),
        ("[sampling]\ntemperature = 0.0\n" + stage("grpo"), "sampling.temperature"),
        ('[optimizer]\nmicro_batch_tokens = "many"', "optimizer.micro_batch_tokens"),
        (stage("grpo", 'aggregation = "mean"'), "stages.0.aggregation"),
        (stage("grpo", "prompts_per_step = 2\nupdates_per_step = 3"), "stages.0.updates_per_step"),
        (stage("ppo"), "stages.0: input tag 'ppo'"),
        ("[[stages]]\nsteps = 3", "stages.0.kind is missing"),
        ('[stages]\nkind = "grpo"', "stages"),
        ("stages = [1]", "stages"),
        ("grpo = 3\n" + stage("grpo"), "grpo"),
        ('[task]\nkind = "countdown"\nmin_number = 9\nmax_number = 3', "task"),
    ],
)
def test_a_mistake_is_refused_by_its_fields_name(tmp_path, text, field):
    assert f"mine.toml: {field}" in refused(tmp_path, text)


def number_fields(settings: type) -> list[tuple[type, str]]:
    """The fields of a dataclass that hold a number, those of nested settings too."""
    found = []
    for name, hint in get_type_hints(settings).items():
        kinds = {hint, *get_args(hint)}
        if kinds & {int, float}:
            found.append((settings, name))
        for nested in filter(is_dataclass, kinds):
            found += number_fields(nested)
    return found


def test_trap_a_number_of_a_recipe_without_bounds():
    found = number_fields(Recipe) + number_fields(GRPOStage) + number_fields(SFTStage)
    assert len(found) > 30
    for settings, name in found:
        for value in (-1, 10**30):
            with pytest.raises(RecipeError, match=f"{name}(:| .*must be)"):
                from_dict(settings, {name: value})


@pytest.mark.parametrize("sampling", [SamplingSettings(top_k=20), SamplingSettings(top_p=0.95)])
def test_trap_training_with_top_k_or_top_p(sampling):
    """It would score tokens under another distribution than the one they were sampled from."""
    with pytest.raises(RecipeError, match="top_k and sampling.top_p"):
        Recipe(sampling=sampling, stages=(GRPOStage(),))
    Recipe(sampling=sampling, stages=(SFTStage(traces="mine.jsonl"),))


def test_a_missing_recipe_or_one_that_is_not_toml_is_named(tmp_path):
    """The error names those that there are."""
    with pytest.raises(RecipeError, match="no-such.*256-tiny.*smoke"):
        load_recipe("no-such")
    for text in ("seed = ", "\ufffe", stage("grpo", "[stages]")):
        refused(tmp_path, text)
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "folder.toml").mkdir()
    for name in ("bytes.toml", "folder.toml"):
        with pytest.raises(RecipeError, match=name):
            load_recipe(str(tmp_path / name))


@pytest.mark.parametrize(
    "base, fault",
    [("./mine.toml", "extends itself"), ("other.toml", "extends itself"), ("new.toml", "new.toml")],
)
def test_extending_oneself_in_a_circle_or_nothing_is_refused(base, fault, tmp_path):
    write(tmp_path, 'extends = "mine.toml"', "other.toml")
    with pytest.raises(RecipeError, match=fault):
        load_recipe(write(tmp_path, f'extends = "{base}"'))

"""Held out means held out: no evaluated problem was sampled in training, by any of the models shown."""

import itertools
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers import Hub, fails, smoke, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as eval_command
from data import Countdown, Problem, generate_problems, split_problems
from data.load import endless_problems, fingerprint, read_jsonl
from lab.checkpoint import RECIPE, STATE, TrainState, load_state, saved_recipe, seen_by
from lab.recipe import EvaluationSettings, Recipe, RecipeError, problems_of
from lab.runfolder import RunFolder
from lab.stages import train
from model.weights import TINY
from rl.rollout import SamplingSettings

POOL = generate_problems(60, seed=3)
SMALL = Countdown(max_number=4, max_target=24)
UNTRAINED = Recipe(
    model="tiny",
    task=SMALL,
    problems="generated",
    generated_problems=30,
    evaluation=EvaluationSettings(problems=10),
)


def write(path: Path, problems: list[Problem]) -> str:
    return write_jsonl(path, [problem.row() for problem in problems])


def keys(problems) -> set:
    return {problem.key for problem in problems}


@settings(max_examples=30, deadline=None)
@given(st.permutations(POOL), st.integers(2, 59), st.data())
def test_the_split_follows_from_the_problems(order, size, data):
    """A new problem moves at most one, and none that was seen is held out."""
    problems = order[:size]
    count = data.draw(st.integers(1, size - 1))
    held_out = split_problems(problems, count)[1]
    grown = split_problems([*problems, order[-1]], count)[1]
    assert len(keys(held_out) - keys(grown)) <= 1
    seen = problems[: (size - count) // 2]
    unseen = split_problems(problems, count, map(fingerprint, seen))[1]
    assert not keys(unseen) & keys(seen)


def trained(folder: Path, recipe: Recipe, steps: int, resumed: bool) -> set:
    """Leave the state and recipe of a model trained for so many steps; return the keys it has sampled."""
    folder.mkdir()
    state = TrainState(seen=seen_by(recipe.model))
    sampled = set()
    for step in range(steps):
        problems = problems_of(recipe, state.seen)[0]
        chosen = endless_problems(problems, recipe.seed, state.problems_seen, 3)
        sampled |= keys(chosen)
        state.problems_seen += 3
        state.see(chosen)
        if resumed or step == steps - 1:
            (folder / STATE).write_text(json.dumps(asdict(state)))
            state = load_state(folder)
    (folder / RECIPE).write_text(json.dumps(asdict(recipe)))
    return sampled


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_nothing_evaluated_was_sampled_in_training(tmp_path_factory, data):
    """Three runs, some on top of another, while their file grows; then any two are evaluated."""
    here = tmp_path_factory.mktemp("runs")
    sampled = {"tiny": set()}
    for number in range(3):
        size = data.draw(st.integers(15, 60))
        file = write(here / "mine.jsonl", data.draw(st.permutations(POOL))[:size])
        recipe = Recipe(
            model=data.draw(st.sampled_from(list(sampled))),
            problems=data.draw(st.sampled_from([file, "generated"])),
            task=data.draw(st.sampled_from([SMALL, Countdown(four_number_share=0.0)])),
            generated_problems=30,
            seed=data.draw(st.integers(0, 3)),
            evaluation=EvaluationSettings(problems=data.draw(st.integers(1, 8))),
        )
        folder = here / str(number)
        steps = data.draw(st.integers(1, 4))
        own = trained(folder, recipe, steps, resumed=data.draw(st.booleans()))
        sampled[str(folder)] = own | sampled[recipe.model]
    shown = data.draw(st.lists(st.sampled_from(list(sampled)), min_size=1, max_size=2, unique=True))
    source = data.draw(st.sampled_from([None, "generated", file]))
    arguments = eval_command.Arguments(tuple(shown), problems=source)
    models = [eval_command.model_of(model, arguments) for model in shown]
    try:
        evaluated = eval_command.problems_for(models, arguments)
    except RecipeError as error:
        assert "trained on by one of the models" in str(error)
        return
    for model in shown:
        assert not sampled[model] & keys(evaluated)


def test_a_run_notes_its_problems_and_resumes_on_the_same_only(tmp_path, capsys, monkeypatch):
    """It notes those of the model that it began with, too."""
    monkeypatch.setattr("lab.run.write_curve", lambda *_: None)  # which takes most of the time
    source = write(tmp_path / "mine.jsonl", POOL)
    run = tmp_path / "run"
    options = f"--out {run} --problems {source} --sampling.max-new-tokens 8"
    recipe = smoke(options, "--evaluation.problems 2 --evaluation.final-problems 0")
    recipe = replace(recipe, stages=recipe.stages[:1])
    train(recipe, quiet=True)
    state = load_state(max((run / "checkpoints").iterdir()))
    rows = [row for path in RunFolder(run).rollout_files() for _, row in read_jsonl(path, "")]
    own = {fingerprint(recipe.task.problem_from_row(row)) for row in rows}
    before = seen_by(recipe.model)
    assert len(before) > 1000
    assert state.seen == sorted({*own, *before})
    assert state.problems == json.loads((run / "config.json").read_text())["problems"]
    write(tmp_path / "mine.jsonl", POOL[1:])
    assert "other problems" in fails(capsys, lambda: train(recipe, resume=True, quiet=True))


def test_a_checkpoint_without_notes_on_problems_is_refused(tmp_path):
    (tmp_path / STATE).write_text(json.dumps({"stage": 0, "stage_step": 1, "step": 1, "problems_seen": 12}))
    with pytest.raises(RecipeError, match="older version"):
        seen_by(str(tmp_path))


@pytest.mark.parametrize("from_file", [False, True])
def test_the_examples_of_a_prompt_are_in_neither_split(from_file, tmp_path):
    """They are neither trained nor evaluated on."""
    problems = SMALL.generate(50, seed=0)
    recipe = replace(UNTRAINED, generated_problems=50)
    if from_file:
        recipe = replace(recipe, problems=write(tmp_path / "problems.jsonl", problems))
    parts = problems_of(replace(recipe, sampling=SamplingSettings(examples=4)))
    examples = keys(SMALL.examples(4))
    assert examples & keys(problems)  # else this test would show nothing
    assert keys(itertools.chain(*parts)) == keys(problems) - examples


def test_eval_leaves_out_the_examples_of_its_prompts(tmp_path, capsys):
    problems = [*Countdown(max_number=20, max_target=50, four_number_share=1 / 3).examples(2), *POOL[:3]]
    source = write(tmp_path / "problems.jsonl", problems)
    arguments = eval_command.Arguments(
        ("tiny",), problems=source, examples=2, samples=1, max_new_tokens=4, json="-"
    )
    eval_command.main(arguments)
    printed = capsys.readouterr()
    assert json.loads(printed.out)["problems"]["count"] == 3
    assert "2 of 5 problems left out" in printed.err


@pytest.mark.parametrize("named", ["home", "relative", "link", "hub"])
def test_a_model_has_its_notes_however_it_is_named(named, tmp_path, monkeypatch):
    """With a `~`, by a relative path, by a link, or as a hub id whose files are a checkpoint from here."""
    trained(tmp_path / "model", UNTRAINED, steps=3, resumed=False)
    for file in TINY.iterdir():
        shutil.copy(file, tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Hub(tmp_path / "model").put_in_place(monkeypatch)
    name = {"home": "~/model", "relative": "./model", "link": "link", "hub": "someone/model"}[named]
    assert seen_by(name) == load_state(tmp_path / "model").seen != []
    assert saved_recipe(name) == UNTRAINED
    model = eval_command.model_of(name, eval_command.Arguments((name,)))
    assert model.trained


def test_a_run_folder_may_be_named_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/run").path == tmp_path / "run"

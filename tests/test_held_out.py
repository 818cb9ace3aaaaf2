"""Held out means held out: no evaluated problem was sampled in training, by any of the models shown."""

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

POOL = generate_problems(120, seed=3)
SMALL = Countdown(max_number=4, max_target=24)


def write(path: Path, problems: list[Problem]) -> str:
    return write_jsonl(path, [problem.row() for problem in problems])


@settings(max_examples=60, deadline=None)
@given(st.permutations(range(120)), st.integers(2, 119), st.integers(1, 60))
def test_the_split_follows_from_the_problems(order, size, count):
    """A new problem moves at most one."""
    problems = [POOL[i] for i in order[:size]]
    count = min(count, size - 1)
    train, held_out = split_problems(problems, count)
    assert not {p.key for p in train} & {p.key for p in held_out}
    assert len(train) + len(held_out) == size
    assert split_problems(reversed(problems), count) == (train, held_out)
    grown = split_problems([*problems, POOL[order[-1]]], count)[1]
    assert len({p.key for p in held_out} - {p.key for p in grown}) <= 1
    seen = [fingerprint(problem) for problem in problems[: (size - count) // 2]]
    assert not {fingerprint(problem) for problem in split_problems(problems, count, seen)[1]} & set(seen)


def trained(folder: Path, recipe: Recipe, steps: int, resumed: bool) -> set:
    """Leave the state and recipe of a model trained for so many steps; return the keys it has sampled."""
    folder.mkdir()
    state = TrainState(seen=seen_by(recipe.model))
    sampled = set()
    for step in range(steps):
        chosen = endless_problems(problems_of(recipe, state.seen)[0], recipe.seed, state.problems_seen, 3)
        sampled |= {problem.key for problem in chosen}
        state.problems_seen += 3
        state.see(chosen)
        if resumed or step == steps - 1:
            (folder / STATE).write_text(json.dumps(asdict(state)))
            state = load_state(folder)
    (folder / RECIPE).write_text(json.dumps(asdict(recipe)))
    return sampled


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_nothing_evaluated_was_sampled_in_training(tmp_path_factory, data):
    """Three runs, some on top of another, while their file grows; then any two are evaluated."""
    here = tmp_path_factory.mktemp("runs")
    sampled = {}
    for number in range(3):
        size = data.draw(st.integers(30, 120))
        file = write(here / "mine.jsonl", data.draw(st.permutations(POOL))[:size])
        recipe = Recipe(
            model=data.draw(st.sampled_from(["tiny", *sampled])),
            problems=data.draw(st.sampled_from([file, "generated"])),
            task=data.draw(st.sampled_from([SMALL, Countdown()])),
            generated_problems=60,
            seed=data.draw(st.integers(0, 3)),
            evaluation=EvaluationSettings(problems=data.draw(st.integers(1, 8))),
        )
        folder = str(here / str(number))
        before = sampled.get(recipe.model, set())
        sampled[folder] = before | trained(
            Path(folder), recipe, data.draw(st.integers(1, 4)), data.draw(st.booleans())
        )
    shown = data.draw(st.lists(st.sampled_from([*sampled, "tiny"]), min_size=1, max_size=2, unique=True))
    source = data.draw(st.sampled_from([None, "generated", file]))
    arguments = eval_command.Arguments(tuple(shown), problems=source)
    models = [eval_command.model_of(model, arguments) for model in shown]
    try:
        evaluated = eval_command.problems_for(models, arguments)
    except RecipeError as error:
        assert "trained on by one of the models" in str(error)
        return
    for model in shown:
        assert not sampled.get(model, set()) & {problem.key for problem in evaluated}


def test_a_run_notes_its_problems_and_resumes_on_the_same_only(tmp_path, capsys):
    """It notes those of the model that it began with, too."""
    source = write(tmp_path / "mine.jsonl", POOL)
    run = tmp_path / "run"
    recipe = smoke(f"--out {run} --problems {source} --evaluation.problems 8")
    train(replace(recipe, stages=recipe.stages[:1]), quiet=True)
    state = load_state(max((run / "checkpoints").iterdir()))
    rows = [row for path in RunFolder(run).rollout_files() for _, row in read_jsonl(path, "")]
    own, before = (
        {fingerprint(Problem(tuple(row["numbers"]), row["target"])) for row in rows},
        seen_by(recipe.model),
    )
    assert state.seen == sorted({*own, *before})
    assert len(before) > 1000  # those of the model that it began with, too
    assert state.problems == json.loads((run / "config.json").read_text())["problems"]
    write(tmp_path / "mine.jsonl", POOL[1:])
    assert "other problems" in fails(
        capsys, lambda: train(replace(recipe, stages=recipe.stages[:1]), resume=True, quiet=True)
    )


def test_a_checkpoint_without_notes_on_problems_is_refused(tmp_path):
    (tmp_path / STATE).write_text(json.dumps({"stage": 0, "stage_step": 1, "step": 1, "problems_seen": 12}))
    with pytest.raises(RecipeError, match="older version"):
        seen_by(str(tmp_path))


@pytest.mark.parametrize("source", ["generated", "file"])
def test_the_examples_of_a_prompt_are_in_neither_split(source, tmp_path):
    """They are neither trained nor evaluated on."""
    sampling = SamplingSettings(examples=4)
    examples = {problem.key for problem in SMALL.examples(4)}
    problems = SMALL.generate(50, seed=0)
    assert examples & {problem.key for problem in problems}  # else this test would show nothing
    recipe = Recipe(
        task=SMALL, problems="generated", generated_problems=50, evaluation=EvaluationSettings(problems=10)
    )
    if source == "file":
        recipe = replace(recipe, problems=write(tmp_path / "problems.jsonl", problems))
    with_examples = problems_of(replace(recipe, sampling=sampling))
    assert not examples & {problem.key for part in with_examples for problem in part}
    all_keys = {problem.key for part in problems_of(recipe) for problem in part}
    assert {problem.key for part in with_examples for problem in part} == all_keys - examples


def test_eval_leaves_out_the_examples_of_its_prompts(tmp_path, capsys):
    problems = [*Countdown(max_number=20, max_target=50, four_number_share=1 / 3).examples(2), *POOL[:3]]
    source = write(tmp_path / "problems.jsonl", problems)
    options = dict(problems=source, examples=2, samples=1, max_new_tokens=4, json="-")
    eval_command.main(eval_command.Arguments(("tiny",), **options))
    printed = capsys.readouterr()
    assert json.loads(printed.out)["problems"]["count"] == 3
    assert "2 of 5 problems left out" in printed.err


@pytest.mark.parametrize("named", ["home", "relative", "link", "hub"])
def test_a_model_has_its_notes_however_it_is_named(named, tmp_path, monkeypatch):
    """With a `~`, by a relative path, by a link, or as a hub id whose files are a checkpoint from here."""
    recipe = Recipe(
        model="tiny",
        task=SMALL,
        problems="generated",
        generated_problems=50,
        evaluation=EvaluationSettings(problems=10),
    )
    trained(tmp_path / "model", recipe, steps=3, resumed=False)
    for file in TINY.iterdir():
        shutil.copy(file, tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Hub(tmp_path / "model").put_in_place(monkeypatch)
    name = {"home": "~/model", "relative": "./model", "link": "link", "hub": "someone/model"}[named]
    assert seen_by(name) == load_state(tmp_path / "model").seen != []
    assert saved_recipe(name) == recipe
    model = eval_command.model_of(name, eval_command.Arguments((name,)))
    assert model.trained
    assert eval_command.problems_for([model], eval_command.Arguments((name,)))


def test_a_run_folder_may_be_named_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/run").path == tmp_path / "run"

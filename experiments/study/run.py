"""Does GRPO -> SFT -> GRPO beat GRPO alone? Many runs of one recipe, in arms that change one thing each.

`make study` makes every run that has no result yet. `recipes/study/arms.toml` lists the arms. Every run uses
one thread, so as many run side by side as there are cores, with the same results. A finished run writes one
JSON file into docs/study/runs. It is repeated only if its recipe has changed; a run that was stopped resumes
from its last checkpoint.

An arm may build on another one with the same seed: `traces = "staged"` in an SFT stage takes the traces of
the arm `staged`, and `model = "staged"` begins with the model that it ended with.
"""

import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import torch
import tyro

from experiments.study.report import write_report
from lab.checkpoint import checkpoints
from lab.errors import user_errors
from lab.output import check_writable
from lab.recipe import RECIPES, Recipe, RecipeError, build_recipe, from_dict, merge, read_tables
from lab.runfolder import RunFolder
from lab.stages import train
from model.weights import is_bundled
from rl.sft import WORKED, SFTStage

RESULTS = Path(__file__).parent.parent.parent / "docs" / "study"
KEPT = (  # metrics of the GRPO steps that go into the result of a run
    "reward_mean", "train_accuracy", "pass_at_8", "format_rate", "completion_length", "truncated_fraction",
    "non_latin_fraction", "policy_entropy", "clip_fraction", "log_ratio_std", "grad_norm", "near_fraction",
    "tokens", "silent_groups", "common_form_fraction",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Make the runs of a study that have no result yet, and write its tables and plots."""

    recipe: Path = RECIPES / "study" / "arms.toml"
    """The recipe of all arms, with the tables [main] and [ablations]."""
    results: Path = RESULTS
    """Folder for the report and the results."""
    out: Path = Path("runs/study")
    """Folder for the runs."""
    model: str | None = None
    """The model to start from, a folder or hub id; default: the recipe's."""
    arms: tuple[str, ...] = ()
    """Only these arms."""
    seeds: int | None = None
    """Seeds of each arm, counted from 0; default: what the recipe says."""
    workers: int = os.cpu_count() or 1
    """Runs side by side."""
    report_only: bool = False
    """Make no run; write the report of the existing results."""


@dataclass(frozen=True)
class Arm:
    """One way to train: a name, and the recipe's tables with the arm's changes."""

    name: str
    tables: dict
    seeds: int
    is_main: bool


@dataclass(frozen=True)
class StudyRun:
    """One arm with one seed."""

    arm: Arm
    seed: int
    recipe: Recipe
    result: Path
    needs: frozenset[str] = frozenset()
    """Folders of the runs that this one builds on."""


def load_arms(path: Path) -> list[Arm]:
    """The arms of a study's recipe, the main ones first.

    Raises:
        RecipeError: the recipe cannot be read, or an arm is no table.
    """
    tables = read_tables(path)
    counts = {kind: tables.pop(f"{kind}_seeds", 1) for kind in ("main", "ablation")}
    changes = {"main": tables.pop("main", {}), "ablation": tables.pop("ablations", {})}
    arms = []
    for kind, table in changes.items():
        for name, change in table.items():
            if not isinstance(change, dict):
                raise RecipeError(f"{path}: {name} must be a table of what the arm changes, not {change!r}")
            arms.append(Arm(name, merge(tables, change), counts[kind], kind == "main"))
    return arms


def plan(arguments: Arguments) -> Iterator[StudyRun]:
    """The runs in order: the first seed of every main arm, then the second, and so on; then the ablations."""
    arms = load_arms(arguments.recipe)
    unknown = set(arguments.arms) - {arm.name for arm in arms}
    if unknown:
        names = ", ".join(arm.name for arm in arms)
        raise RecipeError(f"no arm {sorted(unknown)[0]!r} in {arguments.recipe}; there are {names}")
    for is_main in (True, False):
        chosen = [
            a for a in arms if a.is_main == is_main and (not arguments.arms or a.name in arguments.arms)
        ]
        for seed in range(max((arguments.seeds or arm.seeds for arm in chosen), default=0)):
            for arm in chosen:
                if seed < (arguments.seeds or arm.seeds):
                    yield study_run(arguments, arm, seed, {arm.name for arm in arms})


def study_run(arguments: Arguments, arm: Arm, seed: int, arms: set[str]) -> StudyRun:
    """The run of an arm with this seed. Names of other `arms` become the folders of their runs."""

    def folder_of(name: str) -> str:
        return str(arguments.out / name / f"seed_{seed}")

    recipe = build_recipe(arm.tables, arguments.recipe)
    needs = set()
    stages = []
    for stage in recipe.stages:
        if isinstance(stage, SFTStage) and stage.traces in arms:
            needs.add(folder_of(stage.traces))
            stage = replace(stage, traces=f"{folder_of(stage.traces)}/traces.jsonl")
        stages.append(stage)
    model = arguments.model or recipe.model
    if recipe.model in arms:
        model = folder_of(recipe.model)
        needs.add(model)
    recipe = replace(recipe, model=model, seed=seed, stages=tuple(stages), out=folder_of(arm.name))
    name = f"{arm.name.replace(' ', '-')}.{seed}.json"
    return StudyRun(arm, seed, recipe, arguments.results / "runs" / name, frozenset(needs))


def up_to_date(run: StudyRun) -> bool:
    """Whether there is a result of this recipe; fields added since then count as their defaults."""
    if not run.result.exists():
        return False
    try:
        stored = from_dict(Recipe, json.loads(run.result.read_text())["recipe"])
    except RecipeError:
        return False
    return without_paths(stored) == without_paths(run.recipe)


def without_paths(recipe: Recipe) -> Recipe:
    """A recipe without the paths of its run, its traces and its model."""
    stages = []
    for stage in recipe.stages:
        has_file = isinstance(stage, SFTStage) and stage.traces not in (None, WORKED)
        stages.append(replace(stage, traces="a file") if has_file else stage)
    model = recipe.model if is_bundled(recipe.model) else "a model"
    return replace(recipe, out="", model=model, stages=tuple(stages))


def execute(run: StudyRun) -> dict:
    """Start or resume one run, on one thread, and return its result."""
    torch.set_num_threads(1)
    recipe = run.recipe
    if recipe.model in run.needs:
        recipe = replace(recipe, model=str(checkpoints(Path(recipe.model))[-1]))
    folder = RunFolder(recipe.out)
    if folder.holds_run:
        try:
            folder.check_recipe(recipe)
        except RecipeError:
            shutil.rmtree(folder.path)  # left by an earlier version of the study
    train(recipe, resume=folder.holds_run, quiet=True)
    return result_of(run, folder.metrics())


def result_of(run: StudyRun, rows: list[dict]) -> dict:
    """The stored result of a run: recipe, evaluations, and a list for each metric of its GRPO steps."""
    config = json.loads((Path(run.recipe.out) / "config.json").read_text())
    evaluations = []
    tokens = 0
    for row in rows:
        tokens += row["tokens"] if row["kind"] == "grpo" and row["step"] else 0
        if "eval_accuracy" in row:
            names = ("stage", "kind", "step", "grpo_steps", "eval_accuracy", "eval_format_rate")
            evaluations.append({name: row[name] for name in names} | {"generated_tokens": tokens})
    steps = [row for row in rows if row["kind"] == "grpo" and row["step"]]
    parts = ("rollout_seconds", "update_seconds", "eval_seconds")
    return {
        "arm": run.arm.name,
        "seed": run.seed,
        "seconds": round(sum(row.get(part, 0) for row in rows for part in parts)),
        "seconds_per_step": round(mean(map(step_seconds, steps)), 2) if steps else None,
        "peak_memory_bytes": max(row.get("peak_memory_bytes", 0) for row in rows),
        "evaluations": evaluations,
        "final": {name: value for name, value in rows[-1].items() if name.startswith("final")},
        "steps": {
            name: [None if math.isnan(row[name]) else round(row[name], 5) for row in steps]
            for name in KEPT
            if steps and name in steps[0]
        },
        "versions": config["versions"],
        "git_revision": config["git_revision"],
        "recipe": asdict(run.recipe),
    }


def step_seconds(row: dict) -> float:
    return row["rollout_seconds"] + row["update_seconds"]


Report = Callable[[Path, list[Arm]], None]


def run_study(arguments: Arguments, report: Report | None = None) -> None:
    """Make the runs that have no result yet; `report(results, arms)` writes what there is after each."""
    report = report or write_report
    runs = list(plan(arguments))
    waiting = [run for run in runs if not up_to_date(run)]
    done = len(runs) - len(waiting)
    print(f"{len(runs)} runs, {done} of them with a result in {arguments.results}", flush=True)
    # A run whose result is here may have to be made again for those that build on it.
    needed = frozenset().union(*(run.needs for run in waiting))
    lost = [run for run in runs if run.recipe.out in needed and not checkpoints(Path(run.recipe.out))]
    waiting = lost + [run for run in waiting if run not in lost]
    waiting = [] if arguments.report_only else waiting
    check_writable(arguments.results / "results.md")
    (arguments.results / "runs").mkdir(exist_ok=True)
    running: dict[Future, StudyRun] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, context, max_tasks_per_child=1) as pool:
        while waiting or running:
            while len(running) < arguments.workers and (run := next_run(waiting, list(running.values()))):
                waiting.remove(run)
                running[pool.submit(execute, run)] = run
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                save_result(running.pop(future), future.result(), arguments)
                report(arguments.results, load_arms(arguments.recipe))
    report(arguments.results, load_arms(arguments.recipe))
    print(f"done: {arguments.results}/results.md, with its plots")


def next_run(waiting: list[StudyRun], running: list[StudyRun]) -> StudyRun | None:
    """The first of the waiting runs that does not build on an unfinished one."""
    unfinished = {run.recipe.out for run in waiting + running}
    return next((run for run in waiting if not run.needs & unfinished), None)


def save_result(run: StudyRun, result: dict, arguments: Arguments) -> None:
    kept = RESULTS / "runs" / run.result.name
    before = ""
    if kept.exists() and kept != run.result:
        before = f", {last_accuracy(json.loads(kept.read_text()))} in {RESULTS}"
    accuracy = f"held-out {last_accuracy(result)}{before}"
    print(f"{run.arm.name}, seed {run.seed}: {accuracy}, {result['seconds']} s", flush=True)
    run.result.write_text(json.dumps(result, separators=(",", ":")) + "\n")


def last_accuracy(result: dict) -> str:
    return f"{100 * result['evaluations'][-1]['eval_accuracy']:.1f} %"


if __name__ == "__main__":
    with user_errors():
        run_study(tyro.cli(Arguments, description=__doc__))

"""Does GRPO -> SFT -> GRPO beat GRPO alone? Many runs of one recipe, each arm with one thing changed: `make study`.

`recipes/study/arms.toml` lists the arms. Every run has one thread, so as many go side by side as there are cores, and none
depends on how many. A finished run leaves one JSON file in docs/study/runs; a run that has its file is not repeated
unless its recipe has changed, and one that was stopped goes on from its last checkpoint.
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from lab.errors import user_errors
from lab.recipe import Recipe, RecipeError, SFTStage
from lab.recipe import RECIPES, build_recipe, from_dict, merge, read_tables, to_dict
from lab.runfolder import RunFolder
from lab.stages import train
from experiments.study.report import write_report

RESULTS = Path(__file__).parent.parent.parent / "docs" / "study"
STAGED = "staged"  # the arm whose traces an arm of SFT alone imitates
# What of metrics.jsonl goes into the result of a run, beside its evaluations.
KEPT = (
    "reward_mean", "train_accuracy", "pass_at_8", "format_rate", "completion_length", "truncated_fraction",
    "non_latin_fraction", "policy_entropy", "clip_fraction", "log_ratio_std", "grad_norm", "near_fraction", "tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """Run the arms of a study that have no result yet, and write its tables and plots."""

    recipe: Path = RECIPES / "study" / "arms.toml"
    """The recipe that all arms share, with the tables [main] and [ablations]."""
    results: Path = RESULTS
    """Folder for the report and the results it is made from."""
    out: Path = Path("runs/study")
    """Folder for the runs."""
    arms: tuple[str, ...] = ()
    """Only these arms."""
    seeds: int | None = None
    """Seeds of each arm, from 0; default: as the recipe says."""
    workers: int = os.cpu_count() or 1
    """Runs side by side."""
    report_only: bool = False
    """Run nothing, write the report of the results that are there."""


@dataclass(frozen=True)
class Arm:
    """One way to train: a name, and the recipe's tables with its changes merged in."""

    name: str
    tables: dict
    seeds: int
    is_main: bool


@dataclass(frozen=True)
class StudyRun:
    """One run to be made."""

    arm: Arm
    seed: int
    recipe: Recipe
    result: Path


def load_arms(path: Path) -> list[Arm]:
    """The arms of a study's recipe, the main ones first.

    Raises:
        RecipeError: a recipe that cannot be read, or an arm that changes what does not exist.
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
    """The runs in the order of their use: a first seed of every main arm, a second of each, and so on."""
    arms = load_arms(arguments.recipe)
    unknown = set(arguments.arms) - {arm.name for arm in arms}
    if unknown:
        raise RecipeError(f"no arm {sorted(unknown)[0]!r} in {arguments.recipe}; there are {', '.join(a.name for a in arms)}")
    for is_main in (True, False):
        chosen = [a for a in arms if a.is_main == is_main and (not arguments.arms or a.name in arguments.arms)]
        for seed in range(max((arguments.seeds or arm.seeds for arm in chosen), default=0)):
            for arm in chosen:
                if seed < (arguments.seeds or arm.seeds):
                    yield make_task(arguments, arm, seed)


def make_task(arguments: Arguments, arm: Arm, seed: int) -> StudyRun:
    recipe = build_recipe(arm.tables, arguments.recipe)
    traces = arguments.out / STAGED / f"seed_{seed}" / "traces.jsonl"
    stages = tuple(
        replace(stage, traces=str(traces)) if isinstance(stage, SFTStage) and stage.traces == STAGED else stage
        for stage in recipe.stages
    )
    recipe = replace(recipe, seed=seed, stages=stages, out=str(arguments.out / arm.name / f"seed_{seed}"))
    return StudyRun(arm, seed, recipe, arguments.results / "runs" / f"{arm.name.replace(' ', '-')}.{seed}.json")


def up_to_date(task: StudyRun) -> bool:
    """Whether the run has a result, and of the recipe as it is now; fields added since count as their default."""
    if not task.result.exists():
        return False
    try:
        stored = from_dict(Recipe, json.loads(task.result.read_text())["recipe"])
    except RecipeError:
        return False
    return without_paths(stored) == without_paths(task.recipe)


def without_paths(recipe: Recipe) -> Recipe:
    """A recipe but for where things lie."""
    stages = (replace(s, traces="a file") if isinstance(s, SFTStage) and s.traces else s for s in recipe.stages)
    return replace(recipe, out="", stages=tuple(stages))


def run_task(task: StudyRun) -> dict:
    """Make one run, or go on with it, on one thread of its own; its result."""
    torch.set_num_threads(1)
    run = RunFolder(task.recipe.out)
    if run.holds_run:
        try:
            run.check_recipe(task.recipe)
        except RecipeError:
            shutil.rmtree(run.path)  # of an earlier version of the study
    train(task.recipe, resume=run.holds_run, quiet=True)
    return result_of(task, run.metrics())


def result_of(task: StudyRun, rows: list[dict]) -> dict:
    """What is kept of a run: its recipe, its evaluations, and a list for each metric of its GRPO steps."""
    config = json.loads((Path(task.recipe.out) / "config.json").read_text())
    evaluations, tokens = [], 0
    for row in rows:
        tokens += row["tokens"] if row["kind"] == "grpo" and row["step"] else 0
        if "eval_accuracy" in row:
            names = ("stage", "kind", "step", "grpo_steps", "eval_accuracy")
            evaluations.append({name: row[name] for name in names} | {"generated_tokens": tokens})
    steps = [row for row in rows if row["kind"] == "grpo" and row["step"]]
    seconds = sum(row.get(name, 0) for row in rows for name in ("rollout_seconds", "update_seconds", "eval_seconds"))
    return {
        "arm": task.arm.name,
        "seed": task.seed,
        "seconds": round(seconds),
        "evaluations": evaluations,
        "final": {name: value for name, value in rows[-1].items() if name.startswith("final")},
        "steps": {name: [round(row[name], 5) for row in steps] for name in KEPT if steps and name in steps[0]},
        "versions": config["versions"],
        "git_revision": config["git_revision"],
        "recipe": to_dict(task.recipe),
    }


def run_study(arguments: Arguments) -> None:
    tasks = list(plan(arguments))
    waiting = [task for task in tasks if not up_to_date(task)]
    print(f"{len(tasks)} runs, {len(tasks) - len(waiting)} of them with a result in {arguments.results}", flush=True)
    waiting = [] if arguments.report_only else waiting
    (arguments.results / "runs").mkdir(parents=True, exist_ok=True)
    running: dict[Future, StudyRun] = {}
    with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        while waiting or running:
            while len(running) < arguments.workers and (task := next_task(waiting, list(running.values()))):
                waiting.remove(task)
                running[pool.submit(run_task, task)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                save_result(running.pop(future), future.result(), arguments)
    write_report(arguments.results, load_arms(arguments.recipe))
    print(f"done: {arguments.results}/results.md, accuracy.png and training.png")


def next_task(waiting: list[StudyRun], running: list[StudyRun]) -> StudyRun | None:
    """The first of the waiting runs whose traces, if it imitates any, are not still to be sampled."""
    unfinished = {task.recipe.out for task in waiting + running}
    return next((task for task in waiting if not trace_folders(task) & unfinished), None)


def trace_folders(task: StudyRun) -> set[str]:
    """The run folders whose traces a run imitates."""
    stages = task.recipe.stages
    return {str(Path(stage.traces).parent) for stage in stages if isinstance(stage, SFTStage) and stage.traces}


def save_result(task: StudyRun, result: dict, arguments: Arguments) -> None:
    kept = RESULTS / "runs" / task.result.name
    before = f", {last_accuracy(json.loads(kept.read_text()))} in {RESULTS}" if kept.exists() and kept != task.result else ""
    print(f"{task.arm.name}, seed {task.seed}: held-out {last_accuracy(result)}{before}, {result['seconds']} s", flush=True)
    task.result.write_text(json.dumps(result, separators=(",", ":")) + "\n")
    write_report(arguments.results, load_arms(arguments.recipe))


def last_accuracy(result: dict) -> str:
    return f"{100 * result['evaluations'][-1]['eval_accuracy']:.1f} %"


if __name__ == "__main__":
    with user_errors():
        run_study(tyro.cli(Arguments, description=__doc__))

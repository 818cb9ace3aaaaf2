"""Tables and plots of the runs of SmolLM2: docs/real/results.md, accuracy.png and training.png."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np

from data.countdown import Problem
from data.solver import random_attempt
from experiments.study.plots import Panel, plot_accuracy, plot_metrics
from experiments.study.report import picture, table
from experiments.study.results import (
    Estimate,
    Run,
    Runs,
    end_accuracy,
    greedy_accuracy,
    load_runs,
    paired_difference,
)
from lab.plots import save_light_and_dark
from lab.recipe import load_recipe, problems_of

BASELINE = "GRPO"  # the other ablations are compared with this one
WHOLE = "whole"  # the other main arms are compared with this one
LAST = 10  # steps that a metric of training is averaged over
LEGEND = """Written by `python -m experiments.real.run`; [docs/real.md](../real.md) says what follows.
Accuracy is on 512 held-out problems at the end of a run, sampled at temperature 1 and greedy. pass@8,
well-formed, entropy and groups with equal rewards are means over the last ten GRPO steps, whose problems are
new to the model. ± and brackets are 95 % intervals, Student's t over seeds."""


def write_report(results: Path, arms: list) -> None:
    """Write `results.md` and its plots into `results`, from the results in its folder runs."""
    runs = load_runs(results)
    main = {arm.name: runs[arm.name] for arm in arms if arm.is_main and arm.name in runs}
    ablations = {arm.name: runs[arm.name] for arm in arms if not arm.is_main and arm.name in runs}
    parts = ["# Results on SmolLM2-135M-Instruct", LEGEND, "## Answers without a search", floors_table()]
    if main:
        parts += ["## Ways to train", arms_table(main, WHOLE)]
        parts += [picture("accuracy", "Held-out accuracy of the ways to train")]
        panels = (Panel("How far does each way to train get?", tuple(main)),)
        save_light_and_dark(partial(plot_accuracy, main, panels), results / "accuracy.png")
    if ablations:
        parts += ["## One thing changed", arms_table(ablations, BASELINE)]
        parts += [picture("training", "Metrics of the GRPO steps")]
        steps = {arm: [run.steps for run in runs_of_arm] for arm, runs_of_arm in ablations.items()}
        save_light_and_dark(partial(plot_metrics, steps), results / "training.png")
    (results / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def arms_table(arms: Runs, compared_with: str) -> str:
    """A row for each arm: accuracy, what the completions were like, and the cost."""
    columns = [
        "arm", "seeds", "sampled, %", f"against {compared_with}", "greedy, %", "pass@8, %", "well-formed, %",
        "entropy, nats", "equal rewards, %", "s per step", "minutes", "peak, GB",
    ]  # fmt: skip
    rows = []
    for arm, runs in arms.items():
        others = arms.get(compared_with, [])
        shared = {run.seed for run in runs} & {run.seed for run in others}
        difference = paired_difference(runs, others).signed if shared and arm != compared_with else ""
        speeds = [run.seconds_per_step for run in runs if run.seconds_per_step]
        rows.append([
            arm,
            len(runs),
            Estimate.of([end_accuracy(run) for run in runs]),
            difference,
            Estimate.of([greedy_accuracy(run) for run in runs]),
            of_last_steps(runs, "pass_at_8", 100),
            of_last_steps(runs, "format_rate", 100),
            of_last_steps(runs, "policy_entropy", 1, digits=2),
            of_last_steps(runs, "silent_groups", 100),
            f"{fmean(speeds):.0f}" if speeds else "",
            f"{fmean(run.seconds for run in runs) / 60:.0f}",
            f"{max(run.peak_memory_bytes for run in runs) / 1e9:.1f}",
        ])  # fmt: skip
    return table(columns, rows)


def of_last_steps(runs: list[Run], metric: str, scale: float, digits: int = 1) -> str:
    """The mean of a metric over the last GRPO steps and all seeds; empty without GRPO."""
    values = [np.nanmean(run.steps[metric][-LAST:]) for run in runs if metric in run.steps]
    return f"{scale * fmean(values):.{digits}f}" if values else ""


def floors_table() -> str:
    """Accuracy on the held-out problems of answers that ignore the target."""
    recipe = load_recipe("smollm2")[1]
    problems = problems_of(recipe)[1]
    rows = [[name, f"{100 * fmean(map(hits, problems)):.1f}"] for name, hits in floors().items()]
    return table([f"answer, on {len(problems)} problems", "correct, %"], rows)


def floors() -> dict[str, Callable[[Problem], float]]:
    """Name -> chance that such an answer to a problem of three numbers is correct."""

    def a_plus_b_plus_c(problem: Problem) -> float:
        return float(sum(problem.numbers) == problem.target)

    def a_minus_b_plus_c(problem: Problem) -> float:
        a, b, c = problem.numbers
        return float(a - b + c == problem.target)

    def random_steps(problem: Problem) -> float:
        rng = random.Random(str(problem))
        return fmean(random_attempt(problem.numbers, rng).value == problem.target for _ in range(100))

    return {"a + b + c": a_plus_b_plus_c, "a - b + c": a_minus_b_plus_c, "random whole steps": random_steps}

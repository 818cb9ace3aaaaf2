"""The report of a study: `results.md` and its plots, from the results of the runs."""

import math
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from experiments.study.plots import MAIN_PANELS, plot_ablations, plot_accuracy, plot_metrics
from experiments.study.results import (
    BASELINE,
    Estimate,
    Run,
    Runs,
    end_accuracy,
    greedy_accuracy,
    load_runs,
    paired_difference,
)
from lab.plots import save_light_and_dark

TAKE_OFF = 10  # % of held-out accuracy
LEGEND = """`make study` writes this page, and docs/study/README.md explains it. Accuracy *at the end* is on
`evaluation.final_problems` held-out problems, and *at every evaluation* on `evaluation.problems`. ± and
brackets are 95 % intervals, Student's t over seeds. The spread is the standard deviation over seeds. The
largest fall says how far accuracy fell below its earlier best. The length is that of a completion in tokens,
over the last ten steps. An arm of SFT alone also costs the run that made the completions it learns from."""


def write_report(results: Path, arms: list) -> None:
    """Write `results.md` and its plots into `results`, from the results in its folder runs."""
    runs = load_runs(results)
    main = {arm.name: runs[arm.name] for arm in arms if arm.is_main and arm.name in runs}
    ablations = {arm.name: runs[arm.name] for arm in arms if not arm.is_main and arm.name in runs}
    if not main:
        return
    parts = ["# Results of the study", LEGEND, *conclusions(main)]
    parts += [picture("accuracy", "Held-out accuracy of the arms, four questions")]
    parts += [picture("training", "Metrics of the GRPO steps")]
    parts += ["## At the end", end_table(main), "## At every evaluation", evaluation_table(main)]
    if ablations and BASELINE in main:
        parts += ["## One thing changed", ablation_table(main[BASELINE], ablations)]
        parts += [picture("ablations", "Held-out accuracy of the ablations, four questions")]
        save_light_and_dark(partial(plot_ablations, main[BASELINE], ablations), results / "ablations.png")
    (results / "results.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    save_light_and_dark(partial(plot_accuracy, main, MAIN_PANELS), results / "accuracy.png")
    steps = {arm: [run.steps for run in runs_of_arm if run.steps] for arm, runs_of_arm in main.items()}
    save_light_and_dark(partial(plot_metrics, steps), results / "training.png")


def picture(name: str, text: str) -> str:
    """HTML for `name`.png, or `name`-dark.png on a dark page; `text` is for those who cannot see it."""
    dark = f'<source media="(prefers-color-scheme: dark)" srcset="{name}-dark.png">'
    return f'<picture>{dark}<img src="{name}.png" width="800" alt="{text}"></picture>'


def conclusions(main: Runs) -> list[str]:
    """A sentence per comparison: each other arm with GRPO alone, and staged with staged without its SFT."""
    sentences = []
    for arm, other in [*((arm, BASELINE) for arm in main if arm != BASELINE), ("staged", "restart")]:
        if not {arm, other} <= main.keys():
            continue
        difference = paired_difference(main[arm], main[other])
        if difference.count < 2:
            continue
        relation = "cannot be told apart from"
        if difference.low > 0 or difference.high < 0:
            relation = "is better than" if difference.low > 0 else "is worse than"
        greedy = ""
        if all(run.final for run in main[arm] + main[other]):
            greedy = f", greedy {paired_difference(main[arm], main[other], greedy_accuracy).signed}"
        sentences.append(
            f"**{arm}** {relation} **{other}**: {difference.signed} points at the end{greedy} "
            f"(95 % intervals of the difference seed by seed, {difference.count} seeds)."
        )
    return sentences


def table(columns: list[str], rows: list[list]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [columns, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def end_table(main: Runs) -> str:
    """A row for each arm: final accuracy, cost, and how steady training was."""
    tokens = [run.generated_tokens for runs in main.values() for run in runs if run.generated_tokens]
    shared = min(tokens, default=0)
    columns = [
        "arm", "seeds", "final, %", "greedy, %", f"after {shared / 1e6:.2f} M generated tokens, %",
        "spread of seeds", "largest fall", "generated tokens, M", "minutes on one core",
    ]  # fmt: skip
    rows = []
    for arm, runs in main.items():
        ends = [end_accuracy(run) for run in runs]
        greedy = [greedy_accuracy(run) for run in runs if run.final]
        samples = runs[0].generated_tokens > 0
        rows.append([
            arm,
            len(runs),
            Estimate.of(ends),
            Estimate.of(greedy) if greedy else "",
            Estimate.of([run.accuracy_at(shared) for run in runs]) if samples else "",
            f"{stdev(ends):.1f}" if len(ends) > 1 else "",
            f"{mean(run.largest_fall for run in runs):.1f}",
            f"{mean(run.generated_tokens for run in runs) / 1e6:.2f}" if samples else "0",
            f"{mean(run.seconds for run in runs) / 60:.1f}",
        ])  # fmt: skip
    return table(columns, rows)


def evaluation_table(main: Runs) -> str:
    """Mean held-out accuracy in % with its 95 % interval, by GRPO steps; the rows after SFT say so."""
    rows = []
    for point in sorted({point for runs in main.values() for run in runs for point in run.points}):
        steps, after_sft = point
        row = [f"{steps}{', after SFT' if after_sft else ''}"]
        for runs in main.values():
            values = [run.points[point] for run in runs if point in run.points]
            row.append(str(Estimate.of(values)) if values else "")
        rows.append(row)
    return table(["GRPO steps", *main], rows)


def ablation_table(baseline: list[Run], ablations: Runs) -> str:
    """A row for each ablation: how soon it takes off, and its end against GRPO alone."""
    rows = []
    for name, runs in {BASELINE: baseline, **ablations}.items():
        shared = {run.seed for run in runs} & {run.seed for run in baseline}
        difference = paired_difference(runs, baseline).signed if shared and runs is not baseline else ""
        row = [name, len(runs), Estimate.of([end_accuracy(run) for run in runs]), difference]
        passed = [run.passes(TAKE_OFF) for run in runs]
        steps, tokens = ([point[i] for point in passed if not math.isnan(point[i])] for i in range(2))
        row.append(f"{sum(step <= 80 for step in steps)} of {len(runs)}")
        row += (
            [f"{mean(steps):.0f} ({min(steps):.0f} to {max(steps):.0f})", f"{mean(tokens) / 1e6:.2f}"]
            if steps
            else ["", ""]
        )
        has_greedy = all(run.final for run in runs)
        row.append(Estimate.of([greedy_accuracy(run) for run in runs]) if has_greedy else "")
        row.append(f"{mean(np.nanmean(run.steps['completion_length'][-10:]) for run in runs):.0f}")
        rows.append(row)
    over = f"{TAKE_OFF} %"
    columns = [
        "change", "seeds", "final, %", "against grpo, same seeds", f"over {over} by step 80",
        f"GRPO steps to {over}", f"tokens to {over}, M", "greedy, %", "length",
    ]  # fmt: skip
    return table(columns, rows)

"""The plots of a study: accuracy of its arms, and the metrics of their steps."""

import math
from itertools import cycle
from pathlib import Path
from statistics import mean

import numpy as np

from experiments.study.results import BASELINE, Estimate, Run, Runs
from lab.plots import Figure

# The panels of training.png: a title, and its metrics, those drawn thin as True. Shares are shown in %.
PANELS = (
    ("reward", {"reward_mean": False}),
    ("correct (%); thin: pass@8", {"train_accuracy": False, "pass_at_8": True}),
    ("well-formed (%)", {"format_rate": False}),
    ("completion length (tokens)", {"completion_length": False}),
    ("cut off at the limit (%)", {"truncated_fraction": False}),
    ("letters outside Latin script (%)", {"non_latin_fraction": False}),
    ("entropy (nats a token)", {"policy_entropy": False}),
    ("tokens clipped (%)", {"clip_fraction": False}),
)
STYLES = (  # color, line, marker
    ("C0", "-", "o"), ("C1", "--", "s"), ("C2", ":", "^"), ("C4", (0, (5, 1, 1, 1)), "v"), ("C3", "-.", "D"),
)  # fmt: skip


def plot_accuracy(main: Runs, path: Path) -> None:
    """Held-out accuracy with its 95 % interval over GRPO steps, and over generated tokens."""

    def draw(axes, x: list[float], values: list[Estimate], color: str, **look) -> None:
        low, high = [value.low for value in values], [value.high for value in values]
        axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
        axes.plot(x, [value.mean for value in values], color=color, **look)

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_steps, by_tokens = figure.subplots(1, 2, sharey=True)
    last = max(steps for runs in main.values() for run in runs for steps, _ in run.points)
    for (arm, runs), (color, line, marker) in zip(main.items(), cycle(STYLES)):
        points = sorted({point for run in runs for point in run.points})
        values = [Estimate.of([run.points[point] for run in runs if point in run.points]) for point in points]
        x = [steps for steps, _ in points]
        if max(x) == 0:  # no GRPO: a horizontal line at the final accuracy
            x = [0, last]
            values = [values[-1]] * 2
        label = f"{arm} ({len(runs)} seeds)"
        draw(by_steps, x, values, color, linestyle=line, marker=marker, markersize=4, label=label)
        most = min(run.generated_tokens for run in runs)
        if most:
            grid = [most * i / 40 for i in range(41)]
            values = [Estimate.of([run.accuracy_at(tokens) for run in runs]) for tokens in grid]
            draw(by_tokens, [tokens / 1e6 for tokens in grid], values, color, linestyle=line)
    by_steps.set(xlabel="GRPO steps", ylabel="held-out accuracy (%)", ylim=(0, None), xlim=(0, last))
    by_tokens.set(xlabel="generated tokens (millions)", xlim=(0, None))
    by_steps.legend(loc="lower right")
    for axes in (by_steps, by_tokens):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def plot_ablations(baseline: list[Run], ablations: Runs, path: Path) -> None:
    """Held-out accuracy over GRPO steps: baseline and three changes in each panel; thin lines are seeds."""
    names = list(ablations)
    panels = [names[start : start + 3] for start in range(0, len(names), 3)]
    figure = Figure(figsize=(4 * len(panels), 4), layout="constrained")
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, panel in zip(row, panels, strict=True):
        arms = {BASELINE: baseline} | {name: ablations[name] for name in panel}
        for (name, runs), (color, line, _) in zip(arms.items(), STYLES, strict=False):
            points = [{steps: accuracy for (steps, _), accuracy in run.points.items()} for run in runs]
            for of_seed in points:
                axes.plot(of_seed.keys(), of_seed.values(), color=color, linewidth=0.5, alpha=0.4)
            means = {steps: mean(of_seed[steps] for of_seed in points) for steps in points[0]}
            axes.plot(means.keys(), means.values(), color=color, linestyle=line, label=name)
        axes.set(xlabel="GRPO steps", ylim=(0, None), xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", fontsize="small")
    row[0].set_ylabel("held-out accuracy (%)")
    figure.savefig(path, dpi=120)


def plot_metrics(arms: dict[str, list[dict[str, np.ndarray]]], path: Path) -> None:
    """The metrics of GRPO steps, a panel each.

    `arms` has, for each name in the legend, its runs: for each metric, the values by step. Runs are averaged.
    """
    figure = Figure(figsize=(14, 6), layout="constrained")
    grid = figure.subplots(2, 4)
    for axes, (title, names) in zip(grid.flat, PANELS, strict=True):
        scale = 100 if "%" in title else 1
        for (arm, runs), (color, line, _) in zip(arms.items(), cycle(STYLES)):
            for name, thin in names.items():
                series = [run[name] for run in runs if name in run]
                if series:
                    average = scale * np.ma.masked_invalid(series).mean(axis=0).filled(math.nan)
                    style = {"color": color, "linestyle": line, "linewidth": 0.8 if thin else 1.5}
                    axes.plot(range(1, len(average) + 1), average, label=arm, **style)
        drawn = [value for line in axes.lines for value in line.get_ydata() if not math.isnan(value)]
        axes.set(title=title, xlabel="GRPO step", ylim=(0, None if any(drawn) else 1))
        axes.grid(alpha=0.3)
    if len(arms) > 1:
        grid.flat[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)

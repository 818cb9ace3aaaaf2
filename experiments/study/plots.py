"""The plots of a study: accuracy of its arms, and the metrics of their steps."""

import math
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from experiments.study.results import BASELINE, Estimate, Run, Runs, paired_difference
from lab.plots import WIDTH, Figure


@dataclass(frozen=True)
class Panel:
    """Some arms in one plot, with the question that they answer as its title."""

    question: str
    arms: tuple[str, ...]
    by_tokens: bool = False  # over generated tokens instead of GRPO steps


MAIN_PANELS = (
    Panel("Does SFT between two stages of GRPO help?", ("restart", "staged")),
    Panel("Is that better than GRPO alone, or SFT alone?", (BASELINE, "staged", "sft")),
    Panel("Does a limit of 512 tokens instead of 256 help?", (BASELINE, "grpo-512")),
    Panel("And for the same number of generated tokens?", (BASELINE, "grpo-512"), by_tokens=True),
)
ABLATION_PANELS = (
    Panel("Other splits than 8 prompts x 16 samples?", ("32 x 4", "16 x 8", "4 x 32")),
    Panel(
        "Do the rewards and their scaling matter?", ("no format reward", "near-miss reward", "no std scaling")
    ),
    Panel("How high should the learning rate be?", ("half the rate", "twice the rate", "constant rate")),
    Panel("Do warm-up and a second update matter?", ("no warm-up", "1 update")),
)
METRIC_PANELS = (  # a title, and its metrics, those drawn thin as True. Shares are shown in %.
    ("reward", {"reward_mean": False}),
    ("correct (%); thin: pass@8", {"train_accuracy": False, "pass_at_8": True}),
    ("well-formed (%)", {"format_rate": False}),
    ("completion length (tokens)", {"completion_length": False}),
    ("cut off at the limit (%)", {"truncated_fraction": False}),
    ("letters outside Latin script (%)", {"non_latin_fraction": False}),
    ("entropy (nats per token)", {"policy_entropy": False}),
    ("tokens clipped (%)", {"clip_fraction": False}),
)
NAMES = {"restart": "restart: no SFT"}  # of arms that a picture alone would not explain
STYLES = (  # color, line, marker
    ("C0", "-", "o"), ("C1", "--", "s"), ("C2", ":", "^"), ("C3", "-.", "v"), ("C4", (0, (5, 1, 1, 1)), "D"),
)  # fmt: skip
SAME, ABOVE, BELOW, UNKNOWN = "C0", "C2", "C1", "0.5"  # colors of ablations, for what is known of their ends
MEANINGS = {
    SAME: "grpo: mean of its seeds, and the range from the lowest to the highest",
    ABOVE: "ends above grpo (95 % interval of the difference seed by seed)",
    BELOW: "ends below grpo (95 % interval of the difference seed by seed)",
    UNKNOWN: "cannot be told apart from grpo at the end; thin lines are single seeds",
}
End = tuple[float, float, str, str]  # of a line: x, y, name, color


def grid_of(panels: list[Panel], height: float) -> tuple[Figure, list[Axes]]:
    """A figure of two plots per row, each with its panel's question as a title."""
    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, min(2, len(panels)), sharey=True, squeeze=False).flat)
    for unused in axes[len(panels) :]:
        unused.remove()
    for one, panel in zip(axes, panels, strict=False):
        one.set_title(panel.question, loc="left")
        one.set_xlabel("generated tokens (millions)" if panel.by_tokens else "GRPO steps")
    for left in axes[::2]:
        left.set_ylabel("held-out accuracy (%)")
    return figure, axes[: len(panels)]


def label_ends(grid: list[Axes], ends_of: list[list[End]]) -> None:
    """Write the name of each line beside its end, apart from the others' names of its plot.

    Makes room for the names on the right, where the axes have no ticks.
    """
    names = [name for ends in ends_of for _, _, name, _ in ends]
    letters = max(len(line) for name in names for line in name.split("\n"))
    top = max(1, 1.05 * max(axes.dataLim.y1 for axes in grid))
    for axes, ends in zip(grid, ends_of, strict=True):
        last = max(x for x, *_ in ends)
        ends = sorted(ends, key=lambda end: end[1])
        heights = []
        for _, y, name, _ in ends:
            height_of_name = 0.07 * top * len(name.split("\n"))
            heights.append(y if not heights else max(y, heights[-1] + height_of_name))
        too_high = fmean(heights) - fmean(y for _, y, *_ in ends)
        for (x, y, name, color), height in zip(ends, heights, strict=True):
            line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "relpos": (0, 0.5)}
            place = (x + 0.07 * last, height - too_high)
            axes.annotate(name, (x, y), place, color=color, va="center", fontsize=8, arrowprops=line)
        ticks = [tick for tick in axes.get_xticks() if 0 <= tick <= last]
        axes.set(xticks=ticks, xlim=(-0.03 * last, last * (1.08 + 0.025 * letters)), ylim=(0, top))


def plot_accuracy(main: Runs, panels: tuple[Panel, ...], path: Path) -> None:
    """Mean held-out accuracy of some arms in each panel, with its 95 % interval."""
    styles = dict(zip(main, cycle(STYLES)))
    panels = [panel for panel in panels if not main.keys().isdisjoint(panel.arms)]
    figure, grid = grid_of(panels, height=3.4)
    seeds = max(len(main[arm]) for panel in panels for arm in panel.arms if arm in main)
    band = f"Each line is the mean of {seeds} seeds, and its band the 95 % interval of that mean."
    figure.suptitle(band, x=0.01, ha="left", fontsize=9)
    ends_of = []
    for axes, panel in zip(grid, panels, strict=True):
        ends = []
        for arm in (arm for arm in panel.arms if arm in main):
            if not any(run.generated_tokens for run in main[arm]):
                draw_point(axes, arm, main[arm], styles[arm])
            elif panel.by_tokens:
                ends.append(draw_over_tokens(axes, arm, main[arm], styles[arm]))
            else:
                ends.append(draw_over_steps(axes, arm, main[arm], styles[arm]))
        ends_of.append(ends)
    label_ends(grid, ends_of)
    figure.savefig(path)


def draw_point(axes: Axes, arm: str, runs: list[Run], style: tuple) -> None:
    """The end of an arm without GRPO."""
    color, _, marker = style
    end = Estimate.of([list(run.points.values())[-1] for run in runs])
    axes.errorbar(0, end.mean, end.half_width, color=color, marker=marker, markersize=4)
    at, offset, name = (0, end.high), (-3, 3), f"{arm}\n(no GRPO)"
    axes.annotate(name, at, offset, textcoords="offset points", color=color, va="bottom", fontsize=8)


def draw_over_steps(axes: Axes, arm: str, runs: list[Run], style: tuple) -> End:
    """An arm's accuracy over GRPO steps; where it has SFT, a vertical line."""
    color, line, marker = style
    points = sorted({point for run in runs for point in run.points})
    values = [Estimate.of([run.points[point] for run in runs if point in run.points]) for point in points]
    steps = [steps for steps, _ in points]
    draw_band(axes, steps, values, color)
    axes.plot(
        steps, [value.mean for value in values], color=color, linestyle=line, marker=marker, markersize=3
    )
    for step in (steps for steps, after_sft in points if after_sft):
        axes.axvline(step, color=color, linestyle=":", linewidth=0.8)
        axes.annotate("SFT", (step, 0), (3, 3), textcoords="offset points", color=color, fontsize=8)
    return steps[-1], values[-1].mean, NAMES.get(arm, arm), color


def draw_over_tokens(axes: Axes, arm: str, runs: list[Run], style: tuple) -> End:
    """An arm's accuracy over generated tokens, as far as all its seeds went."""
    color, line, _ = style
    fewest = min(run.generated_tokens for run in runs)
    tokens = [fewest * i / 40 for i in range(41)]
    values = [Estimate.of([run.accuracy_at(count) for run in runs]) for count in tokens]
    millions = [count / 1e6 for count in tokens]
    draw_band(axes, millions, values, color)
    axes.plot(millions, [value.mean for value in values], color=color, linestyle=line)
    return millions[-1], values[-1].mean, f"{arm}, until its\nshortest run ends", color


def draw_band(axes: Axes, x: list[float], values: list[Estimate], color: str) -> None:
    """A 95 % interval, with edges so that it can be seen under another."""
    low, high = [value.low for value in values], [value.high for value in values]
    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    axes.plot(x, low, x, high, color=color, alpha=0.5, linewidth=0.6)


def plot_ablations(baseline: list[Run], ablations: Runs, path: Path) -> None:
    """Mean held-out accuracy over GRPO steps, the baseline and a few changes in each panel."""
    named = {name for panel in ABLATION_PANELS for name in panel.arms}
    others = tuple(name for name in ablations if name not in named)
    panels = [panel for panel in ABLATION_PANELS if not ablations.keys().isdisjoint(panel.arms)]
    panels += [Panel("Other changes", others[start : start + 3]) for start in range(0, len(others), 3)]
    figure, grid = grid_of(panels, height=3.2)
    ends_of = []
    for axes, panel in zip(grid, panels, strict=True):
        steps, mean, low, high = over_seeds(baseline)
        axes.fill_between(steps, low, high, color=SAME, alpha=0.2, linewidth=0)
        axes.plot(steps, mean, color=SAME)
        ends = [(steps[-1], mean[-1], BASELINE, SAME)]
        for arm, line in zip(panel.arms, ("--", ":", "-."), strict=False):
            if arm not in ablations:
                continue
            color = color_of_end(ablations[arm], baseline)
            for run in ablations[arm]:
                steps, accuracy, *_ = over_seeds([run])
                axes.plot(steps, accuracy, color=color, linewidth=0.5, alpha=0.5)
            steps, mean, *_ = over_seeds(ablations[arm])
            axes.plot(steps, mean, color=color, linestyle=line)
            ends.append((steps[-1], mean[-1], arm, color))
        ends_of.append(ends)
    label_ends(grid, ends_of)
    used = {color for ends in ends_of for *_, color in ends}
    handles = [Line2D([], [], color=color, label=text) for color, text in MEANINGS.items() if color in used]
    figure.legend(handles=handles, loc="outside upper left", frameon=False)
    figure.savefig(path)


def color_of_end(runs: list[Run], baseline: list[Run]) -> str:
    """The color for an arm that ends above or below the baseline, or for neither."""
    difference = paired_difference(runs, baseline)
    if difference.low > 0:
        return ABOVE
    return BELOW if difference.high < 0 else UNKNOWN


def over_seeds(runs: list[Run]) -> tuple[list[int], list[float], list[float], list[float]]:
    """GRPO steps, and there the mean, lowest and highest accuracy in % of an arm's seeds."""
    by_step = [{steps: accuracy for (steps, _), accuracy in run.points.items()} for run in runs]
    steps = sorted(set.intersection(*(set(of_seed) for of_seed in by_step)))
    columns = [[of_seed[step] for of_seed in by_step] for step in steps]
    return steps, list(map(fmean, columns)), list(map(min, columns)), list(map(max, columns))


def plot_metrics(arms: dict[str, list[dict[str, np.ndarray]]], path: Path) -> None:
    """The metrics of GRPO steps, a panel each.

    `arms` has, for each name in the legend, its runs: for each metric, the values by step. Runs are averaged.
    """
    figure = Figure(figsize=(WIDTH, 10), layout="constrained")
    grid = figure.subplots(4, 2)
    for axes, (title, names) in zip(grid.flat, METRIC_PANELS, strict=True):
        scale = 100 if "%" in title else 1
        for (arm, runs), (color, line, _) in zip(arms.items(), cycle(STYLES)):
            for name, thin in names.items():
                series = [run[name] for run in runs if name in run]
                if series:
                    average = scale * np.ma.masked_invalid(series).mean(axis=0).filled(math.nan)
                    width = 0.6 if thin else 1.3
                    steps = range(1, len(average) + 1)
                    axes.plot(steps, average, label=arm, color=color, linestyle=line, linewidth=width)
        drawn = [value for line in axes.lines for value in line.get_ydata() if not math.isnan(value)]
        axes.set_title(title, loc="left")
        axes.set(xlabel="GRPO step", ylim=(0, None if any(drawn) else 1))
    lines = list(grid.flat[0].lines)
    if len(lines) > 1:
        figure.legend(handles=lines, loc="outside upper left", ncols=len(lines), frameon=False)
    figure.savefig(path)

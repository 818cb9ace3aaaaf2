"""Accuracy over a run beside the paper's, as a table (`curve.md`) and a picture (`curve.png`)."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from data import Countdown
from lab.recipe import Recipe
from lab.runfolder import RunFolder

backend = os.environ.get("MPLBACKEND", "")
if backend.startswith("module://") and not find_spec(backend[9:].split(".")[0]):
    del os.environ["MPLBACKEND"]  # a notebook's, which is not installed here
from matplotlib import cycler, rc_context  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402  without pyplot, which keeps figures and may open windows

WIDTH = 8  # inches; GitHub shows a picture at most 800 pixels wide
SHARED = {"savefig.dpi": 150, "font.size": 9, "axes.titlesize": 10, "axes.grid": True, "grid.linewidth": 0.6}
LIGHT = SHARED | {  # these colors of lines look different to the color-blind too
    "axes.prop_cycle": cycler(color=["#0072b2", "#cc5800", "#008a65", "#b0508c", "#3d3200"]),
    "grid.color": "#e4e6ea",
}
DARK = SHARED | {  # the same, lighter, on the background of GitHub's dark pages
    "axes.prop_cycle": cycler(color=["#56b4e9", "#f5894f", "#7fe3c3", "#d05cb0", "#f0e442"]),
    "grid.color": "#262c36", "figure.facecolor": "#0d1117", "axes.facecolor": "#0d1117",
    "text.color": "#e6edf3", "axes.labelcolor": "#e6edf3", "axes.edgecolor": "#8b949e",
    "xtick.color": "#c3cad3", "ytick.color": "#c3cad3",
}  # fmt: skip
Points = list[tuple[int, float]]  # (step, accuracy in %)
PAPER = {  # by new tokens: (GRPO step, accuracy in %) of Tables 1 and 2 of the paper, with Qwen3-1.7B
    256: list(zip([*range(0, 90, 10), *range(80, 190, 10)], [
        0.0, 0.1, 0.2, 0.2, 3.3, 9.2, 13.5, 21.5, 37.3,
        31.6, 44.0, 44.5, 44.5, 45.5, 44.0, 44.6, 45.8, 45.3, 47.1, 48.8,
    ], strict=True)),
    512: list(zip(range(0, 90, 10), [11.4, 21.1, 28.1, 30.5, 30.2, 31.6, 36.1, 36.4, 39.2], strict=True)),
}  # fmt: skip


def write_curve(run: RunFolder, recipe: Recipe) -> None:
    """Write `curve.md` and `curve.png` from a run's evaluations so far."""
    rows = [row for row in run.metrics() if "eval_accuracy" in row]
    paper = paper_points(recipe)
    (run.path / "curve.md").write_text(curve_table(rows, paper))
    if rows:
        with rc_context(LIGHT):
            plot_curve(rows, paper, run.path / "curve.png", caption=paper_caption(recipe))


def save_light_and_dark(plot: Callable[[Path], None], path: Path) -> None:
    """Draw a picture twice: at `path` for light pages, and beside it, `...-dark.png`, for dark ones."""
    with rc_context(LIGHT):
        plot(path)
    with rc_context(DARK):
        plot(path.with_stem(f"{path.stem}-dark"))


def paper_points(recipe: Recipe) -> Points:
    """The paper's figures for the same task and token limit, by GRPO step; empty if it has none."""
    return PAPER.get(recipe.sampling.max_new_tokens, []) if recipe.task.kind == "countdown" else []


def paper_caption(recipe: Recipe) -> str:
    """Whose the paper's points are, and what keeps them from being compared with this run's."""
    differences = []
    if not recipe.model.endswith("Qwen3-1.7B"):
        differences.append("other model")
    if recipe.task.kind == "countdown" and recipe.task.max_number < Countdown().max_number:
        differences.append("harder problems")
    whose = "the paper's Qwen3-1.7B"
    return f"{whose}:\n{', '.join(differences)}" if differences else whose


def curve_table(rows: list[dict], paper: Points) -> str:
    """A Markdown table, one row per evaluation, with the paper's figure at the same GRPO step."""
    lines = ["# Held-out accuracy\n"]
    columns = ["stage", "step", "GRPO steps", "accuracy (%)", "95 % interval"]
    if paper:
        lines.append("The paper's column is Qwen3-1.7B on Countdown-Tasks-3to4, whatever this run has.\n")
        columns.append("paper (%)")
    lines += ["Intervals are 95 % (Wilson).\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    figures = dict(paper_by_step(rows, paper))
    for row in rows:
        stage = "start" if row["step"] == 0 else f"{row['stage'] + 1} {row['kind']}"
        accuracy = f"{100 * row['eval_accuracy']:.1f}"
        interval = f"{100 * row['eval_low']:.1f} to {100 * row['eval_high']:.1f}"
        cells = [stage, row["step"], row["grpo_steps"], accuracy, interval]
        if paper:
            cells.append(figures.get(row["step"], ""))
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def plot_curve(
    rows: list[dict], paper: Points, path: Path, *, caption: str = "", label: str = "this run"
) -> None:
    """Accuracy with its interval over steps, SFT stages shaded, and the paper's points with their caption."""
    figure = Figure(figsize=(WIDTH, 4.5), layout="constrained")
    axes = figure.subplots()

    # 1. Accuracy, its interval, and the paper's points.
    steps = [row["step"] for row in rows]
    accuracy = [100 * row["eval_accuracy"] for row in rows]
    low = [100 * row["eval_low"] for row in rows]
    high = [100 * row["eval_high"] for row in rows]
    axes.plot(steps, accuracy, color="C0", marker="o", markersize=4, label=label, zorder=3)
    interval = "95 % interval over problems"
    axes.fill_between(steps, low, high, alpha=0.25, color="C0", linewidth=0, label=interval)
    points = paper_by_step(rows, paper)
    if points:
        xs = [step for step, _ in points]
        ys = [value for _, value in points]
        axes.plot(xs, ys, "x", color="C1", markeredgewidth=1.5, label=caption, zorder=3)

    # 2. Stages.
    top = axes.get_xaxis_transform()
    for start, end, kind in stage_spans(rows):
        if kind == "sft":
            axes.axvspan(start, end, color="0.5", alpha=0.15, linewidth=0, zorder=0)
        axes.text((start + end) / 2, 1.01, kind.upper(), ha="center", va="bottom", transform=top)

    # 3. Axes, and the legend.
    last = max(1, steps[-1])
    room = 0.02 * last  # so that the first and the last marker are whole
    axes.set(xlabel="step", ylabel="held-out accuracy (%)", ylim=(-1, None), xlim=(-room, last + room))
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path)


def stage_spans(rows: list[dict]) -> list[tuple[int, int, str]]:
    """(first step, last step, kind) of each stage that has been evaluated."""
    ends = {row["stage"]: (row["step"], row["kind"]) for row in rows if row["step"]}  # the last one's
    spans = []
    start = 0
    for end, kind in ends.values():
        spans.append((start, end, kind))
        start = end
    return spans


def paper_by_step(rows: list[dict], paper: Points) -> Points:
    """The paper's points at this run's steps instead of GRPO steps; those not reached yet are left out.

    Of two figures at a step, the first is from before SFT.
    """
    at_step = {(row["grpo_steps"], row["kind"] == "sft"): row["step"] for row in rows}
    steps = [grpo_steps for grpo_steps, _ in paper]
    keys = [(step, step in steps[:i]) for i, step in enumerate(steps)]
    return [(at_step[key], value) for key, (_, value) in zip(keys, paper, strict=True) if key in at_step]

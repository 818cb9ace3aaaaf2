"""What a run looks like: accuracy beside the paper's tables (`curve.md`, `curve.png`), and `training.png`."""

import math
from itertools import cycle
from pathlib import Path

from lab.recipe import Recipe
from lab.runfolder import RunFolder

# The panels of training.png: a title, and the metrics in it, those with a name as thin lines; shares are
# shown in %.
PANELS = (
    ("reward", {"reward_mean": ""}),
    ("correct (%); thin: pass@8", {"train_accuracy": "", "pass_at_8": "pass@8"}),
    ("well-formed (%)", {"format_rate": ""}),
    ("completion length (tokens)", {"completion_length": ""}),
    ("cut off at the limit (%)", {"truncated_fraction": ""}),
    ("letters outside Latin script (%)", {"non_latin_fraction": ""}),
    ("entropy (nats a token)", {"policy_entropy": ""}),
    ("tokens clipped (%)", {"clip_fraction": ""}),
)
STYLES = (  # color, line, marker
    ("C0", "-", "o"), ("C1", "--", "s"), ("C2", ":", "^"), ("C4", (0, (5, 1, 1, 1)), "v"), ("C3", "-.", "D"),
)  # fmt: skip


def write_curve(run: RunFolder, paper: list[tuple[int, float]]) -> None:
    """Write the evaluations of a run so far into `curve.md` and `curve.png`, its GRPO steps into
    `training.png`.
    """
    rows = [row for row in run.metrics() if "eval_accuracy" in row]
    (run.path / "curve.md").write_text(curve_table(rows, paper))
    if rows:
        plot_curve(rows, paper, run.path / "curve.png")
    steps = [row for row in run.metrics() if row["kind"] == "grpo" and row["step"]]
    if steps:
        known = set().union(*steps)  # a stage of small groups has no pass_at_8
        series = {
            name: [row.get(name, math.nan) for row in steps]
            for _, names in PANELS
            for name in names
            if name in known
        }
        plot_metrics({run.path.name: [series]}, run.path / "training.png")


def paper_points(recipe: Recipe) -> list[tuple[int, float]]:
    """(GRPO step, accuracy in %) of the paper's experiment on the same task with as many new tokens, if it
    has one.
    """
    return recipe.task.published.get(recipe.sampling.max_new_tokens, [])


def curve_table(rows: list[dict], paper: list[tuple[int, float]]) -> str:
    """A Markdown table: one row an evaluation, and the paper's figure at the same GRPO step where it has one.
    """
    about = "The paper's column is Qwen3-1.7B on Countdown-Tasks-3to4, whatever model and problems this run has.\n"
    lines = [
        f"# Held-out accuracy\n\n{about if paper else ''}Intervals are 95 % (Wilson).\n",
        "| stage | step | GRPO steps | accuracy (%) | 95 % interval |" + " paper (%) |" * bool(paper),
        "|---|---|---|---|---|" + "---|" * bool(paper),
    ]
    figures = dict(paper_by_step(rows, paper))
    for row in rows:
        accuracy, low, high = (100 * row[name] for name in ("eval_accuracy", "eval_low", "eval_high"))
        stage = "start" if row["step"] == 0 else f"{row['stage'] + 1} {row['kind']}"
        lines.append(
            f"| {stage} | {row['step']} | {row['grpo_steps']} | {accuracy:.1f} | {low:.1f} to {high:.1f} |"
            + f" {figures.get(row['step'], '')} |" * bool(paper)
        )
    return "\n".join(lines) + "\n"


def plot_curve(rows: list[dict], paper: list[tuple[int, float]], path: Path) -> None:
    """Accuracy with its interval over this run's steps, stages shaded; the paper's points in the GRPO stages.
    """
    from matplotlib.figure import Figure  # without pyplot, which wants a screen and keeps what it draws

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] for row in rows]
    low, high = ([100 * row[name] for row in rows] for name in ("eval_low", "eval_high"))
    axes.fill_between(steps, low, high, alpha=0.2, color="C0", linewidth=0, label="95 % interval")
    axes.plot(
        steps,
        [100 * row["eval_accuracy"] for row in rows],
        marker="o",
        markersize=4,
        color="C0",
        label="this run",
    )
    reference = paper_by_step(rows, paper)
    if reference:
        axes.plot(
            *zip(*reference, strict=True),
            linestyle="none",
            marker="x",
            color="0.4",
            label="paper (Qwen3-1.7B)",
        )
    for start, end, kind in stage_spans(rows):
        if kind == "sft":
            axes.axvspan(start, end, color="0.92", zorder=0)
        axes.text(
            (start + end) / 2,
            1.01,
            kind.upper(),
            ha="center",
            va="bottom",
            transform=axes.get_xaxis_transform(),
        )
    axes.set(xlabel="step", ylabel="held-out accuracy (%)", ylim=(0, None), xlim=(0, max(1, steps[-1])))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def stage_spans(rows: list[dict]) -> list[tuple[int, int, str]]:
    """(first step, last step, kind) of each stage that has been evaluated."""
    spans, start = [], 0
    for index, row in enumerate(rows):
        if row["step"] and (index + 1 == len(rows) or rows[index + 1]["stage"] != row["stage"]):
            spans.append((start, row["step"], row["kind"]))
            start = row["step"]
    return spans


def paper_by_step(rows: list[dict], paper: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The paper's points moved from GRPO steps to this run's steps; those not reached yet are left out.

    The paper gives two figures at step 80, before and after SFT; they go to the GRPO and the SFT evaluation
    there.
    """
    points, seen = [], set()
    at_step = {(row["grpo_steps"], "sft" if row["kind"] == "sft" else "grpo"): row["step"] for row in rows}
    for grpo_steps, value in paper:
        kind = "sft" if grpo_steps in seen else "grpo"
        seen.add(grpo_steps)
        if (grpo_steps, kind) in at_step:
            points.append((at_step[grpo_steps, kind], value))
    return points


def plot_metrics(arms: dict[str, list[dict[str, list[float]]]], path: Path) -> None:
    """What GRPO's rollouts and updates were like over its steps, a panel each.

    Args:
        arms: for each name in the legend, its runs; for each run, a list for each metric. Runs are averaged.
    """
    from matplotlib.figure import Figure  # without pyplot, which wants a screen and keeps what it draws

    figure = Figure(figsize=(14, 6), layout="constrained")
    grid = figure.subplots(2, 4)
    for axes, (title, names) in zip(grid.flat, PANELS, strict=True):
        for (arm, runs), (color, line, _) in zip(arms.items(), cycle(STYLES)):
            for name, label in names.items():
                series = [run[name] for run in runs if name in run]
                if series:
                    scale = 100 if "%" in title else 1
                    average = [scale * sum(values) / len(values) for values in zip(*series, strict=True)]
                    width = 0.8 if label else 1.5
                    axes.plot(
                        range(1, len(average) + 1),
                        average,
                        color=color,
                        linestyle=line,
                        linewidth=width,
                        label=arm,
                    )
        highest = max(
            (value for line in axes.lines for value in line.get_ydata() if value == value), default=0
        )
        axes.set(title=title, xlabel="GRPO step", ylim=(0, None if highest else 1))
        axes.grid(alpha=0.3)
    if len(arms) > 1:
        grid.flat[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)

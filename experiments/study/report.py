"""The report of a study: `results.md` and its plots, from the results of the runs."""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from statistics import mean, stdev

import numpy as np

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
TAKE_OFF = 10  # % of held-out accuracy
BASELINE = "grpo"  # the other arms are compared with this one
LEGEND = """Written by `make study`; docs/study/README.md says what follows. Accuracy *at the end* is on
`evaluation.final_problems` held-out problems, *at every evaluation* on `evaluation.problems`. ± and brackets
are 95 % intervals, Student's t over seeds. Spread is the standard deviation over seeds; largest fall, how far
accuracy fell below its earlier best; length, the tokens of a completion in the last ten steps. An arm of SFT
alone also costs the run that made its traces."""
T_95 = (  # two-sided quantiles of Student's t for 1 to 20 degrees of freedom
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and half the width of its 95 % interval (Student's t); NaN for a single seed."""

    mean: float
    half_width: float
    count: int

    @classmethod
    def of(cls, values: list[float]) -> "Estimate":
        count = len(values)
        if count < 2:
            return cls(values[0], math.nan, count)
        quantile = T_95[min(count, len(T_95) + 1) - 2]
        return cls(mean(values), quantile * stdev(values) / math.sqrt(count), count)

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    @property
    def signed(self) -> str:
        """For a difference: +2.2 (-0.1 to +4.5)."""
        values = (self.mean, self.low, self.high)
        mean, low, high = (round(value, 1) + 0.0 for value in values)  # + 0.0: no minus before a zero
        return f"{mean:+.1f}" + ("" if math.isnan(low) else f" ({low:+.1f} to {high:+.1f})")

    def __str__(self) -> str:
        return f"{self.mean:.1f}" + ("" if math.isnan(self.half_width) else f" ± {self.half_width:.1f}")


@dataclass(frozen=True)
class Run:
    """The result of one run, as `experiments.study.run` saved it."""

    arm: str
    seed: int
    evaluations: list[dict]
    final: dict
    steps: dict[str, np.ndarray]
    seconds: float

    @property
    def points(self) -> dict[tuple[int, bool], float]:
        """Held-out accuracy in % by (GRPO steps so far, whether it is the evaluation at the end of SFT)."""
        last_step = {row["stage"]: row["step"] for row in self.evaluations}
        points = {}
        for row in self.evaluations:
            if row["kind"] == "grpo" or row["step"] == last_step[row["stage"]]:
                after_sft = row["kind"] == "sft" and row["step"] > 0
                points[row["grpo_steps"], after_sft] = 100 * row["eval_accuracy"]
        return points

    @property
    def generated_tokens(self) -> int:
        return self.evaluations[-1]["generated_tokens"]

    def passes(self, accuracy: float) -> tuple[float, float]:
        """(GRPO steps, generated tokens) at which held-out accuracy first passes this one in %, or NaN.

        Interpolated between evaluations.
        """
        for before, after in pairwise(self.evaluations):
            low, high = 100 * before["eval_accuracy"], 100 * after["eval_accuracy"]
            if low < accuracy <= high:
                share = (accuracy - low) / (high - low)
                names = ("grpo_steps", "generated_tokens")
                steps, tokens = (before[name] + share * (after[name] - before[name]) for name in names)
                return steps, tokens
        return math.nan, math.nan

    @property
    def largest_fall(self) -> float:
        """The largest fall of held-out accuracy below its earlier best, in points."""
        best = fall = 0.0
        for accuracy in self.points.values():
            best = max(best, accuracy)
            fall = max(fall, best - accuracy)
        return fall

    def accuracy_at(self, tokens: float) -> float:
        """Held-out accuracy in % after so many generated tokens, interpolated between evaluations."""
        for before, after in pairwise(self.evaluations):
            start, end = before["generated_tokens"], after["generated_tokens"]
            if start <= tokens <= end > start:
                gain = after["eval_accuracy"] - before["eval_accuracy"]
                return 100 * (before["eval_accuracy"] + (tokens - start) / (end - start) * gain)
        return 100 * self.evaluations[-1]["eval_accuracy"]


Runs = dict[str, list[Run]]


def load_runs(results: Path) -> Runs:
    """The results of each arm, by seed."""
    runs: Runs = defaultdict(list)
    for path in sorted((results / "runs").glob("*.json")):
        row = json.loads(path.read_text())
        row["steps"] = {
            name: np.array(values, dtype=float) for name, values in row["steps"].items()
        }  # None is NaN
        fields = ("arm", "seed", "evaluations", "final", "steps", "seconds")
        runs[row["arm"]].append(Run(**{name: row[name] for name in fields}))
    return {arm: sorted(runs_of_arm, key=lambda run: run.seed) for arm, runs_of_arm in runs.items()}


def write_report(results: Path, arms: list) -> None:
    """Write `results.md` and its plots into `results`, from the results in its folder runs."""
    runs = load_runs(results)
    main = {arm.name: runs[arm.name] for arm in arms if arm.is_main and arm.name in runs}
    ablations = {arm.name: runs[arm.name] for arm in arms if not arm.is_main and arm.name in runs}
    if not main:
        return
    parts = ["# Results of the study", LEGEND, *conclusions(main)]
    parts += ["![accuracy](accuracy.png)", "![metrics of the steps](training.png)"]
    parts += ["## At the end", end_table(main), "## At every evaluation", evaluation_table(main)]
    if ablations and BASELINE in main:
        parts += ["## One thing changed", ablation_table(main[BASELINE], ablations)]
        parts += ["![accuracy of the ablations](ablations.png)"]
        plot_ablations(main[BASELINE], ablations, results / "ablations.png")
    (results / "results.md").write_text("\n\n".join(parts) + "\n")
    plot_accuracy(main, results / "accuracy.png")
    steps = {arm: [run.steps for run in runs_of_arm if run.steps] for arm, runs_of_arm in main.items()}
    plot_metrics(steps, results / "training.png")


def end_accuracy(run: Run) -> float:
    return 100 * run.final.get("final_accuracy", run.evaluations[-1]["eval_accuracy"])


def greedy_accuracy(run: Run) -> float:
    """At the end, in %; only where the recipe sets `evaluation.final_problems`."""
    return 100 * run.final["final_greedy_accuracy"]


def paired_difference(
    runs: list[Run], others: list[Run], accuracy: Callable[[Run], float] = end_accuracy
) -> Estimate:
    """Accuracy of `runs` minus that of `others`, over the seeds that both have."""
    by_seed = {run.seed: accuracy(run) for run in others}
    differences = [accuracy(run) - by_seed[run.seed] for run in runs if run.seed in by_seed]
    return Estimate.of(differences or [math.nan])


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

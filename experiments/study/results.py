"""The results of a study's runs, and estimates over seeds."""

import json
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev

import numpy as np

BASELINE = "grpo"  # the other arms are compared with this one
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
    seconds_per_step: float | None = None  # of GRPO; None where there was none, or it was not noted
    peak_memory_bytes: int = 0

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
        names = [field.name for field in fields(Run)]
        runs[row["arm"]].append(Run(**{name: row[name] for name in names if name in row}))
    return {arm: sorted(runs_of_arm, key=lambda run: run.seed) for arm, runs_of_arm in runs.items()}


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

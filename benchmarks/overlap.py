"""Scoring completions while others are sampled, against scoring them afterwards: a rollout step of the embedded model.

    python benchmarks/overlap.py                   # about two minutes on two cores

Both sides go through `rl.rollout.collect_rollouts`; afterwards means that its sampler hands all completions over at its end.
They take turns. Four scorers: Countdown's own; the same with a wait of some milliseconds, as for an answer over a network;
with as much computing in Python, which the sampler has to share the interpreter with; and with as much in NumPy, which
lets go of the interpreter.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

import rl.rollout
from model import generate, load_model
from lab.recipe import problems_of
from lab.recipe import load_recipe
from rl.rollout import Actor, collect_rollouts

VALUES = np.linspace(0, 1, 10_000)


@dataclass(frozen=True)
class Settings:
    """Time rollout steps with their scoring aside, and after."""

    prompts: int = 6
    samples: int = 16
    milliseconds: float = 5.0
    """What the artificial scorers take for a completion, beside Countdown's own scoring."""
    repeats: int = 5


def generate_first(*arguments, on_completion: Callable, **options) -> None:
    """`generate`, with all completions handed over at its end."""
    for prompt, group in enumerate(generate(*arguments, **options)):
        for sample, completion in enumerate(group):
            on_completion(prompt, sample, completion)


def compute() -> None:
    sum(range(4_000))


def compute_outside() -> None:
    np.sin(VALUES)


def repeated(work: Callable[[], None], seconds: float) -> Callable[[], None]:
    """`work` as often as takes `seconds` while nothing else goes on: a fixed amount, however long it takes later."""
    times = []
    for _ in range(200):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    count = max(1, round(seconds / statistics.median(times)))

    def all_of_it() -> None:
        for _ in range(count):
            work()

    return all_of_it


def timed(collect: Callable, sampler: Callable, extra: Callable[[], None]) -> tuple[float, float, list]:
    """(seconds of a rollout step, those of judging, what came out)."""
    judging, judge = [], Actor.judge

    def judge_longer(*arguments):
        start = time.perf_counter()
        extra()
        rollout = judge(*arguments)
        judging.append(time.perf_counter() - start)
        return rollout

    with patch.object(rl.rollout, "generate", sampler), patch.object(Actor, "judge", judge_longer):
        start = time.perf_counter()
        groups = collect()
        return time.perf_counter() - start, sum(judging), groups


def compare(collect: Callable, extra: Callable[[], None], repeats: int) -> list[tuple[float, ...]]:
    """Of each repetition: seconds of sampling and of scoring, after one another; of both after, meanwhile; their ratio."""
    timed(partial(collect, 0), generate, extra)
    found = []
    for seed in range(repeats):
        sides = [generate_first, generate][:: 1 if seed % 2 else -1]
        side = {sampler: timed(partial(collect, seed), sampler, extra) for sampler in sides}
        (after, scoring, groups), (meanwhile, _, same) = side[generate_first], side[generate]
        assert groups == same
        found.append((after - scoring, scoring, after, meanwhile, meanwhile / after))
    return found


def main(settings: Settings) -> None:
    _, recipe = load_recipe("256", "tiny")
    actor = Actor(*load_model("tiny"), recipe.task, recipe.sampling)
    problems = problems_of(recipe)[0][: settings.prompts]
    seconds = settings.milliseconds / 1000
    scorers = {
        "Countdown": lambda: None,
        "and a wait": partial(time.sleep, seconds),
        "and Python": repeated(compute, seconds),
        "and NumPy": repeated(compute_outside, seconds),
    }
    table = Table(
        title=f"{settings.prompts} prompts x {settings.samples}, {torch.get_num_threads()} threads, "
        f"medians of {settings.repeats}, seconds; artificial scorers of {settings.milliseconds:g} ms"
    )
    for column in ("scorer", "sampling", "scoring", "after", "meanwhile", "meanwhile / after", "of single pairs"):
        table.add_column(column)

    def collect(seed: int) -> list:
        return collect_rollouts(actor, problems, settings.samples, seed)

    for name, extra in scorers.items():
        times = compare(collect, extra, settings.repeats)
        medians = [statistics.median(column) for column in zip(*times, strict=True)]
        ratios = sorted(found[-1] for found in times)
        row = [name, *(f"{value:.3f}" for value in medians), f"{ratios[0]:.2f} to {ratios[-1]:.2f}"]
        table.add_row(*row)
        print(*row, flush=True)
    Console(width=140).print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings))

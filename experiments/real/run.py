"""Train SmolLM2 with recipes/smollm2.toml and in other ways beside it: `python -m experiments.real.run`.

The weights come first: `python -m experiments.real.weights`. Each run uses one thread, so two go side by
side on two cores. A finished run leaves a JSON file in docs/real/runs, and docs/real/results.md is written
again. A run that was stopped goes on where it was. recipes/study/smollm2.toml lists the arms.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from experiments.real.report import write_report
from experiments.study import run as study
from lab.errors import user_errors
from lab.recipe import RECIPES

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Arguments:
    """Make the runs of SmolLM2 that have no result yet, and write their tables and plots."""

    model: str = "runs/smollm2-base"
    """The folder of `experiments.real.weights`, or HuggingFaceTB/SmolLM2-135M-Instruct from the hub."""
    arms: tuple[str, ...] = ()
    """Only these arms."""
    seeds: int | None = None
    """Seeds of each arm, counted from 0; default: what the recipe says."""
    results: Path = ROOT / "docs" / "real"
    """Folder for the report and the results."""
    out: Path = Path("runs/real")
    """Folder for the runs."""
    workers: int = os.cpu_count() or 1
    """Runs side by side."""
    report_only: bool = False
    """Make no run; write the report of the existing results."""


def main(arguments: Arguments) -> None:
    study.run_study(
        study.Arguments(
            recipe=RECIPES / "study" / "smollm2.toml",
            results=arguments.results,
            out=arguments.out,
            model=arguments.model,
            arms=arguments.arms,
            seeds=arguments.seeds,
            workers=arguments.workers,
            report_only=arguments.report_only,
        ),
        write_report,
    )


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Arguments, description=__doc__))

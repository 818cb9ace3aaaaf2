"""What low precision costs in learning: GRPO of the embedded model in float32 and in several cheaper
variants.

    python benchmarks/precision.py --out runs/precision  # an hour on two cores; resumes where it stopped

Every variant runs the GRPO stage of recipe 256-tiny for a few dozen steps with several seeds. The table
shows mean and range over the seeds of the final held-out accuracy and of the reward over the last ten steps.
"""

import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import tyro
from rich.console import Console
from rich.table import Table

from lab.checkpoint import checkpoints
from lab.recipe import AdapterSettings, Recipe, load_recipe
from lab.runfolder import RunFolder
from lab.stages import train

VARIANTS = {
    "float32": {},
    "8-bit moments": {"kind": "adamw8bit"},
    "bfloat16, masters": {"dtype": "bfloat16"},
    "bfloat16, stochastic rounding": {"dtype": "bfloat16", "rounding": "stochastic"},
    "int8 weights, adapters": {"int8": True},
    "float32 weights, adapters": {"int8": False},
}


@dataclass(frozen=True)
class Settings:
    """Compare learning in low precision with float32."""

    out: Path = Path("runs/precision")
    """Folder of the runs."""
    variant: tuple[str, ...] = tuple(VARIANTS)
    """Which to run."""
    steps: int = 40
    """GRPO steps of each run."""
    seeds: int = 3
    """Runs of each variant."""
    adapter_rank: int = 16
    """Rank of the adapters."""
    adapter_rate: float = 1e-3
    """Learning rate of the adapters."""


def recipe_of(name: str, seed: int, settings: Settings) -> Recipe:
    _, recipe = load_recipe("256", "tiny")
    changes = dict(VARIANTS[name])
    stage = replace(recipe.stages[0], steps=settings.steps)
    if "int8" in changes:
        stage = replace(stage, learning_rate=settings.adapter_rate)
        adapters = AdapterSettings(
            settings.adapter_rank, alpha=2 * settings.adapter_rank, int8=changes.pop("int8")
        )
        recipe = replace(recipe, adapters=adapters)
    dtype = changes.pop("dtype", recipe.dtype)
    out = settings.out / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
    return replace(
        recipe, model="tiny", seed=seed, out=str(out), stages=(stage,), dtype=dtype,
        optimizer=replace(recipe.optimizer, **changes), evaluation=replace(recipe.evaluation, every=20),
    )  # fmt: skip


def outcome(recipe: Recipe, steps: int) -> tuple[float, float]:
    """Held-out accuracy at the end, and mean reward of the last ten steps; the run is made where it is
    missing."""
    run = RunFolder(recipe.out)
    if not any(row["step"] == steps and "eval_accuracy" in row for row in run.metrics()):
        train(recipe, resume=bool(checkpoints(run.path)), quiet=True)
    rows = run.metrics()
    return rows[-1]["eval_accuracy"], statistics.mean(row["reward_mean"] for row in rows[-10:])


def main(settings: Settings) -> None:
    table = Table(title=f"{settings.steps} GRPO steps, {settings.seeds} seeds: mean and range")
    for column in ("variant", "held-out accuracy, %", "reward, last 10 steps"):
        table.add_column(column)
    for name in settings.variant:
        found = []
        for seed in range(settings.seeds):
            found.append(outcome(recipe_of(name, seed, settings), settings.steps))
            print(f"{name}, seed {seed}: {100 * found[-1][0]:.1f} %, reward {found[-1][1]:.3f}", flush=True)
        accuracy, reward = zip(*found, strict=True)
        percent = (
            f"{100 * statistics.mean(accuracy):.1f} ({100 * min(accuracy):.1f} to {100 * max(accuracy):.1f})"
        )
        rewards = f"{statistics.mean(reward):.3f} ({min(reward):.3f} to {max(reward):.3f})"
        table.add_row(name, percent, rewards)
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Settings))

"""Make the result of `make train-256` the bundled model `tiny-256`: `make tiny-256`."""

import shutil
from pathlib import Path

import tyro

from lab.checkpoint import DIGESTS, OPTIMIZER, checkpoints
from lab.errors import user_errors
from lab.recipe import RecipeError
from model.weights import BUNDLED


def main(run: tyro.conf.Positional[Path] = Path("runs/256-tiny")) -> None:
    """Copy the last checkpoint of a run, without what only resuming needs."""
    folders = checkpoints(run)
    if not folders:
        raise RecipeError(f"{run} has no checkpoint: make train-256 first")
    shutil.rmtree(BUNDLED["tiny-256"], ignore_errors=True)
    shutil.copytree(folders[-1], BUNDLED["tiny-256"], ignore=shutil.ignore_patterns(DIGESTS, OPTIMIZER))
    for path in BUNDLED["tiny-256"].iterdir():
        path.chmod(0o644)
    print(f"{folders[-1]} is now {BUNDLED['tiny-256']}")


if __name__ == "__main__":
    with user_errors():
        tyro.cli(main)

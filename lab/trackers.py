"""Where metrics are shown besides metrics.jsonl: TensorBoard always, Weights & Biases with --wandb."""

import math
import secrets
from pathlib import Path

from lab.recipe import RecipeError


class TensorBoard:
    """Event files in the run folder; opened with the first row, since the import is slow."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.writer = None

    def log(self, row: dict) -> None:
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.folder), purge_step=row["step"])
        for name, value in numbers(row).items():
            self.writer.add_scalar(name, value, row["step"])
        self.writer.flush()


class WandB:
    """Weights & Biases, which is installed separately; a resumed run goes on under the id in its folder."""

    def __init__(self, folder: Path, config: dict):
        """RecipeError: it is not installed, or does not start."""
        try:
            import wandb
        except ImportError:
            advice = "pip install wandb, or leave out --wandb"
            raise RecipeError(f"Weights & Biases is not installed: {advice}") from None
        id_file = folder / "wandb_id"  # of this run alone, not of any that was in a folder of this name
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        options = {"project": "group-relative-rl", "name": "-".join(folder.parts[-2:])}
        options |= {"id": id_file.read_text(), "resume": "allow"}
        try:
            self.run = wandb.init(**options, dir=str(folder), config=config)
        except Exception as error:  # its own errors differ from version to version
            raise RecipeError(f"Weights & Biases does not start ({error}); try WANDB_MODE=offline") from None

    def log(self, row: dict) -> None:
        self.run.log(numbers(row), step=row["step"])


def numbers(row: dict) -> dict[str, float]:
    """What of `row` can be drawn: numbers that were measured, without the step."""
    values = {
        name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "step"
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}

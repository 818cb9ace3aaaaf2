"""TensorBoard and Weights & Biases, which draw what metrics.jsonl holds."""

import math
import secrets
from pathlib import Path

from lab.recipe import RecipeError


class Boards:
    """TensorBoard, and with `start_wandb` Weights & Biases, for the run in the folder `path`."""

    def __init__(self, path: Path):
        self.path = path
        self.tensorboard = None
        self.wandb = None

    def start_wandb(self, config: dict) -> None:
        """Log to Weights & Biases too, which is installed separately. RecipeError: it is not, or fails."""
        try:
            import wandb
        except ImportError:
            advice = "pip install wandb, or leave out --wandb"
            raise RecipeError(f"Weights & Biases is not installed: {advice}") from None
        id_file = self.path / "wandb_id"  # of this run alone, which a resumed one goes on under
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        try:
            self.wandb = wandb.init(
                project="pocketgrpo",
                name="-".join(self.path.parts[-2:]),
                id=id_file.read_text(),
                resume="allow",
                dir=str(self.path),
                config=config,
            )
        except Exception as error:  # its own errors differ from version to version
            raise RecipeError(f"Weights & Biases does not start ({error}); try WANDB_MODE=offline") from None

    def log(self, row: dict) -> None:
        """Log those metrics of a step that can be drawn."""
        if self.tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter  # here, since the import is slow

            self.tensorboard = SummaryWriter(str(self.path), purge_step=row["step"])
        numbers = {}
        for name, value in row.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                numbers[name] = value
                self.tensorboard.add_scalar(name, value, row["step"])
        self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log(numbers, step=row["step"])

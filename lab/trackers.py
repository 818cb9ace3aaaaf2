"""Where the lines of metrics.jsonl are shown too: TensorBoard always, Weights & Biases if it is asked for."""

from pathlib import Path

from lab.recipe import RecipeError


class TensorBoard:
    """Event files in the run folder; opened with the first line, since the import is slow."""

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
    """Weights & Biases, which is installed separately; a resumed run goes on under the same id."""

    def __init__(self, folder: Path, config: dict):
        """Raises RecipeError where it is not installed, or will not start."""
        try:
            import wandb
        except ImportError:
            raise RecipeError("Weights & Biases is not installed: pip install wandb, or leave out --wandb") from None
        name = "-".join(folder.parts[-2:])
        try:
            self.run = wandb.init(
                project="group-relative-rl", name=name, id=name, resume="allow", dir=str(folder), config=config
            )
        except Exception as error:  # its own errors differ from version to version
            raise RecipeError(f"Weights & Biases does not start ({error}); try WANDB_MODE=offline") from None

    def log(self, row: dict) -> None:
        self.run.log(numbers(row), step=row["step"])


def numbers(row: dict) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "step"}

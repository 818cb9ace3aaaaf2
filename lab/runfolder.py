"""The folder of a run: its configuration, metrics and rollouts, and the lock that keeps other runs out."""

import contextlib
import json
import math
import platform
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from data.load import read_jsonl
from data.task import Task
from data.traces import Trace
from lab.recipe import Recipe, RecipeError, from_dict
from model.weights import read_json
from rl.rollout import Rollout

# What may differ when a run is resumed: where it lies, and what changes memory and speed only.
FREE_ON_RESUME = {
    "out", "sampling.max_cache_tokens", "optimizer.micro_batch_tokens",
    "optimizer.activation_checkpointing", "checkpoint_every", "checkpoint_share", "keep_checkpoints",
}  # fmt: skip


class RunFolder:
    """`runs/<name>/`: config.json, metrics.jsonl, of which all else is a view, rollouts/ and checkpoints/."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.metrics_path = self.path / "metrics.jsonl"
        self.board = self.wandb = None

    @property
    def holds_run(self) -> bool:
        return (self.path / "config.json").exists()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for the block. RecipeError: another process has it, or it cannot be written."""
        lock = FileLock(self.path / "lock", timeout=0)  # the system drops that of a process that died
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            advice = "wait for it, or name another folder by --out"
            raise RecipeError(f"{self.path} is in use by another process: {advice}") from None
        except OSError as error:
            raise RecipeError(f"{self.path}: the run folder cannot be written: {error.strerror}") from None
        try:
            yield
        finally:
            if {path.name for path in self.path.iterdir()} <= {"lock"}:  # nothing came of the run
                shutil.rmtree(self.path)
            lock.release()  # only now, so that no other run can be in the folder that is removed

    def check_free(self) -> None:
        """Refuse, by a RecipeError, to start a run where there is one."""
        if self.holds_run:
            advice = "go on with it by --resume, or name another folder by --out"
            raise RecipeError(f"{self.path} already holds a run; {advice}")

    def create(self, recipe: Recipe, problems: dict[str, str]) -> None:
        """Write config.json, with which a run begins; `problems` are hashes. RecipeError: there is a run."""
        self.check_free()
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions["platform"] = platform.platform()
        config = {"recipe": asdict(recipe), "problems": problems}
        config |= {"versions": versions, "git_revision": git_revision()}
        write_whole(self.path / "config.json", json.dumps(config, indent=2) + "\n")

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse to resume under a recipe that differs from the run's in more than `FREE_ON_RESUME`."""
        try:
            stored = from_dict(Recipe, read_json(self.path / "config.json")["recipe"])
        except (ValueError, KeyError) as error:
            raise RecipeError(f"{self.path}: no run to resume here: {error}") from None
        started, given = flatten(asdict(stored)), flatten(asdict(recipe))
        for name in started | given:
            old, new = started.get(name), given.get(name)
            if name not in FREE_ON_RESUME and old != new:
                advice = "to go on from it, give its last checkpoint as --model, and another --out"
                raise RecipeError(f"{self.path} was started with {name} = {old!r}, not {new!r}; {advice}")

    def check_problems(self, problems: dict[str, str]) -> None:
        """Refuse to resume with other problems than the run was started with, by their hashes."""
        started = read_json(self.path / "config.json").get("problems")
        if started != problems:
            advice = "give it those, or start a new run"
            raise RecipeError(f"{self.path} was started with other problems ({started}): {advice}")

    def rewind(self, step: int) -> None:
        """Delete metrics and rollouts of the steps after `step`, which a resumed run writes again."""
        lines = [json_line(row) for row in self.metrics() if row["step"] <= step]
        write_whole(self.metrics_path, "".join(lines))
        for path in self.rollout_files():
            if step_of(path) > step:
                path.unlink()

    def log(self, row: dict) -> None:
        """Append one line to metrics.jsonl; what of it can be drawn goes to TensorBoard and W&B."""
        with open(self.metrics_path, "a") as file:
            file.write(json_line(row))
        if self.board is None:
            from torch.utils.tensorboard import SummaryWriter  # here, since the import is slow

            self.board = SummaryWriter(str(self.path), purge_step=row["step"])
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        numbers = {name: value for name, value in numbers.items() if math.isfinite(value) and name != "step"}
        for name, value in numbers.items():
            self.board.add_scalar(name, value, row["step"])
        self.board.flush()
        if self.wandb is not None:
            self.wandb.log(numbers, step=row["step"])

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
        options = {"project": "pocketgrpo", "name": "-".join(self.path.parts[-2:])}
        options |= {"id": id_file.read_text(), "resume": "allow"}
        try:
            self.wandb = wandb.init(**options, dir=str(self.path), config=config)
        except Exception as error:  # its own errors differ from version to version
            raise RecipeError(f"Weights & Biases does not start ({error}); try WANDB_MODE=offline") from None

    def metrics(self) -> list[dict]:
        """All lines of metrics.jsonl, null as NaN; a last line cut short by a crash is left out."""
        rows = []
        for line in self.metrics_path.read_text().splitlines() if self.metrics_path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                break
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
        return rows

    def save_rollouts(self, step: int, stage: int, groups: list[list[Rollout]], advantages: Tensor) -> None:
        """Write rollouts/step_NNNN.jsonl: each completion with verdict and advantage [groups, samples]."""
        path = self.path / "rollouts" / f"step_{step:04d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            for number, group in enumerate(groups):
                for rollout, advantage in zip(group, advantages[number].tolist(), strict=True):
                    ids, logprobs = rollout.completion.token_ids, rollout.completion.logprobs
                    row = {"stage": stage, "group": number} | rollout.problem.row()
                    row |= {"reward": rollout.reward, "outcome": rollout.outcome}
                    row |= {"advantage": round(advantage, 4), "finished": rollout.completion.finished}
                    row |= {"tokens": len(ids), "completion": rollout.text, "token_ids": ids}
                    row["logprobs"] = [round(logprob, 3) for logprob in logprobs]
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def rollout_files(self) -> list[Path]:
        return sorted((self.path / "rollouts").glob("step_*.jsonl"), key=step_of)

    def correct_traces(self, stage: int, task: Task) -> list[Trace]:
        """The finished, correct rollouts of one stage."""
        traces = []
        for path in self.rollout_files():
            for _, row in read_jsonl(path, "a rollout"):
                if row["stage"] == stage and row["outcome"] == "correct" and row["finished"]:
                    traces.append(Trace(task.problem(row), row["completion"], step_of(path)))
        return traces


def json_line(row: dict) -> str:
    """A line of metrics.jsonl, NaN and infinities as null."""
    plain = {}
    for name, value in row.items():
        plain[name] = None if isinstance(value, float) and not math.isfinite(value) else value
    return json.dumps(plain) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once, so that a kill leaves the old content or the new."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(text)
    temporary.replace(path)


def step_of(path: Path) -> int:
    """The step in the name of rollouts/step_NNNN.jsonl or checkpoints/step_NNNN."""
    return int(path.stem.removeprefix("step_"))


def git_revision() -> str | None:
    """The commit of the code, or None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def flatten(value, name: str = "") -> dict:
    """{"a": {"b": [1]}} -> {"a.b.0": 1}, the way fields are named on the command line."""
    if not isinstance(value, (dict, list, tuple)):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    flat = {}
    for key, item in items:
        flat |= flatten(item, f"{name}.{key}" if name else str(key))
    return flat

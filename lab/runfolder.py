"""The folder of a run: its configuration, metrics and rollouts, and the lock that keeps other runs out."""

import contextlib
import errno
import json
import math
import os
import platform
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
    """`runs/<name>/`: config.json, metrics.jsonl, rollouts/, checkpoints/, and plots drawn from these."""

    def __init__(self, path: str | Path):
        self.path = Path(os.path.expanduser(path))
        self.metrics_path = self.path / "metrics.jsonl"

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
                with contextlib.suppress(OSError):  # a link, a mount point, or in a folder of somebody else's
                    (self.path / "lock").unlink()
                    self.path.rmdir()
            lock.release()  # only now, so that no other run can be in the folder that is removed

    def check_free(self) -> None:
        """Refuse, by a RecipeError, to start a run where there is one."""
        if self.holds_run:
            advice = "go on with it by --resume, or name another folder by --out"
            raise RecipeError(f"{self.path} already holds a run; {advice}")

    def create(self, recipe: Recipe, problems: dict[str, str]) -> None:
        """Write config.json, with which a run begins; `problems` are hashes."""
        config = {
            "recipe": asdict(recipe),
            "problems": problems,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "platform": platform.platform(),
            },
            "git_revision": git_revision(),
        }
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
        """Delete metrics and rollouts of the steps after `step`, which a resumed run writes again.

        `step` is that of the checkpoint it goes on from, -1 if there is none. RecipeError: metrics up to
        `step` are missing, or it has saved checkpoints and none is left.
        """
        rows = self.metrics()
        advice = "put it back, or begin a new run by another --out"
        if step < 0 and any(row.get("checkpoint_seconds") for row in rows):
            folder = self.path / "checkpoints"
            raise RecipeError(f"{folder}: no whole checkpoint of this run is left: {advice}")
        missing = set(range(step + 1)) - {row["step"] for row in rows}
        if missing:
            raise RecipeError(f"{self.metrics_path} has nothing on step {min(missing)} of this run: {advice}")
        self.write_metrics([row for row in rows if row["step"] <= step])
        for path in self.rollout_files():
            if step_of(path) > step:
                path.unlink()

    def write_metrics(self, rows: list[dict]) -> None:
        """Replace metrics.jsonl."""
        write_whole(self.metrics_path, "".join(map(json_line, rows)))

    def log(self, row: dict) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.metrics_path, "a", encoding="utf-8") as file:
            file.write(json_line(row))

    def metrics(self) -> list[dict]:
        """All lines of metrics.jsonl, null as NaN; a last line cut short by a crash is left out.

        RecipeError: another line cannot be read.
        """
        if not self.metrics_path.exists():
            return []
        rows = []
        lines = self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                rows.append({name: math.nan if value is None else value for name, value in row.items()})
            except (ValueError, AttributeError):
                if number < len(lines):
                    raise RecipeError(
                        f"{self.metrics_path}, line {number}: not the metrics of a step"
                    ) from None
        return rows

    def sync(self) -> None:
        """Wait until metrics and rollouts are on the disk: a checkpoint must not outlive what led to it."""
        for path in [self.metrics_path, *self.rollout_files()]:
            sync(path)

    def save_rollouts(self, step: int, stage: int, groups: list[list[Rollout]], advantages: Tensor) -> None:
        """Write rollouts/step_NNNN.jsonl: each completion with verdict and advantage [groups, samples]."""
        path = self.rollout_file(step)
        path.parent.mkdir(exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            for number, group in enumerate(groups):
                for rollout, advantage in zip(group, advantages[number].tolist(), strict=True):
                    completion = rollout.completion
                    row = {"stage": stage, "group": number} | rollout.problem.row()
                    row |= {
                        "reward": rollout.reward,
                        "outcome": rollout.outcome,
                        "advantage": round(advantage, 4),
                        "finished": completion.finished,
                        "tokens": len(completion.token_ids),
                        "completion": rollout.text,
                        "token_ids": completion.token_ids,
                        "logprobs": [round(logprob, 3) for logprob in completion.logprobs],
                    }
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def rollout_file(self, step: int) -> Path:
        return self.path / "rollouts" / f"step_{step:04d}.jsonl"

    def rollout_files(self) -> list[Path]:
        """rollouts/step_NNNN.jsonl in the order of steps; other files there are not the run's."""
        files = (self.path / "rollouts").glob("step_*.jsonl")
        return sorted((path for path in files if path.stem[5:].isdecimal()), key=step_of)

    def correct_traces(self, stage: int, task: Task) -> list[Trace]:
        """The finished, correct rollouts of one stage. RecipeError: the rollouts of a step are missing."""
        traces = []
        for step in [row["step"] for row in self.metrics() if row["stage"] == stage and row["step"]]:
            path = self.rollout_file(step)
            if not path.exists():
                raise RecipeError(f"{path} is missing, from which the sft stage learns: put it back")
            for _, row in read_jsonl(path, "a rollout"):
                if row["outcome"] == "correct" and row["finished"]:
                    traces.append(Trace(task.problem_from_row(row), row["completion"], step))
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
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def sync(path: Path) -> None:
    """Wait until the content of a file or folder is on the disk, so that it survives a power cut.

    Some network file systems cannot do that for a folder; their error is ignored.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)):
            raise
    finally:
        os.close(descriptor)


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

"""What the commands print, and how they fail: one clear line, exit code 2, no traceback."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress

from data import DataError
from model import ModelError
from lab.recipe import RecipeError


@contextlib.contextmanager
def user_errors(out_of_memory: str = "take a smaller model"):
    """Turn errors that a user can do something about into one line on standard error and exit code 2.

    Other exceptions are bugs of this project and keep their traceback. Ctrl-C ends in one line too, with exit
    code 130; what its KeyboardInterrupt was raised with is said there. `out_of_memory` is what to do about a full GPU.
    """
    try:
        yield
    except (ModelError, DataError, RecipeError) as error:
        fail(str(error))
    except torch.OutOfMemoryError:
        fail(f"out of GPU memory: {out_of_memory}")
    except BrokenPipeError:
        sys.exit(0)  # whoever read the output has seen enough
    except OSError as error:
        fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt as stop:
        print("\nstopped.", *stop.args, file=sys.stderr)
        sys.exit(getattr(stop, "exit_code", 130))


def fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def sampling_progress(what: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Gives what `generate` takes as `progress`: a line at the bottom of a terminal, gone when the block ends."""
    console, start = Console(stderr=True), time.perf_counter()
    columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total} completions  {task.fields[rate]}")
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as lines:
        task = lines.add_task(what, total=total, rate="")

        def show(done: int, tokens: int) -> None:
            lines.update(task, completed=done, rate=f"{tokens / (time.perf_counter() - start):,.0f} tokens/s")

        yield show


def printable(text: str) -> str:
    """A completion as it may go to a terminal: what would move the cursor or change colors there becomes a dot."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{MIDDLE DOT}" for letter in text)


def describe_run(recipe, model, train, held_out, resumed_at: int | None) -> str:
    """The lines a run begins with."""
    device = torch.cuda.get_device_name() if model.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    dtype = str(model.dtype).removeprefix("torch.")
    lines = [
        f"model     {recipe.model}: {model.config.num_parameters():,} parameters, {dtype}, on {device}",
        f"problems  {len(train):,} to train on, {len(held_out):,} held out",
        f"stages    {', '.join(describe_stage(stage) for stage in recipe.stages) or 'none: zero-shot evaluation only'}",
        f"run       {recipe.out}" + ("" if resumed_at is None else f", resumed after step {resumed_at}"),
    ]
    return "\n".join(lines)


def describe_stage(stage) -> str:
    if stage.kind == "sft":
        return f"SFT {stage.epochs} epochs"
    return f"GRPO {stage.steps} steps of {stage.prompts_per_step} x {stage.samples_per_prompt}"


def step_line(row: dict, stages: int, done: int, steps: int) -> str:
    """One line a step, from its metrics."""
    if row["step"] == 0:
        return f"before any step: held-out accuracy {evaluation_text(row)}"
    seconds = row.get("rollout_seconds", 0.0) + row["update_seconds"]
    parts = [f"{row['kind']:4} {row['stage'] + 1}/{stages}  {done:3}/{steps}", *step_figures(row), f"{seconds:.1f} s"]
    if row.get("skipped_updates"):
        parts.append(f"{row['skipped_updates']} updates not finite, left out")
    if "eval_accuracy" in row:
        parts.append(f"held-out {evaluation_text(row)}")
    return "  ".join(parts)


def step_figures(row: dict) -> list[str]:
    """What a step's metrics say first."""
    if row["kind"] == "sft":
        return [f"loss {row['loss']:.4f}", f"grad {row['grad_norm']:.2f}"]
    return [
        f"reward {row['reward_mean']:.3f}",
        f"correct {100 * row['train_accuracy']:4.1f} %",
        f"format {100 * row['format_rate']:3.0f} %",
        f"length {row['completion_length']:3.0f}",
        f"grad {row['grad_norm']:.2f}",
    ]


def final_line(row: dict, problems: int) -> str:
    sampled, greedy = evaluation_text(row, "final"), evaluation_text(row, "final_greedy")
    return f"final, {problems:,} held-out problems: {sampled} as sampled in training, {greedy} greedy"


def evaluation_text(row: dict, which: str = "eval") -> str:
    accuracy, low, high = (100 * row[f"{which}_{name}"] for name in ("accuracy", "low", "high"))
    return f"{accuracy:.1f} % ({low:.1f} to {high:.1f})"

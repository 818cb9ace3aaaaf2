"""The output of a run: lines, with a progress bar on a terminal, or nothing."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lab.device import has_bfloat16
from lab.recipe import Recipe

LEAST_WIDTH = 40  # columns of a terminal, to draw on it
PLAIN_WIDTH = 80  # columns at least, elsewhere
MANY_EQUAL = 0.8  # share of groups with equal rewards, from which on a run gives advice,
GOOD_ACCURACY = 0.6  # unless the accuracy is above this one
LOW_ENTROPY = 0.08  # nats per token of a policy that has stopped exploring
OnProgress = Callable[[int, int], None]


class Screen:
    """Prints lines, with a progress bar during sampling on a terminal; `plain`: no bar, `quiet`: nothing."""

    def __init__(self, quiet: bool = False, plain: bool = False):
        self.quiet = quiet
        self.plain = plain

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)

    def sampling(self, what: str, total: int) -> contextlib.AbstractContextManager[OnProgress | None]:
        """A context that gives an `on_progress` for `generate`, or None, during `total` completions."""
        if self.quiet or self.plain:
            return contextlib.nullcontext()
        return progress_bar(what, total)


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Iterator[OnProgress | None]:
    """Gives an `on_progress` that draws a bar on the last line of a terminal; None without a terminal."""
    console = plain_console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    start = time.perf_counter()
    counts = "{task.completed}/{task.total} completions  {task.fields[rate]}"
    description = TextColumn("{task.description}", markup=False)
    with Progress(description, BarColumn(), counts, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total, rate="")

        def show(done: int, tokens: int) -> None:
            bar.update(task, completed=done, rate=f"{tokens / (time.perf_counter() - start):,.0f} tokens/s")

        yield show


def plain_console(stderr: bool = False, least_width: int = 0) -> Console:
    """A console that shows texts as they are: `[/b]` and `:-)` in a problem or a path are no commands.

    A panel's title reads markup all the same; give it a `Text`. Where nothing can be drawn, rich is told that
    there is no terminal, whatever FORCE_COLOR says. `least_width` is in columns, for a table that needs them.
    """
    draws = can_draw(sys.stderr if stderr else sys.stdout)
    console = Console(
        stderr=stderr,
        markup=False,
        highlight=False,
        emoji=False,
        force_terminal=draws,
        force_interactive=draws,
    )
    if least_width or not draws:
        console.width = max(least_width, PLAIN_WIDTH, console.width)
    return console


def can_draw(stream: TextIO) -> bool:
    """Whether `stream` is a terminal whose cursor can be moved, and not a log; elsewhere lines are plain."""
    moves = os.environ.get("TERM") not in (None, "", "dumb", "unknown")
    is_log = os.environ.get("CI") not in (None, "", "0", "false")
    return stream.isatty() and moves and not is_log and shutil.get_terminal_size().columns >= LEAST_WIDTH


def printable(text: str) -> str:
    """Text that is safe on a terminal: characters that could move the cursor or change colors become dots."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{MIDDLE DOT}" for letter in text)


def describe_run(recipe: Recipe, model, train: list, held_out: list, resumed_at: int | None) -> str:
    """The lines that a run begins with."""
    on_gpu = model.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, threads: {torch.get_num_threads()}"
    dtype = str(model.dtype).removeprefix("torch.")
    if on_gpu and not has_bfloat16(model.device):
        dtype += ", for want of bfloat16"
    stages = []
    for stage in recipe.stages:
        if stage.kind == "sft":
            stages.append(f"SFT {stage.epochs} epochs")
        else:
            batch = f"{stage.prompts_per_step} x {stage.samples_per_prompt}"
            stages.append(f"GRPO {stage.steps} steps of {batch}")
    resumed = "" if resumed_at is None else f", resumed after step {resumed_at}"
    return (
        f"model     {recipe.model}: {model.config.num_parameters():,} parameters, {dtype}, on {device}\n"
        f"problems  {len(train):,} to train on, {len(held_out):,} held out\n"
        f"stages    {', '.join(stages) or 'none: zero-shot evaluation only'}\n"
        f"run       {recipe.out}{resumed}; watch the share of correct completions, and read rollouts/ there"
    )


def step_line(row: dict, stages: int, done: int, steps: int) -> str:
    """The line for a step, from its metrics."""
    if row["step"] == 0:
        return f"before any step: held-out accuracy {evaluation_text(row)}"
    parts = [f"{row['kind']:4} {row['stage'] + 1}/{stages}  {done:3}/{steps}"]
    if row["kind"] == "sft":
        parts.append(f"loss {row['loss']:.4f}")
    else:
        parts += [
            f"reward {row['reward_mean']:.3f}",
            f"correct {100 * row['train_accuracy']:4.1f} %",
            f"format {100 * row['format_rate']:3.0f} %",
            f"length {row['completion_length']:3.0f}",
            f"entropy {row['policy_entropy']:.2f}",
        ]
    seconds = row.get("rollout_seconds", 0.0) + row["update_seconds"]
    parts += [f"grad {row['grad_norm']:.2f}", f"{seconds:.1f} s"]
    if row.get("skipped_updates"):
        parts.append(f"{row['skipped_updates']} updates not finite, left out")
    if "eval_accuracy" in row:
        parts.append(f"held-out {evaluation_text(row)}")
    return "  ".join(parts).replace("nan", "-")  # what could not be measured


def time_left(row: dict, recipe: Recipe) -> str:
    """Minutes and seconds for the GRPO steps to come, if each takes as long as that of `row`."""
    steps = sum(stage.steps for stage in recipe.stages if stage.kind == "grpo") - row["grpo_steps"]
    minutes, seconds = divmod(round((row["rollout_seconds"] + row["update_seconds"]) * steps), 60)
    return f"{minutes}:{seconds:02}"


def advice_on(row: dict) -> str | None:
    """Advice if few groups of a GRPO step had unequal rewards to learn from; else None."""
    if row.get("silent_groups", 0) < MANY_EQUAL or row["train_accuracy"] > GOOD_ACCURACY:
        return None
    stage = f"--stages.{row['stage']}"
    equal = f"In {100 * row['silent_groups']:.0f} % of groups all rewards are equal; these change nothing."
    if row["format_rate"] < 0.5:
        return (
            f"{equal} {100 * row['truncated_fraction']:.0f} % of completions are cut off. The paper's run "
            "with 256 tokens earned nothing for 30 steps either, and then took off. What helps: more samples "
            f"per prompt ({stage}.samples-per-prompt), no thinking (--sampling.no-thinking), more room "
            "(--sampling.max-new-tokens)"
        )
    if row["entropy"] > LOW_ENTROPY:
        return None
    return (
        f"{equal} The policy has stopped exploring: its entropy is {row['entropy']:.2f} nats per token, and "
        f"{100 * row['common_form_fraction']:.0f} % of answers have the form {row['common_form']}. More "
        "steps will change little. Start again from an earlier checkpoint or model, with a lower rate "
        f"({stage}.learning-rate), rewards for correct answers only (--reward.no-format "
        f"--reward.no-near-miss), or a KL penalty ({stage}.kl-coef 0.01). If the model has never searched, a "
        "cold start comes first (docs/real.md)"
    )


def final_line(row: dict, problems: int) -> str:
    sampled, greedy = evaluation_text(row, "final"), evaluation_text(row, "final_greedy")
    return f"final, {problems:,} held-out problems: {sampled} as sampled in training, {greedy} greedy"


def evaluation_text(row: dict, which: str = "eval") -> str:
    """The accuracy in % with its interval."""
    low, high = 100 * row[f"{which}_low"], 100 * row[f"{which}_high"]
    return f"{100 * row[f'{which}_accuracy']:.1f} % ({low:.1f} to {high:.1f})"

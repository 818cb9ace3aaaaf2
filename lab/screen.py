"""The output of a run: lines in a file or pipe, a live screen on a terminal, or nothing."""

import contextlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TextIO

import torch
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from lab.device import has_bfloat16
from lab.recipe import Recipe
from rl.rollout import Rollout

CHART_HEIGHT = 5  # lines
LEAST_WIDTH = 40  # columns of a terminal, to draw on it
PLAIN_WIDTH = 80  # columns at least, elsewhere
# A policy has stopped exploring if at least this share of groups have equal rewards, though at most this
# share of completions are correct, and the entropy is at most so many nats per token.
STUCK_GROUPS, STUCK_ACCURACY, STUCK_ENTROPY = 0.8, 0.6, 0.08
UPDATE_COST = 1.5  # time of a token in an update over that of sampling one, on a CPU
STUCK_FORM = 0.8  # share of answers of one form, from which on it is worth saying
ROLLOUT_LINES = 7  # the last ones of a completion
OnProgress = Callable[[int, int], None]


class Screen(contextlib.AbstractContextManager):
    """Prints a line per step; on a terminal, a progress bar during sampling."""

    def __exit__(self, *error):
        pass

    def say(self, text: str) -> None:
        print(text, flush=True)

    def history(self, rows: list[dict]) -> None:
        """Take in the metrics of a resumed run's earlier steps."""

    def step(self, row: dict, stages: int, done: int, steps: int) -> None:
        """Show the metrics of a step, number `done` of the `steps` of its stage."""
        self.say(step_line(row, stages, done, steps))

    def rollouts(self, groups: list[list[Rollout]]) -> None:
        """Show the completions that a step has sampled."""

    def sampling(self, what: str, total: int) -> contextlib.AbstractContextManager[OnProgress | None]:
        """A context that gives an `on_progress` for `generate`, or None, during `total` completions."""
        return progress_bar(what, total)


class QuietScreen(Screen):
    """Shows nothing; errors still go to standard error."""

    def say(self, text: str) -> None:
        pass

    def sampling(self, what: str, total: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class LiveScreen(Screen):
    """A panel with the present state of the run; evaluations stay above it as lines."""

    def __init__(self, recipe: Recipe, console: Console):
        self.recipe = recipe
        self.console = console
        self.row: dict = {}
        self.position = (0, 0)  # (steps done, steps) of the stage
        self.points: list[tuple[int, float]] = []  # (step, held-out accuracy in %)
        self.samples: dict[str, Rollout] = {}  # the last correct and the last wrong one
        self.progress = ("", 0, 1, 0.0)  # (activity, completions done, total, tokens per second)
        self.live = Live(console=console, get_renderable=self.draw, transient=True, refresh_per_second=4)

    def __enter__(self):
        self.live.start()
        return self

    def __exit__(self, *error):
        self.live.stop()

    def say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def history(self, rows: list[dict]) -> None:
        for row in rows:
            if "eval_accuracy" in row:
                self.points.append((row["step"], 100 * row["eval_accuracy"]))
                self.heading = f"held-out accuracy {evaluation_text(row)}"

    def step(self, row: dict, stages: int, done: int, steps: int) -> None:
        self.row = row
        self.position = (done, steps)
        self.history([row])
        if "eval_accuracy" in row:
            super().step(row, stages, done, steps)

    def rollouts(self, groups: list[list[Rollout]]) -> None:
        for group in groups:
            for rollout in group:
                self.samples["correct" if rollout.outcome == "correct" else "wrong"] = rollout

    @contextlib.contextmanager
    def sampling(self, what: str, total: int) -> Iterator[OnProgress]:
        start = time.perf_counter()

        def report(done: int, tokens: int) -> None:
            self.progress = (what, done, total, tokens / (time.perf_counter() - start))
            if done == total:
                self.progress = ("update", 0, 1, 0.0)

        report(0, 0)
        yield report

    def draw(self) -> Panel:
        width = min(self.console.width, 120)
        inner = width - 4
        parts = [self._draw_position()]
        if self.points:
            lines = [self.heading, *chart(self.points, min(60, inner - 8), CHART_HEIGHT)]
            parts.append(Text("\n".join(lines), style="cyan"))
        parts.append(self._figures())
        if self.console.height >= CHART_HEIGHT + ROLLOUT_LINES + 11:
            columns = 1 if width < 80 else 2
            kinds = [kind for kind in ("correct", "wrong") if kind in self.samples][:columns]
            panels = [self._draw_sample(kind, (inner + 1) // columns - 1) for kind in kinds]
            parts.append(Columns(panels, padding=(0, 0)))
        return Panel(Group(*parts), title=Text(printable(self.recipe.out)), width=width)

    def _draw_position(self) -> Columns:
        """The step, the present activity and its speed, and the time left."""
        stages = self.recipe.stages
        name = "start"
        if self.row and stages:
            name = f"{self.row['kind'].upper()} {self.row['stage'] + 1}/{len(stages)}"
        activity, done, total, speed = self.progress
        parts = [f"{name}  step {self.position[0]}/{self.position[1]}", activity]
        if speed:
            parts += [f"{done}/{total} completions", f"{speed:,.0f} tokens/s"]
        if "rollout_seconds" in self.row:
            parts.append(f"{time_left(self.row, self.recipe)} of GRPO left")
        return Columns(parts, padding=(0, 2))

    def _figures(self) -> Columns:
        """The last step's metrics."""
        row = self.row
        parts = step_figures(row) if row.get("step") else []
        if parts and row["kind"] == "grpo":
            parts += [
                f"entropy {shown(row['policy_entropy'])}",
                f"clipped {shown(100 * row['clip_fraction'], 1)} %",
                f"{row['tokens_per_second']:,.0f} tokens/s",
                f"{row['rollout_seconds'] + row['update_seconds']:.1f} s per step",
            ]
        return Columns(parts, padding=(0, 2))

    def _draw_sample(self, kind: str, width: int) -> Panel:
        rollout = self.samples[kind]
        lines = printable(rollout.text).split("\n")
        if len(lines) > ROLLOUT_LINES:
            lines = ["...", *lines[1 - ROLLOUT_LINES :]]
        text = Text("\n".join(lines), no_wrap=True, overflow="ellipsis")
        title = Text(f"last {kind}: {printable(str(rollout.problem))}")
        style = "green" if kind == "correct" else "red"
        return Panel(
            text, title=title, title_align="left", width=width, height=ROLLOUT_LINES + 2, style=style
        )


def pick_screen(recipe: Recipe, quiet: bool = False, plain: bool = False) -> Screen:
    """A live screen on a terminal, else lines; `plain`: always lines; `quiet`: nothing."""
    if quiet:
        return QuietScreen()
    console = plain_console()
    return LiveScreen(recipe, console) if console.is_terminal and not plain else Screen()


def chart(points: list[tuple[int, float]], width: int, height: int) -> list[str]:
    """A bar chart of `points` (x, y), x ascending, as lines of text; a bar shows the last point so far."""
    last = max(1, points[-1][0])
    top = max([1e-9] + [y for _, y in points])
    xs = [last * column / max(1, width - 1) for column in range(width)]
    ys = [next((y for step, y in reversed(points) if step <= x + 1e-9), 0.0) for x in xs]
    eighths = [round(8 * height * y / top) for y in ys]  # of a line
    lines = []
    for level in reversed(range(height)):
        bars = "".join(" ▁▂▃▄▅▆▇█"[min(8, max(0, bar - 8 * level))] for bar in eighths)
        label = f"{top:3.0f} %" if level == height - 1 else "  0 %" if level == 0 else ""
        lines.append(f"{label:>5} |{bars}")
    return lines


@contextlib.contextmanager
def progress_bar(what: str, total: int) -> Iterator[OnProgress | None]:
    """Gives an `on_progress` that draws a bar on the last line of a terminal; None without a terminal."""
    console = plain_console(stderr=True)
    start = time.perf_counter()
    if not console.is_terminal:
        yield None
        return
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
    moves = os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")
    is_log = os.environ.get("CI", "") not in ("", "0", "false")
    return stream.isatty() and moves and not is_log and shutil.get_terminal_size().columns >= LEAST_WIDTH


def printable(text: str) -> str:
    """Text that is safe on a terminal: characters that could move the cursor or change colors become dots."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "\N{MIDDLE DOT}" for letter in text)


def describe_run(recipe: Recipe, model, train: list, held_out: list, resumed_at: int | None) -> str:
    """The lines that a run begins with."""
    on_gpu = model.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, threads: {torch.get_num_threads()}"
    dtype = str(model.dtype).removeprefix("torch.")
    if on_gpu and recipe.dtype == "auto" and not has_bfloat16(model.device):
        dtype += ", for want of bfloat16"
    stages = []
    for stage in recipe.stages:
        batch = "" if stage.kind == "sft" else f" of {stage.prompts_per_step} x {stage.samples_per_prompt}"
        stages.append(f"SFT {stage.epochs} epochs" if not batch else f"GRPO {stage.steps} steps{batch}")
    resumed = "" if resumed_at is None else f", resumed after step {resumed_at}"
    return (
        f"model     {recipe.model}: {model.num_parameters():,} parameters, {dtype}, on {device}\n"
        f"problems  {len(train):,} to train on, {len(held_out):,} held out\n"
        f"stages    {', '.join(stages) or 'none: zero-shot evaluation only'}\n"
        f"run       {recipe.out}{resumed}; watch the share of correct completions, and read rollouts/ there"
    )


def step_line(row: dict, stages: int, done: int, steps: int) -> str:
    """The line for a step, from its metrics."""
    if row["step"] == 0:
        return f"before any step: held-out accuracy {evaluation_text(row)}"
    seconds = row.get("rollout_seconds", 0.0) + row["update_seconds"]
    position = f"{row['kind']:4} {row['stage'] + 1}/{stages}  {done:3}/{steps}"
    parts = [position, *step_figures(row), f"{seconds:.1f} s"]
    if row.get("skipped_updates"):
        parts.append(f"{row['skipped_updates']} updates not finite, left out")
    if "eval_accuracy" in row:
        parts.append(f"held-out {evaluation_text(row)}")
    return "  ".join(parts)


def time_left(row: dict, recipe: Recipe) -> str:
    """The time for the GRPO steps to come, if each takes as long as that of `row`."""
    steps = sum(stage.steps for stage in recipe.stages if stage.kind == "grpo") - row["grpo_steps"]
    return duration((row["rollout_seconds"] + row["update_seconds"]) * steps)


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02} h" if minutes >= 60 else f"{minutes} min"


def planned_time(row: dict, recipe: Recipe, prompt_length: int) -> str:
    """Roughly how long a run will take on a CPU, by its first evaluation, which `row` holds.

    It counts tokens: those to sample, if completions keep their length, and those of updates with their
    prompts.
    """
    length = row["eval_completion_length"]
    seconds_per_token = row["eval_seconds"] / (recipe.evaluation.problems * length)
    sampled = updated = evaluations = 0.0
    for stage in recipe.stages:
        if stage.kind == "grpo":
            completions = stage.samples_per_prompt * length
            sampled += stage.steps * stage.prompts_per_step * completions
            updated += stage.steps * stage.prompts_per_step * (completions + prompt_length)
            evaluations += stage.steps / recipe.evaluation.every
        else:
            updated += stage.epochs * stage.max_traces * (length + prompt_length)
            evaluations += 4
    sampled += evaluations * recipe.evaluation.problems * length
    sampled += 2 * recipe.evaluation.final_problems * length
    whole = duration(seconds_per_token * (sampled + UPDATE_COST * updated))
    return f"time      about {whole}, if completions keep their length of {length:.0f} tokens"


def advice_on_equal_rewards(row: dict, recipe: Recipe) -> str | None:
    """Advice if an evaluation predicts equal rewards in most groups; else None."""
    stages = [stage for stage in recipe.stages[row["stage"] :] if stage.kind == row["kind"] == "grpo"]
    if not stages:
        return None
    samples, prompts = stages[0].samples_per_prompt, stages[0].prompts_per_step
    cut_off, formed, right = (
        row[f"eval_{name}"] for name in ("truncated_fraction", "format_rate", "accuracy")
    )
    silent = sum(share**samples for share in (right, formed - right, 1 - formed))
    if silent < 0.9 or right > 0.5:
        return None
    limit, some = recipe.sampling.max_new_tokens, f"{prompts * (1 - silent):.1f} of {prompts}"
    return (
        f"{100 * cut_off:.1f} % of completions are cut off at {limit} tokens. About {some} groups per step "
        "have unequal rewards; the others change nothing.\n"
        "The paper's run with 256 tokens earned nothing for 30 steps either, and then took off. What helps: "
        f"more samples per prompt (--stages.{row['stage']}.samples-per-prompt {4 * samples}), no thinking "
        f"(--sampling.no-thinking), more room (--sampling.max-new-tokens {2 * limit})"
    )


def advice_on_exploration(row: dict, recipe: Recipe) -> str | None:
    """Advice if a step shows that the policy has stopped exploring too early; else None."""
    if row["kind"] != "grpo" or not row["step"] or row["format_rate"] < 0.5:
        return None  # where few completions have an answer, `advice_on_equal_rewards` says why
    equal, right, entropy = row["silent_groups"], row["train_accuracy"], row["entropy"]
    if equal < STUCK_GROUPS or right > STUCK_ACCURACY or entropy > STUCK_ENTROPY:
        return None
    signs = (
        f"The policy has stopped exploring: in {100 * equal:.0f} % of groups all rewards are equal, though "
        f"only {100 * right:.0f} % of completions are correct. Entropy is {entropy:.2f} nats per token"
    )
    form, fraction = row["common_form"], row["common_form_fraction"]
    if fraction >= STUCK_FORM and len(form) > 1:
        signs += f", and {100 * fraction:.0f} % of answers have the form {form}"
    number = row["stage"]
    stage = recipe.stages[number]
    helps = [f"a lower rate (--stages.{number}.learning-rate {stage.learning_rate / 2:.2g})"]
    if recipe.reward.format or recipe.reward.near_miss:
        helps.append("rewards for correct answers only (--reward.no-format --reward.no-near-miss)")
    if not stage.kl_coef:
        helps.append(f"a KL penalty (--stages.{number}.kl-coef 0.01)")
    return (
        f"{signs}.\nMore steps will change little. Start again from an earlier checkpoint or model, with "
        f"{', or '.join(helps)}. If the model has never searched, a cold start comes first (docs/real.md)"
    )


def step_figures(row: dict) -> list[str]:
    """The most important metrics of a step, as texts."""
    if row["kind"] == "sft":
        return [f"loss {shown(row['loss'], 4)}", f"grad {shown(row['grad_norm'])}"]
    return [
        f"reward {row['reward_mean']:.3f}",
        f"correct {100 * row['train_accuracy']:4.1f} %",
        f"format {100 * row['format_rate']:3.0f} %",
        f"length {row['completion_length']:3.0f}",
        f"grad {shown(row['grad_norm'])}",
    ]


def shown(value: float, digits: int = 2) -> str:
    """A number, or a dash if it could not be measured."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def final_line(row: dict, problems: int) -> str:
    sampled, greedy = evaluation_text(row, "final"), evaluation_text(row, "final_greedy")
    return f"final, {problems:,} held-out problems: {sampled} as sampled in training, {greedy} greedy"


def evaluation_text(row: dict, which: str = "eval") -> str:
    accuracy, low, high = (100 * row[f"{which}_{name}"] for name in ("accuracy", "low", "high"))
    return f"{accuracy:.1f} % ({low:.1f} to {high:.1f})"

"""The README's pictures of a run: `python docs/pictures.py runs/256-tiny` after `make train-256`.

curve-256-tiny.png is copied from the run; report.png shows the page of `make report`, live.png a terminal at
one step. Needs chromium.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import json

import tyro
from rich.console import Console
from rich.terminal_theme import MONOKAI

from data.load import read_jsonl
from lab import report
from lab.errors import user_errors
from lab.recipe import Recipe, RecipeError, from_dict
from lab.runfolder import RunFolder
from lab.screen import LiveScreen
from model import Completion
from rl.rollout import Rollout


@dataclass(frozen=True)
class Arguments:
    """Make the README's pictures."""

    run: tyro.conf.Positional[Path] = Path("runs/256-tiny")
    """The run to show."""
    step: int = 184
    """The step of the terminal's picture."""


def live_page(arguments: Arguments) -> str:
    """The terminal at a step, as HTML; the speed and times are not those of the run."""
    run = RunFolder(arguments.run)
    recipe = from_dict(Recipe, json.loads((run.path / "config.json").read_text())["recipe"])
    console = Console(width=108, height=40, record=True, force_terminal=True, file=open("/dev/null", "w"))
    screen = LiveScreen(recipe, console)
    rows = [row for row in run.metrics() if row["step"] <= arguments.step]
    screen.history(rows)
    screen.row = rows[-1]
    stage = screen.row["stage"]
    done = sum(row["stage"] == stage and row["step"] > 0 for row in rows)
    screen.position = (done, recipe.stages[stage].steps)
    rollouts = run.path / "rollouts" / f"step_{arguments.step:04d}.jsonl"
    for _, row in read_jsonl(rollouts, "a rollout"):
        completion = Completion([], [], row["finished"])
        problem = recipe.task.problem_from_row(row)
        rollout = Rollout(problem, [], completion, row["completion"], row["outcome"], row["reward"])
        screen.rollouts([[rollout]])
    screen.progress = ("update", 0, 1, 0.0)
    console.print(screen.draw())
    html = console.export_html(theme=MONOKAI, inline_styles=True)
    return html.replace("<body>", '<body style="margin:12px">')


def screenshot(page: Path, size: str, out: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise RecipeError("pictures of pages need chromium: install it")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += ["--disable-sync", "--no-first-run", "--hide-scrollbars"]
    with tempfile.TemporaryDirectory() as profile:
        options += [f"--user-data-dir={profile}", f"--window-size={size}", f"--screenshot={out}"]
        subprocess.run([browser, *options, page.as_uri()], check=True, capture_output=True, timeout=120)


def main(arguments: Arguments) -> None:
    shutil.copy(arguments.run / "curve.png", DOCS / "curve-256-tiny.png")
    with tempfile.TemporaryDirectory() as folder:
        page = report.write_report([arguments.run], Path(folder) / "report.html")
        screenshot(page, "1100,2110", DOCS / "report.png")
        live = Path(folder) / "live.html"
        live.write_text(live_page(arguments), encoding="utf-8")
        screenshot(live, "1060,410", DOCS / "live.png")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Arguments, description=__doc__))

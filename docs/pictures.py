"""The pictures of README.md and docs/. Those of the study are made by `make study`.

`python docs/pictures.py` draws the curves of the runs in docs/runs. Options make report.png, a part of
the page of `make report`, and live.png, a terminal at one step. live.png shows the speed and the time
left as that step of the run logged them, so they depend on the machine of that run. It is a dark
terminal; every other picture is made twice, for light pages and, as `...-dark.png`, for dark ones.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

import tyro
from rich.console import Console
from rich.terminal_theme import MONOKAI

from data.load import read_jsonl
from lab import report
from lab.errors import user_errors
from lab.plots import paper_caption, paper_points, plot_curve, save_light_and_dark
from lab.recipe import Recipe, RecipeError, from_dict, load_recipe
from lab.runfolder import RunFolder
from lab.screen import LiveScreen
from model import Completion
from rl.rollout import Rollout

CURVES = {"256-tiny": "this run: 0.8 M parameters", "calculus-tiny": "this run: 0.5 M parameters"}
EVALUATION = ("step", "stage", "kind", "grpo_steps", "eval_accuracy", "eval_low", "eval_high")
# What report.png shows of the page, so that its text can be read in 800 pixels: one chart, and some
# rollouts of an early step, whose choices were still open.
CUT = "h1, details, #charts figure:nth-child(n+2), #cards article:nth-child(n+5) { display: none; }"
CHOOSE = """<script>
const step = document.getElementById("step");
step.selectedIndex = 4;
step.dispatchEvent(new Event("change"));
</script>"""
REPORT_SIZE = (820, 925)
LIVE_SIZE = (1060, 410)


@dataclass(frozen=True)
class Arguments:
    """Make the pictures of README.md and docs/."""

    runs: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Run folders whose evaluations replace those in docs/runs: runs/256-tiny, runs/calculus-tiny."""
    report: Path | None = None
    """The run of report.png. Needs chromium."""
    live: Path | None = None
    """The run of live.png. Needs chromium."""
    step: int = 184
    """The step of live.png."""


def keep_evaluations(run: RunFolder) -> None:
    """Write a run's evaluations to docs/runs, from where its curve is drawn."""
    rows = [row for row in run.metrics() if "eval_accuracy" in row]
    lines = [json.dumps({name: row[name] for name in EVALUATION}) for row in rows]
    (DOCS / "runs" / f"{run.path.name}.jsonl").write_text("\n".join(lines) + "\n")


def draw_curve(name: str, label: str) -> None:
    recipe = load_recipe(name)[1]
    rows = [row for _, row in read_jsonl(DOCS / "runs" / f"{name}.jsonl", "an evaluation")]
    plot = partial(plot_curve, rows, paper_points(recipe), caption=paper_caption(recipe), label=label)
    save_light_and_dark(plot, DOCS / f"curve-{name}.png")


def picture_report(run: Path, folder: Path) -> None:
    """The upper part of the page about a run, with some of its charts and rollouts."""
    html = report.write_report((run,), folder / "report.html").read_text(encoding="utf-8")
    page = folder / "page.html"
    light = html.replace("</style>", f"{CUT}</style>", 1).replace("</body>", f"{CHOOSE}</body>", 1)
    dark = light.replace("(prefers-color-scheme: dark)", "all").replace("light dark;", "dark;", 1)
    for text, name in ((light, "report.png"), (dark, "report-dark.png")):
        page.write_text(text, encoding="utf-8")
        screenshot(page, REPORT_SIZE, DOCS / name)


def picture_live(run: RunFolder, step: int, folder: Path) -> None:
    """The terminal at a step."""
    recipe = from_dict(Recipe, json.loads((run.path / "config.json").read_text())["recipe"])
    console = Console(width=108, height=40, record=True, force_terminal=True, file=open("/dev/null", "w"))
    screen = LiveScreen(recipe, console)
    rows = [row for row in run.metrics() if row["step"] <= step]
    screen.history(rows)
    screen.row = rows[-1]
    stage = screen.row["stage"]
    done = sum(row["stage"] == stage and row["step"] > 0 for row in rows)
    screen.position = (done, recipe.stages[stage].steps)
    for _, row in read_jsonl(run.path / "rollouts" / f"step_{step:04d}.jsonl", "a rollout"):
        completion = Completion([], [], row["finished"])
        problem = recipe.task.problem_from_row(row)
        rollout = Rollout(problem, [], completion, row["completion"], row["outcome"], row["reward"])
        screen.rollouts([[rollout]])
    screen.progress = ("update", 0, 1, 0.0)
    console.print(screen.draw())
    html = console.export_html(theme=MONOKAI, inline_styles=True)
    page = folder / "live.html"
    page.write_text(html.replace("<body>", '<body style="margin:12px">'), encoding="utf-8")
    screenshot(page, LIVE_SIZE, DOCS / "live.png")


def screenshot(page: Path, size: tuple[int, int], out: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise RecipeError("pictures of pages need chromium: install it")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-sync", "--no-first-run", "--hide-scrollbars", "--force-device-scale-factor=1.5"]
    command += ["--window-size={},{}".format(*size), f"--screenshot={out}"]
    with tempfile.TemporaryDirectory() as profile:
        command += [f"--user-data-dir={profile}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def main(arguments: Arguments) -> None:
    for run in arguments.runs:
        keep_evaluations(RunFolder(run))
    for name, label in CURVES.items():
        draw_curve(name, label)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.report:
            picture_report(arguments.report, Path(folder))
        if arguments.live:
            picture_live(RunFolder(arguments.live), arguments.step, Path(folder))


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Arguments, description=__doc__))

"""One HTML file about one or more runs, to open without a network or a server: `python -m lab.report runs/a
runs/b`.

Curves of all runs over each other, some of their rollouts token by token, and the curated traces. The page is
`rl/report.html`; what is shown of the runs is written into it as JSON.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from data.load import read_jsonl
from data.task import Task
from lab.checkpoint import checkpoints
from lab.errors import user_errors
from lab.plots import paper_by_step, paper_points, stage_spans
from lab.recipe import Recipe, RecipeError
from lab.recipe import from_dict
from lab.runfolder import RunFolder
from model import ModelError, Tokenizer

PAGE = Path(__file__).parent / "report.html"
PLACE = "{{data}}"  # where the page wants the JSON
SERIES = (
    "reward_mean", "train_accuracy", "pass_at_8", "completion_length", "policy_entropy", "clip_fraction", "grad_norm", "loss",
    "format_rate", "truncated_fraction", "non_latin_fraction", "lr",
)  # fmt: skip
TIMES = ("rollout_seconds", "update_seconds")
TRACES = 200  # traces shown of a run


@dataclass(frozen=True)
class Shown:
    """How many rollouts of each run are in a page."""

    steps: int = 16
    """Steps of each run whose rollouts are in it, evenly spread."""
    groups: int = 4
    """Groups of each of these steps."""
    samples: int = 8
    """Completions of each of these groups."""


def write_report(
    runs: tyro.conf.Positional[tuple[Path, ...]],
    out: Path | None = None,
    shown: Annotated[Shown, tyro.conf.arg(name="")] = Shown(),
) -> Path:
    """Write the page and return where it is.

    Args:
        runs: run folders.
        out: the page; None: report.html in the first run's folder.

    Raises:
        RecipeError: a folder holds no run, or none is named.
    """
    if not runs:
        raise RecipeError("name a run folder: python -m lab.report runs/256-tiny")
    made = {
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "runs": [describe(RunFolder(path), shown) for path in runs],
    }
    text = json.dumps(made, ensure_ascii=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )  # no text ends the script
    out = out or runs[0] / "report.html"
    out.write_text(PAGE.read_text(encoding="utf-8").replace(PLACE, text), encoding="utf-8")
    return out


def describe(run: RunFolder, shown: Shown) -> dict:
    """What the page shows of one run."""
    rows = run.metrics()
    if not run.holds_run or not rows:
        raise RecipeError(f"{run.path}: no run with metrics here; name a folder such as runs/256-tiny")
    config = json.loads((run.path / "config.json").read_text())
    recipe = from_dict(Recipe, config["recipe"])
    evaluations = [row for row in rows if "eval_accuracy" in row]
    return {
        "name": str(run.path),
        "config": config,
        "stages": stage_spans(evaluations),
        "evaluations": [
            [row["step"]] + [row[f"eval_{name}"] for name in ("accuracy", "low", "high")]
            for row in evaluations
        ],
        "paper": paper_by_step(evaluations, paper_points(recipe)),
        "final": {name: value for name, value in rows[-1].items() if name.startswith("final")},
        "series": {name: [[row["step"], row[name]] for row in rows if name in row] for name in SERIES}
        | {
            "seconds": [
                [row["step"], sum(row.get(name, 0) for name in TIMES)] for row in rows if TIMES[1] in row
            ]
        },
        "rollouts": rollouts(run, recipe.task, shown),
        "traces": traces(run, recipe.task),
    }


def rollouts(run: RunFolder, task: Task, shown: Shown) -> list[dict]:
    """Some completions of evenly spread steps; cut into tokens where the run's tokenizer is at hand."""
    files, tokenizer = run.rollout_files(), tokenizer_of(run)
    count = min(len(files), shown.steps)
    chosen = [files[round(i * (len(files) - 1) / max(1, count - 1))] for i in range(count)]
    rows = []
    for path in chosen:
        taken: dict[int, int] = {}
        for row in read_rows(path):
            taken[row["group"]] = taken.get(row["group"], 0) + 1
            if row["group"] < shown.groups and taken[row["group"]] <= shown.samples:
                kept = ("group", "outcome", "reward", "advantage", "finished", "tokens", "completion")
                found = {"step": int(path.stem.removeprefix("step_")), "problem": str(task.problem(row))}
                found |= {name: row[name] for name in kept}
                if tokenizer:
                    found["pieces"] = pieces(tokenizer, row["token_ids"], row["logprobs"])
                rows.append(found)
    return rows


def pieces(tokenizer: Tokenizer, token_ids: list[int], logprobs: list[float]) -> list[tuple[str, float]]:
    """(text, log-probability) of each token; those that make a character only together are one piece."""
    found, pending, total = [], [], 0.0
    for token_id, logprob in zip(token_ids, logprobs, strict=True):
        pending.append(token_id)
        total += logprob
        text = tokenizer.decode(pending)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            found.append((text, round(total, 3)))
            pending, total = [], 0.0
    return found + ([(tokenizer.decode(pending), round(total, 3))] if pending else [])


def tokenizer_of(run: RunFolder) -> Tokenizer | None:
    folders = checkpoints(run.path)
    try:
        return Tokenizer(folders[-1]) if folders else None
    except ModelError:
        return None


def traces(run: RunFolder, task: Task) -> dict:
    """How many traces SFT had, and the first of them."""
    path = run.path / "traces.jsonl"
    rows = read_rows(path) if path.exists() else []
    shown = [
        {"problem": str(task.problem(row)), "step": row["step"], "completion": row["completion"]}
        for row in rows[:TRACES]
    ]
    return {"count": len(rows), "shown": shown}


def read_rows(path: Path) -> list[dict]:
    return [row for _, row in read_jsonl(path, "a line of a run")]


if __name__ == "__main__":
    with user_errors():
        print(f"wrote {tyro.cli(write_report, description=__doc__)}")

"""One HTML file about one or more runs, to open without a network: `python -m lab.report runs/a runs/b`.

Each chart has the curves of all runs; below are some of their rollouts, token by token, and curated traces.
The page is `lab/report.html` with the data of the runs in it as JSON.
"""

import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import tyro

from data.load import read_jsonl
from data.task import Task
from lab.checkpoint import checkpoints
from lab.errors import user_errors
from lab.plots import paper_by_step, paper_caption, paper_points, stage_spans
from lab.recipe import Recipe, RecipeError, from_dict
from lab.runfolder import RunFolder, json_line, step_of
from model import Tokenizer

STEPS = 16  # of each run, evenly spread, whose rollouts are in the page
GROUPS = 4  # of each of these steps
SAMPLES = 8  # completions of each of these groups
TRACES = 200  # of each run


def write_report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path | None = None) -> Path:
    """Write a page about run folders, and return its path. RecipeError: a folder holds no run.

    Args:
        out: the page; None: report.html in the first run's folder.
    """
    if not runs:
        raise RecipeError("name a run folder: python -m lab.report runs/256-tiny")
    described = [describe(RunFolder(path)) for path in runs]
    data = {"written": time.strftime("%Y-%m-%d %H:%M"), "runs": described}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")  # so that no completion can end the script element
    out = out or runs[0] / "report.html"
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    # A path may hold bytes that are no UTF-8, which Python reads as halves of characters.
    out.write_text(page.replace("{{data}}", text), encoding="utf-8", errors="replace")
    return out


def describe(run: RunFolder) -> dict:
    """The part of the page about one run."""
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
        "rows": [json.loads(json_line(row)) for row in rows],
        "paper": paper_by_step(evaluations, paper_points(recipe)),
        "caption": paper_caption(recipe).replace("\n", " "),
        "rollouts": rollouts(run, recipe.task),
        "traces": traces(run, recipe.task),
    }


def rollouts(run: RunFolder, task: Task) -> list[dict]:
    """Completions of evenly spread steps, divided into tokens if a checkpoint has the tokenizer."""
    files = run.rollout_files()
    folders = checkpoints(run.path)
    tokenizer = Tokenizer(folders[-1]) if folders else None
    rows = []
    for number in np.linspace(0, len(files) - 1, min(len(files), STEPS)).round().astype(int):
        path = files[number]
        samples = Counter()
        for _, row in read_jsonl(path, "a rollout"):
            samples[row["group"]] += 1
            if row["group"] < GROUPS and samples[row["group"]] <= SAMPLES:
                row |= {"step": step_of(path), "problem": str(task.problem_from_row(row))}
                token_ids, logprobs = row.pop("token_ids"), row.pop("logprobs")
                if tokenizer:
                    row["pieces"] = pieces(tokenizer, token_ids, logprobs)
                rows.append(row)
    return rows


def pieces(tokenizer: Tokenizer, token_ids: list[int], logprobs: list[float]) -> list[tuple[str, float]]:
    """(text, log-probability) of each token; tokens that make a character only together are one piece."""
    result = []
    start = 0
    for end in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[start:end])
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or end == len(token_ids):
            result.append((text, round(sum(logprobs[start:end]), 3)))
            start = end
    return result


def traces(run: RunFolder, task: Task) -> dict:
    """The number of curated traces, and the first."""
    path = run.path / "traces.jsonl"
    rows = [row for _, row in read_jsonl(path, "a trace")] if path.exists() else []
    for row in rows:
        row["problem"] = str(task.problem_from_row(row))
    return {"count": len(rows), "shown": rows[:TRACES]}


if __name__ == "__main__":
    with user_errors():
        print(f"wrote {tyro.cli(write_report, description=__doc__)}")

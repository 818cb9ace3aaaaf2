"""Curated traces: completions that solved their problem, as JSONL files for supervised fine-tuning."""

import json
import random
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.load import DataError, endless_problems, read_jsonl
from data.task import Task, worked_solution


@dataclass(frozen=True)
class Trace:
    problem: Any  # of the task's problem class
    completion: str  # without the stop token; solves the problem
    step: int = 0  # the training step that sampled it; 0 for traces from elsewhere


def non_latin(text: str) -> int:
    """The number of letters outside the Latin script, into which a policy may drift (paper, section 3.3)."""
    if text.isascii():
        return 0
    return sum(letter.isalpha() and not unicodedata.name(letter, "").startswith("LATIN") for letter in text)


def curate(candidates: Iterable[Trace], per_problem: int, limit: int) -> list[Trace]:
    """Drop repeats and other scripts; keep the `per_problem` shortest of each problem, the latest `limit`."""
    by_problem: dict = {}
    for trace in candidates:
        if not non_latin(trace.completion):
            by_problem.setdefault(trace.problem.key, {}).setdefault(trace.completion, trace)
    chosen = []
    for traces in by_problem.values():
        chosen += sorted(traces.values(), key=lambda trace: (len(trace.completion), trace.step))[:per_problem]
    return sorted(chosen, key=lambda trace: -trace.step)[:limit]


def worked_traces(task: Task, problems: list, count: int, thinking: bool, seed: int) -> list[Trace]:
    """Solutions that `task` works out, for `count` of the training problems that reinforcement meets last.

    These are the end of the first pass through the problems, in the order of `endless_problems`.
    """
    rng = random.Random(seed)
    traces = []
    for problem in endless_problems(problems, seed, max(0, len(problems) - count), count):
        solution = worked_solution(task, problem, thinking, rng)
        if solution is not None:
            traces.append(Trace(problem, solution))
    return traces


def save_traces(path: str | Path, traces: Iterable[Trace]) -> None:
    """Write a JSON object per line: the problem's fields, step, completion."""
    with open(path, "w", encoding="utf-8") as file:
        for trace in traces:
            row = trace.problem.row() | {"step": trace.step, "completion": trace.completion}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def load_traces(path: str | Path, problem_of: Callable, is_correct: Callable) -> list[Trace]:
    """Read traces and verify each again, so that nothing wrong is imitated; DataError names a bad line.

    `problem_of` is that of `read_problems`; `is_correct` judges (completion, problem).
    """
    traces = []
    expected = 'a problem and its "completion", as a run writes traces.jsonl'
    for place, row in read_jsonl(path, expected):
        try:
            trace = Trace(problem_of(row), row["completion"], row.get("step", 0))
            if not isinstance(trace.completion, str) or not isinstance(trace.step, int):
                raise TypeError("completion must be text and step a whole number")
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}, {place}: not a trace ({error}); expected {expected}") from None
        if not is_correct(trace.completion, trace.problem):
            raise DataError(f"{path}, {place}: does not solve {trace.problem}; remove the trace")
        traces.append(trace)
    if not traces:
        raise DataError(f"{path}: no traces in it")
    return traces

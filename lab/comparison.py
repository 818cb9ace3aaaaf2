"""Evaluations side by side: their numbers, a table of them, and the uncertainty of their differences."""

from collections import defaultdict
from dataclasses import dataclass
from statistics import fmean

from rich.table import Table

from lab.evaluate import Evaluation, bootstrap_interval
from lab.metrics import non_latin_fraction, pass_at_k
from lab.recipe import Recipe


@dataclass(frozen=True)
class Candidate:
    """A model's sampled completions, and its greedy ones."""

    name: str
    recipe: Recipe
    sampled: Evaluation
    greedy: Evaluation


def measures(candidate: Candidate) -> dict:
    """All numbers of an evaluation; shares are from 0 to 1, lengths in tokens."""
    sampled = candidate.sampled
    groups = sampled.groups
    samples = min(map(len, groups))
    total = sum(sampled.counts.values())
    kinds = defaultdict(list)
    for group in groups:
        kinds[candidate.recipe.task.difficulty(group[0].problem)].append(group)
    return {
        "name": candidate.name,
        "accuracy": estimate(sampled),
        "greedy": estimate(candidate.greedy),
        "samples": samples,
        "pass_at": {k: pass_at_k(groups, k) for k in range(1, samples + 1)},
        "outcomes": {outcome: count / total for outcome, count in sampled.counts.items()},
        "by_difficulty": {
            kind: estimate(Evaluation.of(some)) | {"problems": len(some)}
            for kind, some in sorted(kinds.items())
        },
        "non_latin_fraction": non_latin_fraction(groups),
        "completion_length": sampled.completion_length,
        "truncated_fraction": sampled.truncated_fraction,
        "max_new_tokens": candidate.recipe.sampling.max_new_tokens,
    }


def estimate(evaluation: Evaluation) -> dict[str, float]:
    return {"mean": evaluation.accuracy, "low": evaluation.low, "high": evaluation.high}


def difference(first: Candidate, other: Candidate) -> dict:
    """How much more of the same problems `other` solves than `first`, with paired bootstrap intervals."""
    return {
        "from": first.name,
        "to": other.name,
        "accuracy": gain(first.sampled, other.sampled),
        "greedy": gain(first.greedy, other.greedy),
    }


def gain(before: Evaluation, after: Evaluation) -> dict[str, float]:
    gains = [b - a for a, b in zip(before.shares, after.shares, strict=True)]
    low, high = bootstrap_interval(gains)
    return {"mean": fmean(gains), "low": low, "high": high}


def comparison_table(title: str, candidates: list[dict], differences: list[dict]) -> Table:
    """A column for each of `measures`, a row for each of its numbers; `differences` are from the first."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    columns = []
    for number, numbers in enumerate(candidates):
        table.add_column(numbers["name"], justify="right", overflow="fold")
        columns.append(cells(numbers))
        if number > 0:
            gains = differences[number - 1]
            for name, key in (("sampled", "accuracy"), ("greedy", "greedy")):
                text = interval_text(gains[key], sign="+", unit="points")
                columns[-1][f"{name}, against the first"] = text
    names = dict.fromkeys(name for column in columns for name in column)
    for name in names:
        table.add_row(name, *[column.get(name, "") for column in columns])
    return table


def cells(numbers: dict) -> dict[str, str]:
    """The text of each of the `measures` of a model, by the name of its row."""
    texts = {
        "accuracy, sampled": interval_text(numbers["accuracy"]),
        "accuracy, greedy": interval_text(numbers["greedy"]),
    }
    for k, share in numbers["pass_at"].items():
        if k in (2, 4, 8, 16, 32, 64) or 1 < k == numbers["samples"]:
            texts[f"pass@{k}"] = percent(share)
    for outcome, share in numbers["outcomes"].items():
        texts[outcome] = percent(share)
    texts["length, tokens"] = f"{numbers['completion_length']:.1f}"
    texts["cut off at the limit"] = percent(numbers["truncated_fraction"])
    texts["letters outside Latin script"] = percent(numbers["non_latin_fraction"])
    for kind, share in numbers["by_difficulty"].items():
        texts[f"{kind} ({share['problems']})"] = interval_text(share)
    return texts


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def interval_text(numbers: dict, sign: str = "", unit: str = "%") -> str:
    """A mean and its interval in percent; `sign` "+" shows the sign of positive numbers too."""
    mean, low, high = (f"{100 * numbers[name]:{sign}.1f}" for name in ("mean", "low", "high"))
    return f"{mean} {unit} ({low} to {high})"

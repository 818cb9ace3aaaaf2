"""Evaluations side by side: their numbers, a table of them, and how sure their differences are."""

from dataclasses import dataclass
from statistics import fmean

from rich.table import Table

from data.task import Task
from lab.evaluate import Evaluation, by_difficulty, distinct_answers, majority_accuracy, solved_shares
from lab.intervals import bootstrap_interval, mcnemar_p
from rl.metrics import non_latin_fraction, pass_at_k


@dataclass(frozen=True)
class Candidate:
    """A model's completions, sampled and, unless they were made elsewhere, greedy."""

    name: str
    task: Task
    sampled: Evaluation
    greedy: Evaluation | None
    thinking: bool
    max_new_tokens: int | None = None

    @property
    def samples(self) -> int:
        """Completions that every problem has."""
        return min(map(len, self.sampled.groups))


def measures(candidate: Candidate) -> dict:
    """Everything an evaluation says; shares are from 0 to 1, lengths in tokens."""
    sampled, groups = candidate.sampled, candidate.sampled.groups
    total = sum(sampled.counts.values())
    found = {"name": candidate.name, "accuracy": estimate(sampled)}
    if candidate.greedy:
        found["greedy"] = estimate(candidate.greedy)
    found |= {
        "samples": candidate.samples,
        "pass_at": {k: pass_at_k(groups, k) for k in range(1, candidate.samples + 1)},
        "majority": majority_accuracy(groups, candidate.task, candidate.thinking),
        "distinct_answers": distinct_answers(groups),
        "outcomes": {outcome: count / total for outcome, count in sampled.counts.items()},
        "by_difficulty": {
            kind: estimate(Evaluation.of(some)) | {"problems": len(some)}
            for kind, some in by_difficulty(groups, candidate.task).items()
        },
        "non_latin_fraction": non_latin_fraction(groups),
    }
    if candidate.max_new_tokens is not None:
        found |= {
            "completion_length": sampled.completion_length,
            "truncated_fraction": sampled.truncated_fraction,
            "max_new_tokens": candidate.max_new_tokens,
        }
    return found


def estimate(evaluation: Evaluation) -> dict[str, float]:
    return {"mean": evaluation.accuracy, "low": evaluation.low, "high": evaluation.high}


def difference(first: Candidate, other: Candidate) -> dict:
    """How much more `other` solves than `first`, on the same problems in the same order.

    Sampled completions: the mean difference of the solved shares with its paired bootstrap interval. Greedy
    ones: how many problems only one of the two solves, and McNemar's exact p-value.
    """
    shares = zip(solved_shares(first.sampled.groups), solved_shares(other.sampled.groups), strict=True)
    gains = [after - before for before, after in shares]
    low, high = bootstrap_interval(gains)
    found = {
        "from": first.name,
        "to": other.name,
        "accuracy": {"mean": fmean(gains), "low": low, "high": high},
    }
    if first.greedy and other.greedy:
        pairs = list(zip(solved_shares(first.greedy.groups), solved_shares(other.greedy.groups), strict=True))
        gained, lost = pairs.count((0, 1)), pairs.count((1, 0))
        found["greedy"] = {"gained": gained, "lost": lost, "mcnemar_p": mcnemar_p(lost, gained)}
    return found


def comparison_table(title: str, candidates: list[dict], differences: list[dict]) -> Table:
    """A column for each of `measures`, a row for each of its numbers; `differences` are from the first."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for found in candidates:
        table.add_column(found["name"], justify="right", overflow="fold")

    def row(name: str, cells) -> None:
        cells = list(cells)
        if any(cells):
            table.add_row(name, *cells)

    row("accuracy, sampled", (interval_text(found["accuracy"]) for found in candidates))
    row("accuracy, greedy", (interval_text(found.get("greedy")) for found in candidates))
    most = max(found["samples"] for found in candidates)
    for k in [k for k in (2, 4, 8, 16, 32, 64) if k < most] + [most] * (most > 1):
        row(f"pass@{k}", (percent(found["pass_at"].get(k)) for found in candidates))
    if most > 1:
        row(f"majority of {most}", (percent(found["majority"]) for found in candidates))
        row("distinct answers a problem", (f"{found['distinct_answers']:.2f}" for found in candidates))
    table.add_section()
    for outcome in candidates[0]["outcomes"]:
        row(outcome, (percent(found["outcomes"][outcome]) for found in candidates))
    row(
        "length, tokens",
        (f"{found['completion_length']:.1f}" if "completion_length" in found else "" for found in candidates),
    )
    limits = [str(found.get("max_new_tokens", "")) for found in candidates]
    row("limit, tokens", limits if len(set(limits)) > 1 else [])
    row("cut off at the limit", (percent(found.get("truncated_fraction")) for found in candidates))
    row("letters outside Latin script", (percent(found["non_latin_fraction"], 2) for found in candidates))
    table.add_section()
    for kind, first in candidates[0]["by_difficulty"].items():
        row(
            f"{kind} ({first['problems']})",
            (interval_text(found["by_difficulty"][kind]) for found in candidates),
        )
    if differences:
        table.add_section()
        row(
            "sampled, against the first", ["", *(difference_text(found["accuracy"]) for found in differences)]
        )
        row("greedy: gained, lost", ["", *(flips_text(found.get("greedy")) for found in differences)])
    return table


def percent(share: float | None, digits: int = 1) -> str:
    return "" if share is None else f"{100 * share:.{digits}f} %"


def interval_text(found: dict | None) -> str:
    return (
        f"{100 * found['mean']:.1f} % ({100 * found['low']:.1f} to {100 * found['high']:.1f})"
        if found
        else ""
    )


def difference_text(found: dict) -> str:
    mean, low, high = (100 * found[name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} points ({low:+.1f} to {high:+.1f})"


def flips_text(found: dict | None) -> str:
    return f"+{found['gained']}, -{found['lost']} (p = {found['mcnemar_p']:.2g})" if found else ""

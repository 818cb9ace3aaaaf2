"""How the tour (`docs.make_tour`) writes Markdown."""

import re
from textwrap import fill

from torch import Tensor

from rl.rollout import Rollout


def at(thing) -> str:
    """A link to the file of a function or class."""
    return f"[`{thing.__qualname__}`](../{thing.__module__.replace('.', '/')}.py)"


def show(number: Tensor | float) -> str:
    return f"{round(float(number), 3) + 0.0:.3f}"  # and no minus before a zero


def yes(found: bool) -> str:
    return "Yes" if found else "NO"


def paragraph(text: str) -> str:
    return fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def lines(words: list[str]) -> str:
    """Words in lines; a word with spaces in it stays whole."""
    return fill("  ".join(word.replace(" ", "\0") for word in words), 100, break_on_hyphens=False).replace("\0", " ")


def code(text: str) -> str:
    return f"```\n{text}\n```"


def table(rows: list[tuple[str, ...]]) -> str:
    """Columns of text, the first row their names; numbers stand to the right."""
    columns = []
    for name, *cells in zip(*rows, strict=True):
        number = all(re.fullmatch(r"[-+.,\d]*", cell) for cell in cells)
        width = max(map(len, (name, *cells)))
        columns.append([cell.rjust(width) if number else cell.ljust(width) for cell in (name, *cells)])
    return code("\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True)))


def group_table(group: list[Rollout]) -> str:
    rows = [("completion", "tokens", "outcome", "reward", "text")]
    for n, rollout in enumerate(group):
        score, ids = rollout.score, rollout.completion.token_ids
        rows.append((str(n), str(len(ids)), score.outcome, f"{score.reward:.1f}", repr(rollout.text)))
    return table(rows)

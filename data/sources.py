"""Where problems come from, and how some of them are kept out of training."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from data.countdown import Problem
from data.jsonl import DataError, read_jsonl
from hub import HubError, download

P = TypeVar("P")  # a task's kind of problem


@dataclass(frozen=True)
class Format:
    """How a task's problems are stored.

    Attributes:
        example: a line of a .jsonl file.
        columns: of a parquet file, each with the field of a row that it is; `optional`: those that may be missing.
        repository: the dataset on the hub, if there is one.
        files: its parquet files, each under the name that it is asked for by, "hub" among them.
    """

    example: str
    columns: dict[str, str]
    repository: str = ""
    files: dict[str, str] = field(default_factory=dict)
    optional: dict[str, str] = field(default_factory=dict)


COUNTDOWN = Format(
    '{"numbers": [79, 60, 17], "target": 36}',
    {"nums": "numbers", "target": "target"},
    "Jiayi-Pan/Countdown-Tasks-3to4",
    {"hub": "data/train-00000-of-00001.parquet"},
)


def load_problems(source: str | Path) -> list[Problem]:
    """Read Countdown problems, in the source's order and with its duplicates.

    Args:
        source: "hub" for Jiayi-Pan/Countdown-Tasks-3to4 (490,364 problems, downloaded once), or "hub@" and a branch, tag
            or commit; a `.parquet` file with the columns `target` and `nums`, or a `.jsonl` file with a
            `{"numbers": [79, 60, 17], "target": 36}` a line.

    Raises:
        DataError: no such source, no network, a file that is not the hub's, missing columns, a row that is no
            problem, or no rows at all.
    """
    return read_problems(source, COUNTDOWN, lambda row: Problem(row["numbers"], row["target"]))


def read_problems(source: str | Path, stored: Format, problem_of: Callable[[dict], P]) -> list[P]:
    """Read the problems of any task, see `load_problems`; `problem_of` makes a row one, or raises ValueError."""
    name, at, revision = str(source).partition("@")
    if name == "hub" and not stored.repository:
        raise DataError("there is no dataset of this task on the hub; generate problems, or give a .jsonl file")
    if file := stored.files.get(name):
        if at and not revision:
            raise DataError(f"'{source}' names no revision: write {name} alone, or {name}@ and a branch, tag or commit")
        try:
            advice = "give a .parquet or .jsonl file, or generate problems"
            folder = download(stored.repository, [file], advice, "dataset", revision or None)
        except HubError as error:
            raise DataError(str(error)) from error
        return _checked(stored.repository, _parquet_rows(folder / file, stored), problem_of)
    path = Path(source)
    readers = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows}
    if path.suffix not in readers:
        raise DataError(f"cannot read problems from '{source}': give \"hub\", a .parquet file or a .jsonl file")
    if not path.is_file():
        raise DataError(f'{path} is no file; give "hub" or the path of a .parquet or .jsonl file')
    return _checked(str(path), readers[path.suffix](path, stored), problem_of)


def split_problems(problems: Iterable[P], held_out: int, seed: int = 0) -> tuple[list[P], list[P]]:
    """Divide into (train, held_out) lists that share no problem, not even in other words.

    One row in twelve of the Countdown dataset repeats an earlier one with its numbers in another order; a split by row
    would evaluate on what it trained on. Problems with equal `key` are therefore merged first. The result depends on
    the set of problems and the seed, not on their order.

    Args:
        held_out: how many different problems to keep out.

    Raises:
        DataError: fewer different problems than `held_out` plus one to train on, or a negative `held_out`.
    """
    if held_out < 0:
        raise DataError(f"held_out must be 0 or more, not {held_out}")
    unique: dict = {}
    for problem in problems:
        kept = unique.setdefault(problem.key, problem)
        if list(problem.row().values()) < list(kept.row().values()):  # which twin stays must not depend on their order
            unique[problem.key] = problem
    if len(unique) <= held_out:
        raise DataError(f"cannot hold out {held_out} of {len(unique)} different problems and train on the rest; hold out fewer")
    shuffled = [unique[key] for key in sorted(unique)]
    random.Random(seed).shuffle(shuffled)
    return shuffled[held_out:], shuffled[:held_out]


Row = tuple[str, dict]  # "row 3" or "line 3", and what stands there


def _checked(source: str, rows: Iterable[Row], problem_of: Callable[[dict], P]) -> list[P]:
    problems = []
    for place, row in rows:
        try:
            problems.append(problem_of(row))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{source}, {place}: {error}; correct or remove it") from error
    if not problems:
        raise DataError(f"{source} holds no problems; give a file with at least one")
    return problems


def _parquet_rows(path: Path, stored: Format) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        found = set(pyarrow.parquet.read_schema(path).names)
        if not found.issuperset(stored.columns):
            needed = " and ".join(f"'{name}'" for name in sorted(stored.columns, reverse=True))
            raise DataError(f"{path} needs the columns {needed}, but has {sorted(found)}; rename them")
        fields = {name: field for name, field in (stored.columns | stored.optional).items() if name in found}
        table = pyarrow.parquet.read_table(path, columns=list(fields))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet; write or download it again") from error
    columns = {field: table[name].to_pylist() for name, field in fields.items()}
    for index, values in enumerate(zip(*columns.values(), strict=True), start=1):
        yield f"row {index}", dict(zip(columns, values, strict=True))


def _jsonl_rows(path: Path, stored: Format) -> Iterator[Row]:
    for number, row in read_jsonl(path, stored.example):
        if not row.keys() >= set(stored.columns.values()):
            raise DataError(f"{path}, line {number}: expected {stored.example}; correct it")
        yield f"line {number}", row

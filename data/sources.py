"""Where problems come from, and how some of them are kept out of training."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.countdown import Problem
from data.jsonl import DataError, read_jsonl
from hub import HubError, download

HUB_REPOSITORY = "Jiayi-Pan/Countdown-Tasks-3to4"
HUB_FILE = "data/train-00000-of-00001.parquet"


def load_problems(source: str | Path, revision: str | None = None) -> list[Problem]:
    """Read problems, in the source's order and with its duplicates.

    Args:
        source: "hub" for Jiayi-Pan/Countdown-Tasks-3to4 (490,364 problems, downloaded once), a `.parquet` file with
            the columns `target` and `nums`, or a `.jsonl` file with a `{"numbers": [79, 60, 17], "target": 36}` a line.
        revision: branch, tag or commit of the hub dataset.

    Raises:
        DataError: no such source, no network, a file that is not the hub's, missing columns, a row that is no
            problem, or no rows at all.
    """
    if str(source) == "hub":
        try:
            folder = download(
                HUB_REPOSITORY, [HUB_FILE], "give a .parquet or .jsonl file, or generate problems", "dataset", revision
            )
        except HubError as error:
            raise DataError(str(error)) from error
        return _checked(HUB_REPOSITORY, _parquet_rows(folder / HUB_FILE))
    path = Path(source)
    readers = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows}
    if path.suffix not in readers:
        raise DataError(f"cannot read problems from '{source}': give \"hub\", a .parquet file or a .jsonl file")
    if revision is not None:
        raise DataError(f"revision '{revision}' belongs to the hub dataset; leave it out for the file {path}")
    if not path.is_file():
        raise DataError(f'{path} is no file; give "hub" or the path of a .parquet or .jsonl file')
    return _checked(str(path), readers[path.suffix](path))


def split_problems(problems: Iterable[Problem], held_out: int, seed: int = 0) -> tuple[list[Problem], list[Problem]]:
    """Divide into (train, held_out) lists that share no problem, not even with its numbers in another order.

    One row in twelve of the hub dataset repeats an earlier one so permuted; a split by row would evaluate on what it
    trained on. Problems with equal `key` are therefore merged first. The result depends on the set of problems and the
    seed, not on their order.

    Args:
        held_out: how many different problems to keep out.

    Raises:
        DataError: fewer different problems than `held_out` plus one to train on, or a negative `held_out`.
    """
    if held_out < 0:
        raise DataError(f"held_out must be 0 or more, not {held_out}")
    unique: dict[tuple, Problem] = {}
    for problem in problems:
        kept = unique.setdefault(problem.key, problem)
        if problem.numbers < kept.numbers:  # which of the twins stays must not depend on their order
            unique[problem.key] = problem
    if len(unique) <= held_out:
        raise DataError(f"cannot hold out {held_out} of {len(unique)} different problems and train on the rest; hold out fewer")
    shuffled = [unique[key] for key in sorted(unique)]
    random.Random(seed).shuffle(shuffled)
    return shuffled[held_out:], shuffled[:held_out]


Row = tuple[str, object, object]  # "row 3" or "line 3", numbers, target


def _checked(source: str, rows: Iterable[Row]) -> list[Problem]:
    problems = []
    for place, numbers, target in rows:
        try:
            problems.append(Problem(numbers, target))
        except ValueError as error:
            raise DataError(f"{source}, {place}: {error}; correct or remove it") from error
    if not problems:
        raise DataError(f"{source} holds no problems; give a file with at least one")
    return problems


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = set(pyarrow.parquet.read_schema(path).names)
        if not {"target", "nums"} <= columns:
            raise DataError(f"{path} needs the columns 'target' and 'nums', but has {sorted(columns)}; rename them")
        table = pyarrow.parquet.read_table(path, columns=["nums", "target"])
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet; write or download it again") from error
    rows = zip(table["nums"].to_pylist(), table["target"].to_pylist(), strict=True)
    for index, (numbers, target) in enumerate(rows, start=1):
        yield f"row {index}", numbers, target


def _jsonl_rows(path: Path) -> Iterator[Row]:
    expected = '{"numbers": [79, 60, 17], "target": 36}'
    for number, row in read_jsonl(path, expected):
        if not {"numbers", "target"} <= row.keys():
            raise DataError(f"{path}, line {number}: expected {expected}; correct it")
        yield f"line {number}", row["numbers"], row["target"]

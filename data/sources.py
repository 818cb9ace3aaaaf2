"""Where problems come from, and how some of them are kept out of training."""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from data.countdown import Problem

HUB_REPOSITORY = "Jiayi-Pan/Countdown-Tasks-3to4"
HUB_FILE = "data/train-00000-of-00001.parquet"


class DataError(ValueError):
    """Problems that cannot be read or divided; the message names the file and row, and the way out."""


def load_problems(source: str | Path, revision: str | None = None) -> list[Problem]:
    """Read problems, in the source's order and with its duplicates.

    Args:
        source: "hub" for Jiayi-Pan/Countdown-Tasks-3to4 (490,364 problems, downloaded once), a `.parquet` file with
            the columns `target` and `nums`, or a `.jsonl` file with a `{"numbers": [79, 60, 17], "target": 36}` a line.
        revision: branch, tag or commit of the hub dataset.

    Raises:
        DataError: no such source, no network, missing columns, a row that is no problem, or no rows at all.
    """
    if str(source) == "hub":
        return _checked(HUB_REPOSITORY, _parquet_rows(_download(revision)))
    path = Path(source)
    readers = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows}
    if path.suffix not in readers:
        raise DataError(f"cannot read problems from '{source}': give \"hub\", a .parquet file or a .jsonl file")
    if revision is not None:
        raise DataError(f"revision '{revision}' belongs to the hub dataset; leave it out for the file {path}")
    if not path.is_file():
        raise DataError(f"{path} is no file; give \"hub\" or the path of a .parquet or .jsonl file")
    return _checked(str(path), readers[path.suffix](path))


def split_problems(
    problems: Iterable[Problem], held_out: int, seed: int = 0
) -> tuple[list[Problem], list[Problem]]:
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
        raise DataError(
            f"cannot hold out {held_out} of {len(unique)} different problems and train on the rest; hold out fewer"
        )
    shuffled = [unique[key] for key in sorted(unique)]
    random.Random(seed).shuffle(shuffled)
    return shuffled[held_out:], shuffled[:held_out]


def _download(revision: str | None) -> Path:
    """The hub dataset's file, from the local cache where it is already there."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(HUB_REPOSITORY, HUB_FILE, repo_type="dataset", revision=revision))
    except (OSError, ValueError) as error:  # no network, no such revision: the hub's errors derive from these
        at_revision = f" at revision '{revision}'" if revision else ""
        raise DataError(
            f"cannot download {HUB_REPOSITORY}{at_revision} ({type(error).__name__}); check the network and the "
            "revision, give a local .parquet or .jsonl file, or generate problems"
        ) from error


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
    rows = zip(table["nums"].to_pylist(), table["target"].to_pylist())
    for index, (numbers, target) in enumerate(rows, start=1):
        yield f"row {index}", numbers, target


def _jsonl_rows(path: Path) -> Iterator[Row]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text; check the file and its permissions") from error
    for index, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {index}: not JSON; correct or remove it") from error
        if not isinstance(row, dict) or not {"numbers", "target"} <= row.keys():
            raise DataError(f'{path}, line {index}: expected {{"numbers": [79, 60, 17], "target": 36}}; correct it')
        yield f"line {index}", row["numbers"], row["target"]

"""Problems from files and the hub, the held-out split, and the order of the training problems."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

P = TypeVar("P")  # the problem class of a task


class DataError(ValueError):
    """Problems, traces or completions cannot be used. The message names file and row, and says what to do."""


@dataclass(frozen=True)
class Format:
    example: str  # a line of a .jsonl file
    repository: str = ""  # a dataset on the hub
    files: dict[str, str] = field(default_factory=dict)  # "hub" and other sources -> file in the repository


def read_problems(source: str | Path, stored: Format, problem_of: Callable[[dict], P]) -> list[P]:
    """Read problems in the source's order, duplicates included. DataError: it has none, or a bad row.

    Args:
        source: the path of a .parquet or .jsonl file, or a name in `stored.files`, such as "hub"; also
            "hub@" and a branch, tag or commit.
        problem_of: row -> problem, or ValueError, TypeError or KeyError.
    """
    name, _, revision = str(source).partition("@")
    path = Path(os.path.expanduser(source))
    if name in stored.files:
        path = download(stored.repository, stored.files[name], revision or None)
    elif name == "hub":
        raise DataError("this task has no dataset on the hub; generate problems, or give a .jsonl file")
    elif path.suffix not in (".parquet", ".jsonl"):
        raise DataError(f"cannot read problems from '{source}': give \"hub\", a .parquet or a .jsonl file")
    elif not path.is_file():
        raise DataError(f'{path} is no file; give "hub" or the path of a .parquet or .jsonl file')
    problems = []
    rows = read_parquet(path) if path.suffix == ".parquet" else read_jsonl(path, stored.example)
    for place, row in rows:
        try:
            problems.append(problem_of(row))
        except (ValueError, TypeError, KeyError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise DataError(f"{path}, {place}: {reason}; expected {stored.example}") from error
    if not problems:
        raise DataError(f"{path} holds no problems; give a file with at least one")
    return problems


def download(repository: str, file: str, revision: str | None) -> Path:
    """The local path of a file in a dataset on the hub, from the cache if it is there already."""
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(
            repository, repo_type="dataset", revision=revision, allow_patterns=[file]
        )
    except Exception as error:  # a dozen kinds: no network, no such repository or revision, disk full
        named = f"{repository} at revision {revision}" if revision else repository
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        advice = "without a network, give a .parquet or .jsonl file, or generate problems"
        raise DataError(f"{named} could not be downloaded from the hub: {reason} ({advice})") from error
    return Path(folder) / file


def read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    """("row 1", row) of each row; DataError if the file cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        refuse_pointer(path)
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as parquet; write or download it again") from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"row {number}", row


def read_jsonl(path: str | Path, expected: str) -> Iterator[tuple[str, dict]]:
    """("line 1", row) of each line that is not blank. DataError: a line is not `expected`, or no file.

    The file may be in UTF-8 or UTF-16, with a byte-order mark or without.
    """
    path = Path(os.path.expanduser(path))
    try:
        refuse_pointer(path)
        content = path.read_bytes()
        lines = content.decode(json.detect_encoding(content)).split("\n")  # U+2028 does not end a line
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the file") from None
    except UnicodeError as error:
        raise DataError(f"{path} cannot be read as text ({error}); save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        place = f"line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
        except (ValueError, RecursionError):
            raise DataError(f"{path}, {place}: not JSON of Unicode text; correct it") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, {place}: expected {expected}; correct it")
        yield place, row


def refuse_pointer(path: Path) -> None:
    """DataError: the file is a pointer, which git-lfs leaves in place of a file not fetched."""
    with open(path, "rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise DataError(
                f"{path} is a pointer of git-lfs, not the file itself; run git lfs pull beside it"
            )


def fingerprint(problem) -> str:
    """16 hex digits that follow from a problem's `key` alone."""
    return hashlib.blake2b(repr(problem.key).encode(), digest_size=8, key=b"held out").hexdigest()


def split_problems(problems: Iterable[P], held_out: int, seen: Iterable[str] = ()) -> tuple[list[P], list[P]]:
    """Split into (train, held out), which share no `key`: those with the smallest fingerprints are held out.

    So a problem that is added or removed moves at most one other across the split.
    Problems whose fingerprints are `seen` are not held out. Duplicates are dropped first; one row in twelve
    of the Countdown dataset is one.
    """
    # Of duplicates the one with the smallest row, in whatever order they come.
    ordered = sorted(problems, key=lambda problem: list(problem.row().values()), reverse=True)
    by_fingerprint = {fingerprint(problem): problem for problem in ordered}
    fresh = sorted(by_fingerprint.keys() - set(seen))
    if not 0 <= held_out <= len(fresh) or held_out == len(by_fingerprint):
        raise DataError(f"cannot hold out {held_out} of {len(fresh)} different problems; hold out fewer")
    kept_back = fresh[:held_out]
    train = sorted(by_fingerprint.keys() - set(kept_back))
    return [by_fingerprint[mark] for mark in train], [by_fingerprint[mark] for mark in kept_back]


def endless_problems(problems: list[P], seed: int, position: int, count: int) -> list[P]:
    """`count` problems from `position` on in an endless sequence: all problems, shuffled each epoch."""
    taken: list[P] = []
    while len(taken) < count:
        epoch, offset = divmod(position + len(taken), len(problems))
        order = np.random.default_rng([seed, epoch]).permutation(len(problems))
        taken += [problems[i] for i in order[offset : offset + count - len(taken)]]
    return taken

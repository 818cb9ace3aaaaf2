"""Rows of JSON, one a line, from files that anybody may have written."""

import json
from collections.abc import Iterator
from pathlib import Path


class DataError(ValueError):
    """Problems, traces or completions that cannot be used; the message names the file and row, and the way out."""


def read_jsonl(path: str | Path, expected: str) -> Iterator[tuple[int, dict]]:
    """(line number, row) of each line that is not blank.

    Lines end at a line feed only: U+2028, which `str.splitlines` would cut at too, may stand in a text.

    Args:
        expected: what a line should look like, for the error of one that is something else.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or has a line that is no JSON object; it names the line.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, parse_row(line, f"{path}, line {number}", expected)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; name another, or make it first") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text ({error}); check the file and its permissions") from None


def parse_row(line: str, where: str, expected: str) -> dict:
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is JSON, but no text
    except (ValueError, RecursionError):
        raise DataError(f"{where}: not JSON of Unicode text; correct or remove it") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected {expected}; correct it")
    return row

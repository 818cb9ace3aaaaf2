"""Where commands write: standard streams that may go away during the work, and files for its results."""

import contextlib
import errno
import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lab.recipe import RecipeError


class LastingFile(io.FileIO):
    """The file of a standard stream. Once it cannot be written, its output is lost, and the work goes on."""

    error: OSError | None = None  # the reason

    def write(self, data) -> int:
        try:
            count = super().write(data)
            while count is None:  # it is full, and another program made it non-blocking
                select.select([], [self], [])
                count = super().write(data)
            return count
        except OSError as error:
            self.error = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            tell(f"note: output is lost from here on ({error.strerror}); the command goes on\n")
            return len(data)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Let the block outlive its terminal, and the readers of its output, and print in any encoding."""
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    before = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is None:
        sys.stdin = open(os.devnull)
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdin, sys.stdout, sys.stderr = before
        signal.signal(signal.SIGHUP, hangup)


def lasting(stream: TextIO | None) -> TextIO:
    """The same stream over a `LastingFile`; what its encoding lacks is shown as a question mark."""
    encoding = "utf-8"
    if stream is None:  # closed before the start
        file = LastingFile(os.devnull, "w")
        file.error = OSError(errno.EBADF, os.strerror(errno.EBADF))
    else:
        try:
            file = LastingFile(stream.fileno(), "w", closefd=False)
        except io.UnsupportedOperation:
            return stream  # a stand-in in memory
        encoding = stream.encoding
    return io.TextIOWrapper(io.BufferedWriter(file), encoding, errors="replace", line_buffering=True)


def lost_output() -> OSError | None:
    """The error by which standard output was lost, if it was."""
    file = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return getattr(file, "error", None)


def check_output() -> None:
    """RecipeError: standard output, where results go, cannot take them; a reader may leave."""
    error = lost_output()
    if error and error.errno != errno.EPIPE:
        raise RecipeError(f"standard output cannot take the results: {error.strerror}; name a file for them")


def tell(text: str) -> None:
    """Write to standard error at once, from a signal's handler too; without a reader, to nobody."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def check_writable(path: Path) -> None:
    """Before the work whose results go to `path`, make its folder. RecipeError: it cannot be written."""
    try:
        if path.is_fifo():
            return  # its reader would take the look for the end
        exists = os.path.lexists(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        open(path, "a").close()
        if not exists:
            path.unlink()
    except OSError as error:
        raise RecipeError(f"{path}: results cannot be written there: {error.strerror}") from None

"""How the commands end: an error in one clear line, and Ctrl-C or SIGTERM where a run can be resumed."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

import torch

from data import DataError
from lab.output import lasting_output, tell
from lab.recipe import RecipeError
from model import ModelError


@contextlib.contextmanager
def user_errors(out_of_memory: str = "take a smaller model"):
    """Turn errors that the user can do something about into one line on standard error and exit code 2.

    Other exceptions are bugs and keep their traceback. Ctrl-C ends in one line too, with exit code 130. A
    lost terminal, or a reader of the output that leaves, does not end the block.
    """
    with lasting_output():
        try:
            yield
        except (ModelError, DataError, RecipeError) as error:
            fail(str(error))
        except torch.OutOfMemoryError:
            fail(f"out of GPU memory: {out_of_memory}")
        except RuntimeError as error:
            if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
                raise
            advice = "--resume goes on from the last checkpoint"
            fail(f"another process of this run ended, see its message; {advice}")
        except OSError as error:
            fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        except KeyboardInterrupt as stop:
            print("\nstopped.", *stop.args, file=sys.stderr)
            sys.exit(getattr(stop, "exit_code", 130))


def fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


class Stopped(KeyboardInterrupt):
    """A signal has ended the run. The message says how to resume; `exit_code` is the shell's convention."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number


class Stop:
    """Whether a signal has asked the run to end, and the signal's number; printed if `announce`."""

    def __init__(self, announce: bool = True):
        self.number: int | None = None
        self.requested = threading.Event()
        self.announce = announce

    def handle(self, number: int, frame=None) -> None:
        if self.requested.is_set():
            show_cursor = "\x1b[?25h" * os.isatty(2)
            tell(f"{show_cursor}\nstopped at once.\n")
            os._exit(128 + number)
        self.number = number
        self.requested.set()
        if self.announce:
            tell("\nstopping at the next point to resume from; a second signal stops at once\n")


@contextlib.contextmanager
def stoppable(announce: bool = True) -> Iterator[Stop]:
    """Within the block, let the yielded `Stop` handle SIGINT and SIGTERM; in a thread, change nothing."""
    stop = Stop(announce)
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        before = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Ctrl-C and SIGTERM end a run where it can be resumed: the first asks it to, the second stops it at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


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
            show_cursor = b"\x1b[?25h" * os.isatty(2)
            os.write(2, show_cursor + b"\nstopped at once.\n")
            os._exit(128 + number)
        self.number = number
        self.requested.set()
        if self.announce:
            os.write(2, b"\nstopping where the run can go on; once more stops it at once\n")


@contextlib.contextmanager
def stoppable(announce: bool = True) -> Iterator[Stop]:
    """Send both signals to the `Stop` it gives, for the length of the block; in a thread, change nothing."""
    stop = Stop(announce)
    before = {}
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        before = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

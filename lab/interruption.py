"""Ctrl-C and SIGTERM end a run where it can go on: the first one asks, the second one stops at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = b"\x1b[?25h"


class Stopped(KeyboardInterrupt):
    """A run ended by a signal; the message says where it goes on, `exit_code` is what a shell expects."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number


class RolloutsDropped(Exception):
    """Sampling was broken off, so the step has not begun."""


class Stop:
    """Whether the run has been asked to end; `number` is the signal's. Says so, unless another process `speaks`."""

    def __init__(self, speaks: bool = True):
        self.number: int | None = None
        self.speaks = speaks

    @property
    def requested(self) -> bool:
        return self.number is not None

    def handle(self, number: int, frame=None) -> None:
        if self.requested:
            os.write(2, SHOW_CURSOR * os.isatty(2) + b"\nstopped at once.\n")
            os._exit(128 + number)
        self.number = number
        if self.speaks:
            os.write(2, b"\nstopping where the run can go on; once more stops it at once\n")


@contextlib.contextmanager
def stoppable(speaks: bool = True) -> Iterator[Stop]:
    """Within the block the two signals go to the `Stop` it gives; in a thread, which gets no signals, nothing changes."""
    stop = Stop(speaks)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

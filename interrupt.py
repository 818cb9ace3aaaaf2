"""Ctrl-C during a command's imports, which take seconds. Standard library only, so that it is there before them."""

import contextlib
import os
import signal


@contextlib.contextmanager
def ctrl_c_exits():
    """Within the block Ctrl-C ends the process at once: one line, exit code 130.

    No KeyboardInterrupt is raised, since some code that runs at import swallows any exception.
    """

    def exit_at_once(*_):
        os.write(2, b"\nstopped.\n")
        os._exit(130)

    before = signal.signal(signal.SIGINT, exit_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

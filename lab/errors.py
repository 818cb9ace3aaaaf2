"""How the commands fail: one clear line, exit code 2, no traceback."""

import contextlib
import sys

import torch

from data import DataError
from lab.recipe import RecipeError
from model import ModelError


@contextlib.contextmanager
def user_errors(out_of_memory: str = "take a smaller model"):
    """Turn errors that the user can do something about into one line on standard error and exit code 2.

    Other exceptions are bugs of this project and keep their traceback. Ctrl-C also ends in one line, with
    what its KeyboardInterrupt says, and exit code 130. `out_of_memory` is the advice for a full GPU.
    """
    try:
        yield
    except (ModelError, DataError, RecipeError) as error:
        fail(str(error))
    except torch.OutOfMemoryError:
        fail(f"out of GPU memory: {out_of_memory}")
    except BrokenPipeError:
        sys.exit(0)  # whoever read the output has seen enough
    except OSError as error:
        fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except KeyboardInterrupt as stop:
        print("\nstopped.", *stop.args, file=sys.stderr)
        sys.exit(getattr(stop, "exit_code", 130))


def fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)

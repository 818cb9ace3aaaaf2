"""Tests find the packages wherever pytest starts, never reach for the hub, and see one terminal."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

RICH = ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
for name in (*RICH, "CI", "LC_ALL", "PYTHONIOENCODING"):
    os.environ.pop(name, None)
os.environ |= {"TERM": "xterm", "LANG": "C.UTF-8"}
if not os.access(os.path.expanduser("~"), os.W_OK):
    os.environ["HOME"] = tempfile.mkdtemp()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # several at once: each on a core of its own
    os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))
pytest.register_assert_rewrite("helpers")  # so that its failures show their values, too


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory) -> Path:
    """One terse run of the smoke recipe; all checkpoints kept."""
    from helpers import SMOKE, smoke, terse  # need the path and the environment set above

    from lab.stages import train

    out = tmp_path_factory.mktemp("runs") / "smoke"
    with pytest.MonkeyPatch.context() as patch:
        terse(patch)
        train(smoke(SMOKE, "--out", out), quiet=True)
    return out

"""Tests find the packages wherever pytest is started, never reach for the hub, and have one terminal everywhere."""

import os
import sys
import tempfile
from pathlib import Path

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

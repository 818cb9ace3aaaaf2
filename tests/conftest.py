"""Tests run from the repository's root, on one thread each, so that they neither need nor disturb anything outside."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent.parent))

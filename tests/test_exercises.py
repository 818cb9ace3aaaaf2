"""The exercises' solutions still apply, have the stated number of lines, and do what the page says."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATCHES = sorted((ROOT / "docs" / "exercises").glob("*.patch"))
SECTIONS = re.split(r"^## ", (ROOT / "docs" / "exercises.md").read_text(), flags=re.MULTILINE)[1:]
CORE = ("model", "data", "rl", "lab", "recipes", "experiments", "tests")
CHECKS = "tests/exercise_checks.py"
OTHERS = "exercise_checks and not once or test_advantage or bounds"  # the first is in the way of the second


def run(folder: Path, *command) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the code that the patches change, outside the repository."""
    folder = tmp_path_factory.mktemp("tree")
    for name in CORE:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "ruff.toml"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("number", range(1, 9))
def test_an_exercise_says_where_what_and_how_many_lines(number, tree):
    assert len(PATCHES) == len(SECTIONS) == 8
    section, patch = SECTIONS[number - 1], PATCHES[number - 1]
    assert section.startswith(f"{number}. ")
    for part in ("**Where:**", "**Expect:**", "**Then:**", f"**Solution:** `{number}-", f"`{patch.name}`"):
        assert part in section
    lines = re.search(r"\*\*Lines:\*\* (\d+)", section)[1]
    assert int(lines) == len(re.findall(r"^\+(?!\+\+ )", patch.read_text(), flags=re.MULTILINE))
    result = run(tree, "git", "apply", "--check", patch)
    advice = f"make the change by hand, then: git add -N . && git diff > docs/exercises/{patch.name}"
    assert result.returncode == 0, f"{patch.name} no longer applies: {result.stderr}{advice}"


@pytest.mark.parametrize(
    ("patches", "tests"),
    [
        (PATCHES[:1], [CHECKS, "tests/test_reward.py", "tests/test_drift.py", "-k", "once or miss or guard"]),
        (PATCHES[1:], [CHECKS, "tests/test_advantage.py", "tests/test_recipe.py", "-k", OTHERS]),
    ],
    ids=["first", "others"],
)
def test_solutions_do_what_the_exercises_say(patches, tests, tree, tmp_path):
    """They also keep the project's style, and the tests of what they change."""
    patched = shutil.copytree(tree, tmp_path / "patched")
    result = run(patched, "git", "apply", *patches)
    assert result.returncode == 0, result.stderr
    for check in (["check"], ["format", "--check"]):
        result = run(
            patched, sys.executable, "-m", "ruff", *check, "--no-cache", "model", "data", "rl", "lab"
        )
        assert result.returncode == 0, result.stdout
    pytest_ = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist")
    result = run(patched, *pytest_, *tests)
    assert result.returncode == 0, result.stdout

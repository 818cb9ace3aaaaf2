"""The exercises' solutions still apply, have the stated number of lines, and do what the page says."""

import json
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
GROUPS = (PATCHES[:1], PATCHES[1:])  # the first is in the way of the second
TOUCHED = (  # tests of what each group changes
    ("tests/test_reward.py", "tests/test_drift.py", "-k", "miss or guard"),
    ("tests/test_advantage.py", "tests/test_recipe.py", "-k", "advantage or bounds"),
)


def git(folder: Path, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True)


def python(folder: Path, *arguments) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the code that the patches change, outside the repository."""
    folder = tmp_path_factory.mktemp("tree")
    for name in CORE:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    return folder


@pytest.mark.parametrize("number", range(1, 9))
def test_an_exercise_says_where_what_and_how_many_lines(number, tree):
    section = SECTIONS[number - 1]
    assert section.startswith(f"{number}. ")
    for part in ("**Where:**", "**Expect:**", "**Then:**"):
        assert part in section
    lines, name = re.search(r"\*\*Lines:\*\* (\d+).*\*\*Solution:\*\* `([\w-]+\.patch)`", section).groups()
    patch = ROOT / "docs" / "exercises" / name
    assert patch == PATCHES[number - 1]
    assert name.startswith(f"{number}-")
    assert int(lines) == len(re.findall(r"^\+(?!\+\+ )", patch.read_text(), flags=re.MULTILINE))
    result = git(tree, "apply", "--check", patch)
    advice = f"make the change by hand, then: git add -N . && git diff > docs/exercises/{name}"
    assert result.returncode == 0, f"{name} no longer applies: {result.stderr}{advice}"


@pytest.fixture(scope="module")
def errors(tree, tmp_path_factory) -> dict[str, str | None]:
    """What `exercise_checks.py` prints, with the solutions applied in two trees."""
    errors = {}
    for number, patches in enumerate(GROUPS):
        patched = tmp_path_factory.mktemp(f"patched{number}")
        shutil.copytree(tree, patched, dirs_exist_ok=True)
        for patch in patches:
            result = git(patched, "apply", patch)
            assert result.returncode == 0, f"{patch.name}: {result.stderr}"
        lint(patched, patches)
        result = python(
            patched, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *TOUCHED[number]
        )
        assert result.returncode == 0, result.stdout
        result = python(
            patched, "tests/exercise_checks.py", *(patch.name.partition("-")[0] for patch in patches)
        )
        assert result.returncode == 0, result.stderr
        errors |= json.loads(result.stdout.splitlines()[-1])
    return errors


def lint(folder: Path, patches: list[Path]) -> None:
    """The Python files that the patches change keep the project's style."""
    files = {
        name
        for patch in patches
        for name in re.findall(r"^\+\+\+ b/(\S+\.py)$", patch.read_text(), flags=re.MULTILINE)
    }
    shutil.copy(ROOT / "ruff.toml", folder)
    for check in (["check"], ["format", "--check"]):
        result = python(folder, "-m", "ruff", *check, "--no-cache", *files)
        assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("number", range(1, 9))
def test_a_solution_does_what_the_exercise_says(number, errors):
    assert len(PATCHES) == len(SECTIONS) == len(errors) == 8
    assert errors[str(number)] is None, errors[str(number)]

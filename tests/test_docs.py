"""What the documents say about the code is true: links, names, paths, and the notebook's asserts."""

import ast
import inspect
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from data import GSM8K, Calculus, Countdown
from docs import make_readme
from lab.recipe import STAGES, Recipe
from lab.runfolder import flatten
from rl import grpo_step

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "one_step.ipynb"
KINDS = ("*.md", "docs/**/*.md", "docs/*.ipynb", "benchmarks/*.md")
DOCUMENTS = sorted(path for kind in KINDS for path in ROOT.glob(kind))
HISTORY = ("LOG.md", "CHANGELOG.md")
PRESENT = [document for document in DOCUMENTS if document.name not in HISTORY]
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)|src(?:set)?=\"([^\"]+)\"")
OPTION = re.compile(r"--([a-z]+(?:\.[a-z0-9-]+)+)")


def prose(path: Path) -> str:
    """A document's text; of a notebook, that of its cells for reading."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return text


def links(path: Path) -> list[tuple[str, str]]:
    """(text, target) of each link and picture of a document that stays within the repository."""
    text = re.sub(r"^```.*?^```", "", prose(path), flags=re.DOTALL | re.MULTILINE)
    found = [(name, target or source) for name, target, source in LINK.findall(text)]
    return [(name, target) for name, target in found if not re.match(r"https?:|mailto:", target)]


def defined_names(source: str) -> set[str]:
    """Functions, classes and constants of a module; what its classes hold, with and without their name."""
    names = set()

    def add(body: list[ast.stmt], prefix: str = "") -> None:
        for node in body:
            targets = getattr(node, "targets", [getattr(node, "target", node)])
            for target in targets:
                name = getattr(target, "id", None) or getattr(target, "name", "")
                names.update((name, prefix + name))
            if isinstance(node, ast.ClassDef):
                add(node.body, f"{node.name}.")

    add(ast.parse(source).body)
    return names


def named(text: str) -> list[str]:
    """The names of code in a link's text: `Optimizer.step`, `score(...)`; paths and options are none."""
    return re.findall(r"`([A-Za-z_][\w.]*)(?:\(.*?\))?`", text)


def anchors(path: Path) -> set[str]:
    """The headings of a document as GitHub makes them into anchors."""
    headings = re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_that_defines_its_names(document):
    for text, target in links(document):
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists() and path.is_relative_to(ROOT), f"{document.name}: no {target}"
        if path.suffix == ".py":
            missing = {part for part in named(text) if not part.endswith(".py")}
            missing -= defined_names(path.read_text())
            assert not missing, f"{document.name}: {target} does not define {missing}"
        elif anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{document.name}: no heading #{anchor} in {path.name}"


def test_the_readme_is_short_and_has_the_code_as_it_is():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1100
    assert text.count("\n") <= 170
    assert make_readme.filled(text) == text, "python -m docs.make_readme"
    assert inspect.getsource(grpo_step) in text
    changed = text.replace("group_advantages(rewards", "other(rewards")
    assert changed != text and make_readme.filled(changed) == text, "trap: a part that is not filled in"


def test_the_python_for_your_own_code_runs():
    namespace = {}
    text = (ROOT / "docs" / "runs.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    for block in blocks:
        exec(block.replace("samples_per_prompt=16", "samples_per_prompt=2"), namespace)
    assert len(blocks) == 2
    assert namespace["metrics"]["rollout_seconds"] > 0
    assert len(namespace["groups"][0]) == 2


def test_trap_a_check_of_links_that_sees_nothing():
    assert ("`defined_names`", "tests/test_docs.py") in links(ROOT / "CONTRIBUTING.md")
    assert ("", "docs/curve-256-tiny.png") in links(ROOT / "README.md")
    assert named("`f`, `C.g(x)`, `rl/loss.py`, `--out x`, plain") == ["f", "C.g"]
    source = "A = 1\nclass C:\n    x: int = 0\n    def g(self): h = 1"
    assert {"A", "C", "x", "C.x", "g", "C.g"} <= defined_names(source)
    assert "h" not in defined_names(source)


def recipe_options() -> set[str]:
    """A recipe's options as the command line spells them, without their dashes."""
    values = {}
    for task in (Countdown(), Calculus(), GSM8K()):
        values |= flatten(asdict(Recipe(task=task)))
    for stage in STAGES.values():
        values |= flatten(asdict(stage()), "stages.0")
    switches = [re.sub(r"(\w+)$", r"no-\1", name) for name, value in values.items() if type(value) is bool]
    return {name.replace("_", "-") for name in [*values, *switches]}


@pytest.mark.parametrize("document", PRESENT, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_and_option_that_a_document_names_exists(document):
    text = prose(document)
    folders = "model|data|rl|lab|experiments|docs|tests|benchmarks|recipes|tasks"
    modules = [f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m ([a-z]\w*(?:\.\w+)+)", text)]
    for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", text) + modules:
        assert (ROOT / path).exists(), f"{document.name}: no {path}"

    options = recipe_options()
    assert {"stages.0.clip-high", "sampling.top-k", "reward.no-near-miss"} <= options
    solutions = "".join(path.read_text() for path in ROOT.glob("docs/exercises/*.patch"))
    added = {name.replace("_", "-") for name in re.findall(r"^\+    (\w+): ", solutions, flags=re.MULTILINE)}
    for option in OPTION.findall(text):
        of_a_solution = document.name == "exercises.md" and option.split(".")[-1] in added
        known = re.sub(r"^stages\.\d+", "stages.0", option) in options
        assert known or of_a_solution, f"{document.name}: no option --{option}"


def run_notebook(source: Path, target: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "docs" / "run_notebook.py", source, target]
    return subprocess.run(command, cwd=source.parent, capture_output=True, text=True, timeout=300)


def test_the_notebooks_cells_run_in_order_and_their_asserts_hold(tmp_path):
    result = run_notebook(NOTEBOOK, tmp_path / "run.ipynb")
    assert result.returncode == 0, result.stderr
    made, kept = (json.loads(path.read_text()) for path in (tmp_path / "run.ipynb", NOTEBOOK))
    for new, old in zip(made["cells"], kept["cells"]):
        kinds = [[output["output_type"] for output in cell.get("outputs", [])] for cell in (new, old)]
        assert kinds[0] == kinds[1], "outputs are missing: python docs/run_notebook.py docs/one_step.ipynb"


def test_trap_a_notebook_runner_that_passes_anything(tmp_path):
    path = tmp_path / "bad.ipynb"
    cell = {"cell_type": "code", "source": ["x = 1\n", "assert x == 2"], "outputs": []}
    path.write_text(json.dumps({"cells": [cell]}))
    result = run_notebook(path, tmp_path / "out.ipynb")
    assert result.returncode != 0
    assert "code cell 1" in result.stderr
    assert not (tmp_path / "out.ipynb").exists()


def test_the_notebook_is_small_and_has_plots_and_no_local_paths():
    text = NOTEBOOK.read_text()
    assert len(text) < 400_000
    assert text.count('"image/png": "iVBORw0KGgo') >= 4
    text = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"(/home|/root|/tmp|/work|/Users|site-packages)\b", text)

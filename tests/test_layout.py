"""The shape of the tree: imports run one way, rl stays small, lines stay short, public names stay where they are."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "model": {"model"},
    "data": {"data"},
    "rl": {"model", "data", "rl"},
    "lab": {"model", "data", "rl", "lab"},
    "experiments": {"model", "data", "rl", "lab", "experiments", "train", "eval", "play"},
}
PRODUCT = [path for package in ("model", "data", "rl", "lab") for path in (ROOT / package).rglob("*.py")]
PRODUCT += [ROOT / name for name in ("train.py", "eval.py", "play.py")]


def imported(path: Path) -> set[str]:
    """The top-level packages that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package):
    ours = {path.stem for path in ROOT.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert ours >= ALLOWED["experiments"] | {"tests"}
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert imported(path) & ours <= ALLOWED[package], path
        assert not imported(path) & {"transformers", "trl", "accelerate", "pickle"}, path


def test_rl_has_at_most_twelve_files():
    assert 0 < len(list((ROOT / "rl").rglob("*.py"))) <= 12


def test_no_line_of_the_product_is_over_110_columns():
    lines = [(path, number, line) for path in PRODUCT for number, line in enumerate(path.read_text().splitlines(), 1)]
    assert len(lines) > 1000
    assert [f"{path.relative_to(ROOT)}:{number}" for path, number, line in lines if len(line) > 110] == []


NAMES = {
    "data": "Problem evaluate_expression generate_problems load_problems solve split_problems",
    "model": "Completion KVCache Qwen3 Qwen3Config Tokenizer generate load_model save_model",
    "rl": "group_advantages grpo_loss grpo_step score sft_loss",
}


@pytest.mark.parametrize("package", NAMES)
def test_public_names_are_where_the_readme_says(package):
    assert all(callable(getattr(importlib.import_module(package), name)) for name in NAMES[package].split())

"""The order of imports: model and data know nothing of the others, tasks only data; rl uses these, study and bases use rl."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "model": {"model"},
    "data": {"data"},
    "tasks": {"data", "tasks"},
    "rl": {"model", "data", "tasks", "rl"},
    "study": {"rl", "study"},
    "bases": {"model", "data", "tasks", "rl", "bases"},
}


def imported_packages(path: Path) -> set[str]:
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
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert imported_packages(path) & set(ALLOWED) <= ALLOWED[package], path


def test_the_core_never_imports_transformers_or_pickle():
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            assert not imported_packages(path) & {"transformers", "trl", "accelerate", "pickle"}, path


def test_public_names_are_where_the_readme_says():
    from data import Problem, evaluate_expression, generate_problems, load_problems, solve, split_problems
    from model import Completion, KVCache, Qwen3, Qwen3Config, Tokenizer, generate, load_model, save_model
    from rl import group_advantages, grpo_loss, score, sft_loss

    names = (
        Problem, evaluate_expression, generate_problems, load_problems, solve, split_problems, Completion, KVCache,
        Qwen3, Qwen3Config, Tokenizer, generate, load_model, save_model, group_advantages, grpo_loss, score, sft_loss,
    )  # fmt: skip
    assert all(callable(name) for name in names)

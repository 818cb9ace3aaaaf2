"""The shape of the tree: imports run one way."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = {"model", "data", "rl"}
ALLOWED = {
    "model": {"model"},
    "data": {"data"},
    "rl": CORE,
    "lab": CORE | {"lab"},
    "experiments": CORE | {"lab", "experiments", "train", "eval", "play"},
}


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
    forbidden = ours - ALLOWED[package] | {"transformers", "trl", "accelerate", "pickle"}
    if package == "data":
        forbidden.add("torch")
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & forbidden, path

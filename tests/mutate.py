"""Mutation checks: `python tests/mutate.py` changes the reward, advantages and losses in one place at a time.

Every change has to fail a test of that module. What survives is listed, and has to be explained in
EQUIVALENT.
"""

import ast
import copy
import importlib.abc
import importlib.util
import multiprocessing.connection
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent

import hypothesis  # noqa: F401  (the slow imports, once for all mutants)
import pytest
import torch
import transformers  # noqa: F401
import tyro

WATCHED = {
    "data/countdown.py": ["test_reward.py", "test_countdown.py", "test_load.py", "test_play.py"],
    "data/task.py": ["test_reward.py", "test_countdown.py", "test_calculus.py", "test_gsm8k.py"],
    "rl/reward.py": ["test_drift.py"],
    "rl/advantage.py": ["test_advantage.py"],
    "rl/loss.py": ["test_loss.py", "test_grpo.py"],
}
NEAR = "return Score(float(max(Fraction(3, 10), Fraction(4, 5) - distance / 20)), 'near')"
THINK = "if text.lstrip(BLANKS).startswith('<think>'):"
LINE = "line = text.rstrip(BLANKS).rpartition('\\n')[2]"
BEFORE = "before, _, rest = text.partition('<answer>')"
CONTENT = "content, closed, _ = rest.partition('</answer>')"
EQUIVALENT = {  # mutant -> why no test can, or need, see it
    "@dataclass(frozen=True)  ->  @dataclass()": "nothing changes a Score; frozen says so",
    "@dataclass(frozen=True)  ->  @dataclass(frozen=False)": "the same",
    "@abstractmethod  ->  @abstractmethod": "a default of Task.prompt, which every task overrides",
    f"{NEAR}  ->  {NEAR.replace('(3, 10)', '(2, 10)')}": "the floor is only reached where near ends",
    NEAR + "  ->  " + NEAR.replace("(3, 10)", "(3, 11)"): "the same",
    THINK + "  ->  " + THINK.replace("lstrip", "strip"): "only the beginning is looked at",
    BEFORE + "  ->  " + BEFORE.replace("partition", "rpartition"): "there is exactly one",
    CONTENT + "  ->  " + CONTENT.replace("partition", "rpartition"): "there is one at most",
    LINE
    + "  ->  "
    + LINE.replace("rstrip", "strip"): "blanks before the first line's arithmetic change nothing",
}
NOTHING = "nothing changed"
SWAPS = {
    ast.Lt: (ast.LtE, ast.Gt), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.Lt),
    ast.GtE: (ast.Gt, ast.Lt), ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,), ast.And: (ast.Or,), ast.Or: (ast.And,),
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
}  # fmt: skip
NAMES = {
    "min": "max", "max": "min", "minimum": "maximum", "amax": "amin", "amin": "amax", "mean": "sum",
    "sum": "mean", "partition": "rpartition", "rpartition": "partition", "lstrip": "strip", "rstrip": "strip",
    "startswith": "endswith", "endswith": "startswith", "sorted": "set",
}  # fmt: skip


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """(what was changed, changed source): first nothing, then each single change."""
    yield NOTHING, source
    tree = ast.parse(source)
    for number, node in enumerate(walk(tree)):
        for change in changes(node):
            changed = copy.deepcopy(tree)
            copied = walk(changed)[number]
            before = ast.unparse(statement_of(changed, copied))
            change(copied)
            after = ast.unparse(statement_of(changed, copied))
            if before != after:
                yield f"{before.splitlines()[0]}  ->  {after.splitlines()[0]}", ast.unparse(changed)


def walk(node: ast.AST) -> list[ast.AST]:
    """A node and all below it but docstrings, what errors say, and type hints: words are free."""
    if isinstance(node, (ast.JoinedStr, ast.Raise)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ):
        return []
    found = [node]
    for name, field in ast.iter_fields(node):
        if name not in ("annotation", "returns"):
            for child in field if isinstance(field, list) else [field]:
                found += walk(child) if isinstance(child, ast.AST) else []
    return found


def statement_of(tree: ast.AST, node: ast.AST) -> ast.AST:
    """The innermost statement around a node."""
    statements = [other for other in ast.walk(tree) if isinstance(other, ast.stmt)]
    return [other for other in statements if any(part is node for part in ast.walk(other))][-1]


def changes(node: ast.AST) -> Iterator:
    """Functions that change a node in place, each in one way."""

    def setter(name, value):
        return lambda copied: setattr(copied, name, value)

    if isinstance(node, ast.Compare):
        for new in SWAPS.get(type(node.ops[0]), ()):
            yield setter("ops", [new(), *node.ops[1:]])
    elif isinstance(node, (ast.BoolOp, ast.BinOp)):
        for new in SWAPS.get(type(node.op), ()):
            yield setter("op", new())
    elif isinstance(node, ast.UnaryOp):
        yield lambda copied: setattr(
            copied, "operand", ast.UnaryOp(copied.op, copied.operand)
        )  # twice is not at all
    elif isinstance(node, ast.Constant) and type(node.value) is bool:
        yield setter("value", not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield setter("value", node.value + 1)
        yield setter("value", node.value - 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
        yield setter("value", node.value + "x")
        yield setter("value", "")
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield setter("id", NAMES[node.id])
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield setter("attr", NAMES[node.attr])
    elif isinstance(node, ast.Return) and node.value is not None:
        yield setter("value", ast.Constant(None))
    elif isinstance(node, ast.If):
        yield setter("test", ast.Constant(True))
        yield setter("test", ast.Constant(False))
    elif isinstance(node, ast.Call) and node.keywords:
        for place in range(len(node.keywords)):
            yield lambda copied, place=place: copied.keywords.pop(place)


class Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Serves one module from changed source."""

    def __init__(self, name: str, source: str):
        self.name, self.source = name, source

    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def exec_module(self, module):
        exec(compile(self.source, f"<changed {self.name}>", "exec"), module.__dict__)


def judge(path: str, source: str, seconds: int) -> None:
    """Run a module's tests with its source replaced, in a process of its own; exit code 0 if they pass."""
    torch.set_num_threads(1)
    sys.meta_path.insert(0, Loader(path.removesuffix(".py").replace("/", "."), source))
    for descriptor in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    signal.alarm(seconds)
    sys.exit(
        pytest.main(["-x", "-q", "-p", "no:cacheprovider", *(str(TESTS / name) for name in WATCHED[path])])
    )


def main(
    modules: tyro.conf.Positional[tuple[str, ...]] = tuple(WATCHED), processes: int = 2, seconds: int = 120
) -> None:
    """Run the tests against mutants.

    Args:
        modules: files to mutate.
        processes: mutants at once.
        seconds: a mutant that takes longer hangs, which counts as noticed.
    """
    os.chdir(ROOT)
    jobs = [(path, what, source) for path in modules for what, source in mutants((ROOT / path).read_text())]
    count = len(jobs) - len(modules)
    running: dict = {}
    survivors = []
    while jobs or running:
        while jobs and len(running) < processes:
            path, what, source = jobs.pop(0)
            process = multiprocessing.get_context("fork").Process(target=judge, args=(path, source, seconds))
            process.start()
            running[process] = path, what
        multiprocessing.connection.wait([process.sentinel for process in running])
        for process in [process for process in running if not process.is_alive()]:
            path, what = running.pop(process)
            if what == NOTHING and process.exitcode:
                sys.exit(f"{path}: its tests fail as it is")
            if what != NOTHING and not process.exitcode:
                survivors.append((path, what))
    unexplained = [f"{path}: {what}" for path, what in survivors if what not in EQUIVALENT]
    print(f"{count} mutants, {count - len(survivors)} noticed, {len(survivors) - len(unexplained)} explained")
    if unexplained:
        sys.exit("not noticed:\n" + "\n".join(unexplained))


if __name__ == "__main__":
    tyro.cli(main)

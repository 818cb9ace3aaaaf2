"""The parts of a task, and the answer block of a completion. Nothing here is specific to one task.

To add a task, write a file such as data/gsm8k.py and add its class to `AnyTask` in data/__init__.py.
"""

import functools
import random
from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

from data.expression import BLANKS
from data.load import Format, read_problems


class AnyProblem:
    """One question, as a frozen dataclass; `str(problem)` is how tables and screens show it."""

    key: Hashable  # equal for problems that differ only in wording; the held-out split hashes its repr

    def row(self) -> dict:
        """The fields of the problem, as files of problems, rollouts and traces hold them."""
        return vars(self).copy()


@dataclass(frozen=True)
class Score:
    reward: float  # 0 to 1 from a task; a recipe may change it
    outcome: str  # "correct", "near", "wrong" or "malformed"


CORRECT = Score(1.0, "correct")
WRONG = Score(0.1, "wrong")
MALFORMED = Score(0.0, "malformed")
INSIDE = " inside <think> </think>"  # for prompts
EXAMPLES_SEED = 1_000_007  # of the problems that are shown, solved, in prompts


class Task(ABC):
    """A family of problems with exact answers: a frozen dataclass whose fields are a recipe's `[task]`."""

    kind: str  # the task's name in a recipe
    file_format: ClassVar[Format]  # how files hold its problems
    input_format: ClassVar[str]  # what `parse_input` reads, shown to the user

    def generate(self, count: int, seed: int) -> list[AnyProblem]:
        """`count` different problems; the same arguments give the same list. ValueError: there are fewer."""
        raise ValueError(f'{self.kind} has no generator: take "hub" or a file for problems')

    def load(self, source: str) -> list[AnyProblem]:
        """Problems from "hub" or from a .parquet or .jsonl file, see `read_problems`."""
        return read_problems(source, self.file_format, self.problem_from_row)

    @abstractmethod
    def problem_from_row(self, row: dict) -> AnyProblem:
        """The inverse of `row()`. ValueError, TypeError or KeyError if the row is no problem."""

    @abstractmethod
    def parse_input(self, text: str) -> AnyProblem:
        """The problem that a user typed. ValueError with advice if it is none."""

    @abstractmethod
    def prompt(self, problem: AnyProblem, thinking: bool = True) -> str:
        """The text of the user's turn; without `thinking`, it does not speak of `<think>`."""

    def score(self, text: str, problem: AnyProblem, thinking: bool = True) -> Score:
        """Score a completion: malformed if `split_answer` finds no answer, else what `judge` says."""
        parts = split_answer(text, thinking)
        if parts is None:
            return MALFORMED
        before, answer = parts
        return self.judge(before, answer, problem)

    @abstractmethod
    def judge(self, before: str, answer: str, problem: AnyProblem) -> Score:
        """Score the content of an answer block; `before` is the text between the thinking and the block.

        Both are hostile input: bounded time, no exception.
        """

    def difficulty(self, problem: AnyProblem) -> str:
        """A class of problems, such as "3 to 4 steps"; evaluations give accuracy by it."""
        return "all"

    def solution(self, problem: AnyProblem) -> str | None:
        """A correct answer, or None if none is known."""
        return None

    def work_out(self, problem: AnyProblem, rng: random.Random) -> tuple[str, str] | None:
        """(working, content of the answer block) of a solution as one would write it down; None: not found.

        Everything calculated in the working is right, but it may hold attempts that lead nowhere.
        """
        raise ValueError(f"{self.kind} cannot write worked solutions: it has no work_out")

    def examples(self, count: int) -> list[AnyProblem]:
        """`count` problems with worked solutions, for prompts; a run neither trains nor evaluates on them."""
        return self.generate(count, EXAMPLES_SEED) if count else []


def worked_solution(task: Task, problem: AnyProblem, thinking: bool, rng: random.Random) -> str | None:
    """A completion that solves `problem`, as `task` works it out; None: it finds no solution."""
    worked = task.work_out(problem, rng)
    if worked is None:
        return None
    working, answer = worked
    closed = "</think>\n" if thinking else ""
    return f"{working}\n{closed}<answer>{answer}</answer>"


@functools.lru_cache
def solved_examples(task: Task, count: int, thinking: bool) -> list[tuple[AnyProblem, str]]:
    """`count` problems, each with a worked solution, for prompts."""
    rng = random.Random(EXAMPLES_SEED)
    return [(problem, worked_solution(task, problem, thinking, rng)) for problem in task.examples(count)]


def split_answer(text: str, thinking: bool) -> tuple[str, str] | None:
    """(text between the thinking and the answer block, content of the block), or None if malformed.

    After the thinking there must be exactly one block. In the thinking, a single `<answer>` or `</answer>` is
    ignored, since it may be talk about the format; a pair is malformed. With `thinking`, the prompt ended in
    an open `<think>`, which the completion must close once. A completion may open it itself, at its start.
    """
    if text.lstrip(BLANKS).startswith("<think>"):
        text = text.partition("<think>")[2]
        thinking = True
    if thinking:
        thoughts, closed, text = text.partition("</think>")
        if not closed or "<think>" in thoughts or "</answer>" in thoughts.partition("<answer>")[2]:
            return None
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return None
    before, _, rest = text.partition("<answer>")
    content, closed, _ = rest.partition("</answer>")
    if not closed or "<think>" in before or "</think>" in before:
        return None
    return before, content


def steps_difficulty(steps: int) -> str:
    if steps <= 2:
        return "1 to 2 steps"
    return "3 to 4 steps" if steps <= 4 else "5 steps or more"

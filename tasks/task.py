"""What a task is, and how an answer is told from the rest of a completion. Nothing here is about one task.

A task is one small file in this folder: its problems, what a model is asked, and the verdict on what it writes. It is a
frozen dataclass, whose fields are a recipe's table `[task]`. To add one, write the file and name it in `tasks/__init__.py`.
"""

from abc import abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Protocol, TypeVar

from data.expression import BLANKS
from data.sources import Format, read_problems


class Problem(Protocol):
    """One question. Its text, `str(problem)`, is what tables and screens call it."""

    @property
    def key(self) -> Hashable:
        """Equal for problems that are the same in other words, and sortable: no key is both trained on and held out."""

    @property
    def value(self) -> Hashable:
        """The right answer, as the task's `read` gives it; not needed where the task has its own `score`."""

    def row(self) -> dict:
        """The problem as JSON, the way files of problems, rollouts and traces hold it."""


P = TypeVar("P", bound=Problem)


@dataclass(frozen=True)
class Score:
    """A reward from 0 to 1, and what it was for: "correct", "near", "wrong" or "malformed"."""

    reward: float
    outcome: str


CORRECT = Score(1.0, "correct")
WRONG = Score(0.1, "wrong")
MALFORMED = Score(0.0, "malformed")


class Task(Protocol[P]):
    """A family of problems with exact answers. What most tasks do in the same way is written out here.

    It is a frozen dataclass whose fields all have defaults.

    Attributes:
        kind: the task's name in a recipe.
        stored: how files hold its problems.
        typed: what `typed_problem` takes, to be told to a person.
        published: accuracies to plot beside a run's: by new tokens allowed, (GRPO step, accuracy in %) of the paper.
    """

    kind: str
    stored: ClassVar[Format]
    typed: ClassVar[str]
    published: ClassVar[dict[int, list[tuple[int, float]]]] = {}

    @abstractmethod
    def generate(self, count: int, seed: int) -> list[P]:
        """`count` different problems; the same arguments give the same list. ValueError: there are not so many."""

    def load(self, source: str) -> list[P]:
        """Problems from "hub", or a .parquet or .jsonl file, in its order. DataError: it cannot be used."""
        return read_problems(source, self.stored, self.problem)

    @abstractmethod
    def problem(self, row: dict) -> P:
        """The problem that `row()` gave. ValueError, TypeError or KeyError: the row is of no problem."""

    @abstractmethod
    def typed_problem(self, text: str) -> P:
        """A problem as a person types it. ValueError: it is none, with advice."""

    @abstractmethod
    def prompt(self, problem: P) -> str:
        """What a model is asked."""

    def score(self, text: str, problem: P, thinking: bool = True) -> Score:
        """The verdict on a completion, which is hostile input: bounded time, and no exception.

        Here 1.0 if its answer block says the problem's `value`, 0.1 if it says anything else, 0.0 without such a block.

        Args:
            thinking: the prompt ended inside an open `<think>`.
        """
        parts = split_answer(text, thinking)
        if parts is None:
            return MALFORMED
        return CORRECT if self.read(parts[1]) == problem.value else WRONG

    def answer(self, text: str, thinking: bool) -> Hashable | None:
        """What a completion claims; equal for the same claim however written, None for none. Votes are counted by it."""
        parts = split_answer(text, thinking)
        return parts and self.read(parts[1])

    def read(self, content: str) -> Hashable | None:
        """What an answer block says, in bounded time; None for nothing. For `score` and `answer`, unless a task has its own."""
        raise NotImplementedError

    @abstractmethod
    def level(self, problem: P) -> str:
        """How hard a problem is, in a few words: evaluations give accuracy by it."""

    @abstractmethod
    def solution(self, problem: P) -> str | None:
        """A correct answer, or None where none is known."""


def split_answer(text: str, thinking: bool) -> tuple[str, str] | None:
    """(text between the thinking and the answer block, content of the block), or None where that is not well formed.

    Inside the thinking a lone `<answer>` or `</answer>` is talk about the format; a pair of them is a block. Outside it
    every answer tag counts.

    Args:
        thinking: the prompt ended inside an open `<think>`, so the completion must close it, once, before it answers.
            False: the prompt opened none. A completion may then begin with a `<think>` of its own, and is judged from
            there on as if the prompt had opened it; a think tag anywhere else before the block is malformed.
    """
    if not thinking and text.lstrip(BLANKS).startswith("<think>"):
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


def steps_level(steps: int) -> str:
    """How hard a problem of so many steps is, for tasks whose difficulty is in steps."""
    return "1 to 2 steps" if steps <= 2 else "3 to 4 steps" if steps <= 4 else "5 steps or more"

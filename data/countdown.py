"""Countdown: make a target from a few numbers, each used exactly once. Easy to check, hard to find."""

import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from data.expression import (
    BLANKS,
    DIGITS,
    NUMBER,
    Expression,
    ExpressionError,
    parse_equation,
    parse_expression,
)
from data.load import Format
from data.solver import find_expression, random_attempt, random_solution, reachable
from data.task import CORRECT, INSIDE, WRONG, AnyProblem, Score, Task

MAX_NUMBER = 999_999_999  # nine digits, as in an expression
NEAR_DISTANCE = 10  # largest distance from the target that earns part of the reward
MAX_MISSES = 2_000  # draws in a row without a new problem before the generator gives up
WRONG_ATTEMPTS = 3  # in a worked solution, at most
EQUATION_CHARACTERS = DIGITS + "+-*/()=" + BLANKS


@dataclass(frozen=True)
class Problem(AnyProblem):
    """2 to 6 numbers and the target to make of them, all whole and from 1 to 999,999,999; else ValueError."""

    numbers: tuple[int, ...]
    target: int

    def __post_init__(self):
        if not isinstance(self.numbers, (tuple, list)) or not 2 <= len(self.numbers) <= 6:
            raise ValueError(f"numbers must be a list of 2 to 6 whole numbers, not {self.numbers!r:.80}")
        object.__setattr__(self, "numbers", tuple(self.numbers))
        for value in (*self.numbers, self.target):
            if type(value) is not int or not 1 <= value <= MAX_NUMBER:
                raise ValueError(f"numbers and target are whole and from 1 to {MAX_NUMBER}, not {value!r}")

    @property
    def key(self) -> tuple[int, tuple[int, ...]]:
        """Equal for problems that differ only in the order of their numbers."""
        return self.target, tuple(sorted(self.numbers))

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.numbers))} -> {self.target}"


def solve(problem: Problem, operators: str = "+-*/") -> str | None:
    """An expression that solves the problem, or None; see `find_expression`."""
    return find_expression(problem.numbers, problem.target, operators)


@dataclass(frozen=True)
class Countdown(Task):
    """Make a target from a few numbers. The ranges are for generated problems, not for files or the hub."""

    min_number: int = 1  # Smallest number of a problem
    max_number: int = 99  # Largest number of a problem; smaller is easier
    min_target: int = 10  # Smallest target
    max_target: int = 100  # Largest target
    four_number_share: float = 0.5  # Share of problems with 4 numbers, from 0 to 1; the others have 3
    kind: Literal["countdown"] = "countdown"

    file_format = Format(
        '{"numbers": [79, 60, 17], "target": 36}',
        "Jiayi-Pan/Countdown-Tasks-3to4",  # 490,364 problems
        {"hub": "data/train-00000-of-00001.parquet"},
    )
    input_format = "numbers and then the target, as in 7 9 11 22"

    def __post_init__(self):
        for name in ("number", "target"):
            low = getattr(self, f"min_{name}")
            high = getattr(self, f"max_{name}")
            if not 1 <= low <= high <= MAX_NUMBER:
                limits = f"from 1 to {MAX_NUMBER}, in order"
                raise ValueError(f"min_{name} {low} and max_{name} {high} must be {limits}")
        if not 0 <= self.four_number_share <= 1:
            raise ValueError(f"four_number_share must be from 0 to 1, not {self.four_number_share}")

    def generate(self, count: int, seed: int) -> list[Problem]:
        """Draw the numbers uniformly, then the target uniformly from those that they make in whole steps."""
        rng = random.Random(seed)
        numbers = range(self.min_number, self.max_number + 1)
        targets = range(self.min_target, self.max_target + 1)
        with_three = count - round(count * self.four_number_share)
        problems: dict[tuple, Problem] = {}  # by their keys
        misses = 0
        while len(problems) < count:
            size = 3 if len(problems) < with_three else 4
            drawn = tuple(rng.choice(numbers) for _ in range(size))
            ordered = tuple(sorted(drawn))
            new = [target for target in reachable(ordered, targets) if (target, ordered) not in problems]
            if new:
                problem = Problem(drawn, rng.choice(new))
                problems[problem.key] = problem
                misses = 0
                continue
            misses += 1
            if misses == MAX_MISSES:
                only = (
                    f"found only {len(problems)} of {count} different problems, no more with {size} numbers"
                )
                raise ValueError(f"{only}; ask for fewer, or widen the range of numbers or targets")
        found = list(problems.values())
        rng.shuffle(found)
        return found

    def problem_from_row(self, row: dict) -> Problem:
        numbers = row["nums"] if "nums" in row else row["numbers"]  # nums: on the hub
        return Problem(numbers, row["target"])

    def parse_input(self, text: str) -> Problem:
        words = text.replace(",", " ").replace("->", " ").split()
        if not words or not all(map(NUMBER.fullmatch, words)):
            raise ValueError(f"type whole {self.input_format}")
        *numbers, target = map(int, words)
        return Problem(numbers, target)

    def prompt(self, problem: Problem, thinking: bool = True) -> str:
        numbers = ", ".join(map(str, problem.numbers))
        return (
            f"Use each of the numbers {numbers} exactly once to make {problem.target}. "
            f"Only + - * / and parentheses are allowed. Work it out{INSIDE * thinking}, "
            "then put the final expression inside <answer> </answer>."
        )

    def judge(self, before: str, answer: str, problem: Problem) -> Score:
        """Score the content of the one answer block after the thinking.

        correct, 1.0: it uses each number once and hits the target
        near, max(0.3, 0.8 - 0.05 d): the same, but it misses the target by a distance 0 < d <= 10
        wrong, 0.1: anything else
        """
        expression = answer_expression(before, answer)
        if expression is None or sorted(expression.numbers) != sorted(problem.numbers):
            return WRONG
        distance = abs(expression.value - problem.target)
        if distance == 0:
            return CORRECT
        if distance <= NEAR_DISTANCE:
            return Score(float(max(Fraction(3, 10), Fraction(4, 5) - distance / 20)), "near")
        return WRONG

    def difficulty(self, problem: Problem) -> str:
        """The count of numbers, and whether + and - suffice: a model may never multiply."""
        need = "+ and - suffice" if solve(problem, operators="+-") else "needs * or /"
        return f"{len(problem.numbers)} numbers, {need}"

    def solution(self, problem: Problem) -> str | None:
        return solve(problem)

    def work_out(self, problem: Problem, rng: random.Random) -> tuple[str, str] | None:
        """Up to three random attempts that miss the target, each compared with it, then one that hits it.

        For 7, 9, 11 -> 22:

            9+7=16 11+16=27 too high
            9-7=2 2*11=22 equal
        """
        found = random_solution(problem.numbers, problem.target, rng)
        if found is None:
            return None
        lines = []
        for _ in range(rng.randint(0, WRONG_ATTEMPTS)):
            attempt = random_attempt(problem.numbers, rng)
            if attempt.value < problem.target:
                lines.append(f"{attempt.steps} too low")
            if attempt.value > problem.target:
                lines.append(f"{attempt.steps} too high")
        lines.append(f"{found.steps} equal")
        return "\n".join(dict.fromkeys(lines)), found.expression


def answer_expression(before: str, content: str) -> Expression | None:
    """The expression that an answer block claims, or None.

    It may end in `= value` if the value is right. A bare number counts only right after an equation with this
    value, as in `(79 - 60) + 17 = 36 <answer>36</answer>`; copying the target is not enough.
    """
    try:
        if "=" in content:
            return parse_equation(content)
        answer = parse_expression(content)
        if len(answer.numbers) > 1:
            return answer
        equation = parse_equation(_equation_before(before))
    except ExpressionError:
        return None
    return equation if equation.value == answer.value else None


def _equation_before(text: str) -> str:
    """The equation that ends the last line; "" if it may be part of something else, as in `2^7 - 6 = 1`."""
    line = text.rstrip(BLANKS).rpartition("\n")[2]
    words = line.rstrip(EQUATION_CHARACTERS)
    equation = line[len(words) :]
    after_word = len(words) > 1 and words[-2:].isalpha()  # a single letter may be a variable, or mean "times"
    apart = equation.startswith(" ") and (after_word or words.endswith((".", ",", ":", ";")))
    return equation if not words or apart else ""

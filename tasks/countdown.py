"""Countdown as a task, and the verdict on a completion.

What a verdict pays for is what the model becomes, so it reads strictly and never guesses.

Every shortcut closed here was taken by some policy somewhere: an answer slipped into the thinking before the real one,
a second answer in case the first is wrong, the target copied from the prompt, `2 ** 5` where only `+ - * /` are
allowed. The reading is plain string search and a bounded parser, linear in the completion's length, and raises on no
text at all.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from data import Problem, ProblemSettings, generate_problems, prompt_text, solve
from data.expression import BLANKS, DIGITS, Expression, ExpressionError, parse_equation, parse_expression
from data.sources import COUNTDOWN, Format
from tasks.paper import PAPER_256, PAPER_512
from tasks.task import CORRECT, MALFORMED, WRONG, Score, Task, split_answer

NEAR_DISTANCE = 10  # how far from the target still earns part of the reward
EQUATION_CHARACTERS = DIGITS + "+-*/()=" + BLANKS


@dataclass(frozen=True)
class Countdown(ProblemSettings, Task[Problem]):
    """Reach a target with each of a few numbers exactly once."""

    kind: Literal["countdown"] = "countdown"
    stored: ClassVar[Format] = COUNTDOWN
    published: ClassVar[dict] = {256: PAPER_256, 512: PAPER_512}
    typed: ClassVar[str] = "numbers and then the target, as in 7 9 11 22"

    def generate(self, count: int, seed: int) -> list[Problem]:
        return generate_problems(count, seed, self)

    def problem(self, row: dict) -> Problem:
        return Problem(row["numbers"], row["target"])

    def typed_problem(self, text: str) -> Problem:
        words = text.replace(",", " ").replace("->", " ").split()
        if not words or not all(word.isascii() and word.isdigit() and len(word) < 10 for word in words):
            raise ValueError(f"type whole {self.typed}")
        *numbers, target = map(int, words)
        return Problem(numbers, target)

    def prompt(self, problem: Problem) -> str:
        return prompt_text(problem)

    def score(self, text: str, problem: Problem, thinking: bool = True) -> Score:
        return score(text, problem, thinking)

    def answer(self, text: str, thinking: bool) -> Hashable | None:
        """The value and the numbers it is made of, so that an expression written in another order is the same answer."""
        parts = split_answer(text, thinking)
        found = parts and _answer_expression(*parts)
        return found and (found.value, tuple(sorted(found.numbers)))

    def level(self, problem: Problem) -> str:
        """ "3 numbers, needs * or /" and the like. A model may do well on the whole and never multiply; the whole hides it."""
        need = "+ and - suffice" if solve(problem, operators="+-") else "needs * or /"
        return f"{len(problem.numbers)} numbers, {need}"

    def solution(self, problem: Problem) -> str | None:
        return solve(problem)


def score(completion_text: str, problem: Problem, thinking: bool = True) -> Score:
    """Judge a completion: the text after the prompt, as decoded.

    correct, 1.0: one `<answer>` block after the thinking; its expression uses every number once and hits the target.
    near, max(0.3, 0.8 - 0.05 d): the same, but off the target by a distance 0 < d <= 10.
    wrong, 0.1: one `<answer>` block after the thinking with anything else in it.
    malformed, 0.0: no such block, two of them, or a block inside the thinking.

    The expression may go on with `= value`, where the value is right. A bare number as the answer counts only if it is
    the value of an equation right before the block, which then is judged in its place. Text after the block is free.

    Args:
        thinking: the prompt ended inside an open `<think>`, see `split_answer`.
    """
    parts = split_answer(completion_text, thinking)
    if parts is None:
        return MALFORMED
    expression = _answer_expression(*parts)
    if expression is None or sorted(expression.numbers) != sorted(problem.numbers):
        return WRONG
    distance = abs(expression.value - problem.target)
    if distance == 0:
        return CORRECT
    if distance <= NEAR_DISTANCE:
        return Score(float(max(Fraction(3, 10), Fraction(4, 5) - distance / 20)), "near")
    return WRONG


def _answer_expression(before: str, content: str) -> Expression | None:
    """What the answer claims, or None where it is no arithmetic or a number without the equation that earned it."""
    try:
        if "=" in content:
            return parse_equation(content)
        answer = parse_expression(content)
        if not answer.is_number:
            return answer
        equation = parse_equation(_equation_before(before))
    except ExpressionError:
        return None
    return equation if equation.value == answer.value else None


def _equation_before(text: str) -> str:
    """The arithmetic that ends the last line of `text`, or "" where it is not clear where that begins.

    It must open the line, or follow a word or punctuation mark and a space: in `2.79 - 60 = 19` or `2^79 - 60 = 19` the
    part that looks like an equation belongs to something this parser cannot read.
    """
    line = text.rstrip(BLANKS).rpartition("\n")[2]
    words = line.rstrip(EQUATION_CHARACTERS)
    equation = line[len(words) :]
    after_word = len(words) > 1 and words[-2:].isalpha()  # one letter alone may be a variable, or mean "times"
    apart = equation.startswith(" ") and (after_word or words.endswith((".", ",", ":", ";")))
    return equation if not words or apart else ""

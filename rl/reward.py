"""The verdict on a completion. What this pays for is what the model becomes, so it reads strictly and never guesses.

Every shortcut closed here was taken by some policy somewhere: an answer slipped into the thinking before the real one,
a second answer in case the first is wrong, the target copied from the prompt, `2 ** 5` where only `+ - * /` are
allowed. The reading is plain string search and a bounded parser, linear in the completion's length, and raises on no
text at all.
"""

from dataclasses import dataclass, replace
from fractions import Fraction

from data import Expression, ExpressionError, Problem, parse_equation, parse_expression
from data.expression import BLANKS, DIGITS
from data.traces import latin_only
from rl.recipe import RewardSettings

NEAR_DISTANCE = 10  # how far from the target still earns part of the reward
EQUATION_CHARACTERS = DIGITS + "+-*/()=" + BLANKS


@dataclass(frozen=True)
class Score:
    """A reward from 0 to 1, and what it was for: "correct", "near", "wrong" or "malformed"."""

    reward: float
    outcome: str


WRONG = Score(0.1, "wrong")
MALFORMED = Score(0.0, "malformed")


def score(completion_text: str, problem: Problem, thinking: bool = True) -> Score:
    """Judge a completion: the text after the prompt, as decoded.

    correct, 1.0: one `<answer>` block after the thinking; its expression uses every number once and hits the target.
    near, max(0.3, 0.8 - 0.05 d): the same, but off the target by a distance 0 < d <= 10.
    wrong, 0.1: one `<answer>` block after the thinking with anything else in it.
    malformed, 0.0: no such block, two of them, or a block inside the thinking.

    The expression may go on with `= value`, where the value is right. A bare number as the answer counts only if it is
    the value of an equation right before the block, which then is judged in its place. Text after the block is free.

    Args:
        thinking: the prompt ended inside an open `<think>`, so the completion must close it, once, before it answers.
            False: the prompt opened none. A completion may then begin with a `<think>` of its own, and is judged from
            there on as if the prompt had opened it; a think tag anywhere else before the block is malformed.
    """
    parts = _split_answer(completion_text, thinking)
    if parts is None:
        return MALFORMED
    expression = _answer_expression(*parts)
    if expression is None or sorted(expression.numbers) != sorted(problem.numbers):
        return WRONG
    distance = abs(expression.value - problem.target)
    if distance == 0:
        return Score(1.0, "correct")
    if distance <= NEAR_DISTANCE:
        return Score(float(max(Fraction(3, 10), Fraction(4, 5) - distance / 20)), "near")
    return WRONG


def claim(text: str, thinking: bool) -> Expression | None:
    """The arithmetic that a completion gives as its answer, as `score` reads it; None where there is none to read."""
    parts = _split_answer(text, thinking)
    return parts and _answer_expression(*parts)


def pay(score: Score, text: str, settings: RewardSettings) -> Score:
    """The same outcome with the reward that a recipe pays for it."""
    if settings.latin_only and not latin_only(text):
        return replace(score, reward=MALFORMED.reward)
    if score.outcome == "near" and not settings.near_miss:
        return replace(score, reward=WRONG.reward)
    return score


def _split_answer(text: str, thinking: bool) -> tuple[str, str] | None:
    """(text between the thinking and the answer block, content of the block), or None where that is not well formed.

    Inside the thinking a lone `<answer>` or `</answer>` is talk about the format; a pair of them is a block. Outside it
    every answer tag counts.
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

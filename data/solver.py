"""An exact Countdown solver: the proof that a problem can be solved, and with which operators."""

from fractions import Fraction
from operator import add, mul, sub, truediv

from data.countdown import Problem

OPERATORS = {"+": add, "-": sub, "*": mul, "/": truediv}


def solve(problem: Problem, operators: str = "+-*/") -> str | None:
    """An expression that uses every number once and equals the target, or None if there is none.

    Steps may be fractions: `8 / (3 - 8 / 3)` is found. `operators` names the ones allowed, so `solve(problem, "+-")`
    tells the problems that need no multiplication. The search tries everything, which takes some 10 ms for four
    numbers, a fraction of a second for five and 10 seconds for an impossible six.

    Raises:
        ValueError: `operators` names none of `+ - * /`, or anything else.
    """
    if not operators or not set(operators) <= set(OPERATORS):
        raise ValueError(f"operators must be some of + - * /, not {operators!r}")
    full = (1 << len(problem.numbers)) - 1
    texts: dict[int, dict[Fraction, str]] = {  # subset of the numbers, as a bit mask -> value -> how to reach it
        1 << place: {Fraction(number): str(number)} for place, number in enumerate(problem.numbers)
    }
    for mask in range(1, full):
        if mask not in texts:
            texts[mask] = {}
            for left, right in _splits(mask):
                _combine(texts[left], texts[right], operators, texts[mask])
    solution: dict[Fraction, str] = {}
    for left, right in _splits(full):
        _combine(texts[left], texts[right], operators, solution)
        if problem.target in solution:
            return solution[Fraction(problem.target)]
    return None


def _splits(mask: int):
    """Every way to part a subset in two, in both orders: pairs of bit masks."""
    part = mask
    while part := (part - 1) & mask:
        yield part, mask ^ part


def _combine(left: dict, right: dict, operators: str, into: dict[Fraction, str]) -> None:
    """Add to `into` every value of one operator between a value of `left` and one of `right`; the first text stays."""
    for a, a_text in left.items():
        for b, b_text in right.items():
            for operator in operators:
                if operator == "/" and not b:
                    continue
                value = OPERATORS[operator](a, b)
                if value not in into:
                    into[value] = f"{_bracket(a_text)} {operator} {_bracket(b_text)}"


def _bracket(text: str) -> str:
    return text if text.isdigit() else f"({text})"

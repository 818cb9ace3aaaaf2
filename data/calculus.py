"""Calculus: differentiate a polynomial, once or more often. Each step is easy; one wrong step is fatal."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data.load import Format
from data.task import CORRECT, INSIDE, WRONG, AnyProblem, Score, Task, steps_difficulty

MAX_CHARACTERS = 256  # of an answer
MAX_DIGITS = 15  # of a coefficient in an answer
MAX_EXPONENT = 99  # in an answer
MAX_PROBLEM_EXPONENT = 30
MAX_COEFFICIENT = 999_999
MAX_ORDER = 5  # 999,999 x^30 differentiated five times has a coefficient of 14 digits
MAX_MISSES = 2_000  # draws in a row without a new problem before the generator gives up

Polynomial = tuple[int, ...]  # coefficients from the constant up, the last one not zero

BLANK = r"[ \t\r\n]*"
TERM = re.compile(
    rf"{BLANK}(?P<sign>[+-]?){BLANK}(?=[0-9x])"  # the rest is optional, but not empty
    rf"(?P<coefficient>0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})?"
    rf"(?P<variable>{BLANK}(?:\*{BLANK})?x(?:{BLANK}\^{BLANK}(?P<exponent>0|[1-9][0-9]?))?)?{BLANK}"
)


def parse_polynomial(text: str) -> Polynomial:
    """Parse a sum of terms: `5 - 2x + 3x^2 - x` is `(5, -3, 3)`. ValueError if it is anything else."""
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"a polynomial of {len(text)} characters; at most {MAX_CHARACTERS} are read")
    coefficients = [0] * (MAX_EXPONENT + 1)
    position = 0
    while position == 0 or position < len(text):
        term = TERM.match(text, position)
        if term is None or (position > 0 and not term["sign"]):
            raise ValueError(f"no term such as 3x^2 at {text[position : position + 20]!r}")
        exponent = int(term["exponent"] or 1) if term["variable"] else 0
        coefficient = int(term["coefficient"] or 1)
        coefficients[exponent] += -coefficient if term["sign"] == "-" else coefficient
        position = term.end()
    return trimmed(coefficients)


def trimmed(coefficients: Sequence[int]) -> Polynomial:
    """The coefficients without the zeros at the end."""
    length = len(coefficients)
    while length and coefficients[length - 1] == 0:
        length -= 1
    return tuple(coefficients[:length])


def differentiate(polynomial: Polynomial) -> Polynomial:
    """c x^e becomes c e x^(e - 1)."""
    return tuple(exponent * coefficient for exponent, coefficient in enumerate(polynomial))[1:]


def terms_of(polynomial: Polynomial) -> list[tuple[int, int]]:
    """(coefficient, exponent) of each term that is not zero, the highest exponent first."""
    return [(coefficient, exponent) for exponent, coefficient in enumerate(polynomial) if coefficient][::-1]


def term_text(coefficient: int, exponent: int) -> str:
    """`-6x^2`, `x` or `7`; `0` for a zero coefficient."""
    if exponent == 0 or coefficient == 0:
        return str(coefficient)
    factor = {1: "", -1: "-"}.get(coefficient, str(coefficient))
    return f"{factor}x^{exponent}" if exponent > 1 else f"{factor}x"


def sum_text(terms: list[tuple[int, int]]) -> str:
    """(coefficient, exponent) pairs in their order, such as `3x^4 - 2x^3 + 7`; zeros are left out."""
    texts = (term_text(coefficient, exponent) for coefficient, exponent in terms if coefficient)
    return " + ".join(texts).replace("+ -", "- ") or "0"


@dataclass(frozen=True)
class Derivative(AnyProblem):
    """A polynomial in x, not zero, and how often to differentiate it; ValueError outside the limits above."""

    polynomial: Polynomial
    order: int = 1

    def __post_init__(self):
        if not isinstance(self.polynomial, (tuple, list)) or len(self.polynomial) > MAX_PROBLEM_EXPONENT + 1:
            raise ValueError(f"polynomial must be a list of at most 31 numbers, not {self.polynomial!r:.80}")
        for value in self.polynomial:
            if type(value) is not int or abs(value) > MAX_COEFFICIENT:
                raise ValueError(f"a coefficient is a whole number, at most {MAX_COEFFICIENT}, not {value!r}")
        if type(self.order) is not int or not 1 <= self.order <= MAX_ORDER:
            raise ValueError(f"order must be a whole number from 1 to {MAX_ORDER}, not {self.order!r}")
        object.__setattr__(self, "polynomial", trimmed(self.polynomial))  # equal problems are equal objects
        if not self.polynomial:
            raise ValueError("a polynomial has at least one term that is not zero")

    def __str__(self) -> str:
        operator = "d/dx" if self.order == 1 else f"d^{self.order}/dx^{self.order}"
        return f"{operator} ({sum_text(terms_of(self.polynomial))})"

    @property
    def key(self) -> tuple[int, Polynomial]:
        return self.order, self.polynomial

    @property
    def value(self) -> Polynomial:
        derivative = self.polynomial
        for _ in range(self.order):
            derivative = differentiate(derivative)
        return derivative


@dataclass(frozen=True)
class Calculus(Task):
    """Derivatives of polynomials, and which of them the generator draws."""

    kind: Literal["calculus"] = "calculus"
    min_terms: int = 2  # Fewest terms of a polynomial
    max_terms: int = 6  # Most terms of a polynomial; each is a step at each order
    max_exponent: int = 9  # Largest exponent, at most 30
    max_coefficient: int = 99  # Largest coefficient, of either sign, at most 999,999
    max_order: int = 3  # How often to differentiate at most, from 1 to 5

    file_format = Format('{"polynomial": [7, 5, 0, -2, 3], "order": 1}')
    input_format = "a polynomial such as 3x^4 - 2x + 5, or 3x^4 - 2x + 5; 2 for its second derivative"

    def __post_init__(self):
        limits = {
            "max_exponent": MAX_PROBLEM_EXPONENT,
            "max_coefficient": MAX_COEFFICIENT,
            "max_order": min(MAX_ORDER, self.max_exponent),  # or every derivative is zero
            "max_terms": self.max_exponent + 1,
            "min_terms": self.max_terms,
        }
        for name, limit in limits.items():
            if not 1 <= getattr(self, name) <= limit:
                raise ValueError(f"{name} must be from 1 to {limit} here, not {getattr(self, name)}")

    def generate(self, count: int, seed: int) -> list[Derivative]:
        rng = random.Random(seed)
        problems: dict[Derivative, None] = {}
        misses = 0
        while len(problems) < count:
            before = len(problems)
            problems[self.draw(rng)] = None
            misses = 0 if len(problems) > before else misses + 1
            if misses == MAX_MISSES:
                raise ValueError(f"found only {before} of {count} different problems; ask for fewer: {self}")
        return list(problems)

    def draw(self, rng: random.Random) -> Derivative:
        """Draw order, terms, exponents and coefficients uniformly, until the derivative is not 0."""
        order = rng.randint(1, self.max_order)
        count = rng.randint(self.min_terms, self.max_terms)
        polynomial: list[int] = []
        while not any(polynomial[order:]):
            polynomial = [0] * (self.max_exponent + 1)
            for exponent in rng.sample(range(self.max_exponent + 1), count):
                polynomial[exponent] = rng.choice((1, -1)) * rng.randint(1, self.max_coefficient)
        return Derivative(tuple(polynomial), order)

    def problem_from_row(self, row: dict) -> Derivative:
        return Derivative(row["polynomial"], row.get("order", 1))

    def parse_input(self, text: str) -> Derivative:
        polynomial, _, order = text.partition(";")
        try:
            return Derivative(parse_polynomial(polynomial), int(order.strip() or 1))
        except ValueError as error:
            raise ValueError(f"{error}; type {self.input_format}") from None

    def prompt(self, problem: Derivative, thinking: bool = True) -> str:
        times = {1: "once", 2: "twice"}.get(problem.order, f"{problem.order} times")
        return (
            f"Differentiate {sum_text(terms_of(problem.polynomial))} with respect to x, {times}. "
            f"Work it out term by term{INSIDE * thinking}, "
            "then put the derivative, a sum of terms without parentheses, inside <answer> </answer>."
        )

    def judge(self, before: str, answer: str, problem: Derivative) -> Score:
        try:
            polynomial = parse_polynomial(answer)
        except ValueError:
            return WRONG
        return CORRECT if polynomial == problem.value else WRONG

    def difficulty(self, problem: Derivative) -> str:
        """By the number of single terms to differentiate, over all orders; x^e is gone after e + 1 times."""
        exponents = [exponent for _, exponent in terms_of(problem.polynomial)]
        return steps_difficulty(sum(min(exponent + 1, problem.order) for exponent in exponents))

    def work_out(self, problem: Derivative, rng: random.Random) -> tuple[str, str]:
        """A line for each term, such as `3x^4 -> 12x^3`, and a block of them for each order."""
        polynomial = problem.polynomial
        blocks = []
        for _ in range(problem.order):
            lines = []
            for coefficient, exponent in terms_of(polynomial):
                derived = term_text(coefficient * exponent, exponent - 1)
                lines.append(f"{term_text(coefficient, exponent)} -> {derived}")
            blocks.append("\n".join(lines))
            polynomial = differentiate(polynomial)
        return "\n\n".join(blocks), sum_text(terms_of(polynomial))

    def solution(self, problem: Derivative) -> str:
        return sum_text(terms_of(problem.value))

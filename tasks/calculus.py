"""Calculus: differentiate a polynomial, once or more, checked exactly by coefficients. Difficulty is in steps.

The rules are few, each step is easy, and one wrong step anywhere makes the answer wrong: the opposite of Countdown, where
finding takes search. The answer may be written in any way that `data.polynomial` reads; there is no partial credit.
"""

import random
from dataclasses import dataclass
from typing import ClassVar, Literal

from data.polynomial import Polynomial, PolynomialError, differentiate, parse_polynomial, sum_text, terms_of, trimmed
from data.sources import Format
from tasks.task import Task, steps_level

MAX_EXPONENT = 30
MAX_COEFFICIENT = 999_999
MAX_ORDER = 5  # 999,999 times 30 five times over has 14 digits, which an answer may have
MAX_MISSES = 2_000  # draws in a row without a new problem before the generator gives up


@dataclass(frozen=True)
class Derivative:
    """A polynomial in x, its coefficients from the constant up, and how often it is to be differentiated.

    Zeros after the last coefficient are dropped, so that the same problem is always the same object.

    Raises:
        ValueError: no term but zeros, an exponent above 30, a coefficient that is no whole number from -999,999 to
            999,999, or an order that is none from 1 to 5.
    """

    polynomial: Polynomial
    order: int = 1

    def __post_init__(self):
        if not isinstance(self.polynomial, (tuple, list)):
            raise ValueError(f"polynomial must be a list of whole numbers, the constant first, not {self.polynomial!r}")
        if len(self.polynomial) > MAX_EXPONENT + 1:
            raise ValueError(f"exponents go up to {MAX_EXPONENT}, not {len(self.polynomial) - 1}")
        for value in self.polynomial:
            if type(value) is not int or abs(value) > MAX_COEFFICIENT:
                raise ValueError(f"a coefficient must be a whole number, {MAX_COEFFICIENT} at most, not {value!r}")
        if type(self.order) is not int or not 1 <= self.order <= MAX_ORDER:
            raise ValueError(f"order must be a whole number from 1 to {MAX_ORDER}, not {self.order!r}")
        object.__setattr__(self, "polynomial", trimmed(self.polynomial))
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
        polynomial = self.polynomial
        for _ in range(self.order):
            polynomial = differentiate(polynomial)
        return polynomial

    @property
    def steps(self) -> int:
        """How many single terms have to be differentiated: those that are left, at each order."""
        polynomial, steps = self.polynomial, 0
        for _ in range(self.order):
            steps += len(terms_of(polynomial))
            polynomial = differentiate(polynomial)
        return steps

    def row(self) -> dict:
        return {"polynomial": list(self.polynomial), "order": self.order}


@dataclass(frozen=True)
class Calculus(Task[Derivative]):
    """Derivatives of polynomials, and which of them the generator draws."""

    kind: Literal["calculus"] = "calculus"
    min_terms: int = 2
    """Fewest terms of a polynomial."""
    max_terms: int = 6
    """Most terms of a polynomial; each is a step at each order."""
    max_exponent: int = 9
    """Largest exponent, at most 30."""
    max_coefficient: int = 99
    """Largest coefficient, of either sign, at most 999,999."""
    max_order: int = 3
    """How often to differentiate at most, from 1 to 5."""

    stored: ClassVar[Format] = Format(
        '{"polynomial": [7, 5, 0, -2, 3], "order": 1}', {"polynomial": "polynomial"}, optional={"order": "order"}
    )
    typed: ClassVar[str] = "a polynomial such as 3x^4 - 2x + 5, or 3x^4 - 2x + 5; 2 for its second derivative"

    def __post_init__(self):
        for name in ("min_terms", "max_terms", "max_exponent", "max_coefficient", "max_order"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number from 1 up, not {getattr(self, name)!r}")
        limits = (
            ("max_exponent", MAX_EXPONENT),
            ("max_coefficient", MAX_COEFFICIENT),
            ("max_order", MAX_ORDER),
            ("max_order", self.max_exponent),  # or every derivative is zero
            ("max_terms", self.max_exponent + 1),
            ("min_terms", self.max_terms),
        )
        for name, limit in limits:
            if getattr(self, name) > limit:
                raise ValueError(f"{name} must be at most {limit} here, not {getattr(self, name)}; lower it")

    def generate(self, count: int, seed: int) -> list[Derivative]:
        """`count` different problems whose derivative is not zero; the same arguments give the same list.

        Raises:
            ValueError: a negative count, or settings that do not hold so many different problems.
        """
        if count < 0:
            raise ValueError(f"count must be 0 or more, not {count}")
        rng = random.Random(seed)
        problems: dict[Derivative, None] = {}
        misses = 0
        while len(problems) < count:
            before = len(problems)
            problems[self.draw(rng)] = None
            misses = 0 if len(problems) > before else misses + 1
            if misses == MAX_MISSES:
                raise ValueError(
                    f"found only {before} of {count} different problems; ask for fewer or widen the ranges: {self}"
                )
        return list(problems)

    def draw(self, rng: random.Random) -> Derivative:
        """Order, number of terms, exponents and coefficients, each drawn evenly; again where nothing would be left."""
        order, count = rng.randint(1, self.max_order), rng.randint(self.min_terms, self.max_terms)
        polynomial = [0] * (self.max_exponent + 1)
        while not any(polynomial[order:]):
            polynomial = [0] * (self.max_exponent + 1)
            for exponent in rng.sample(range(self.max_exponent + 1), count):
                polynomial[exponent] = rng.choice((1, -1)) * rng.randint(1, self.max_coefficient)
        return Derivative(tuple(polynomial), order)

    def problem(self, row: dict) -> Derivative:
        return Derivative(row["polynomial"], row.get("order", 1))

    def typed_problem(self, text: str) -> Derivative:
        polynomial, _, order = text.partition(";")
        order = order.strip()
        try:
            if order and not (order.isascii() and order.isdigit() and len(order) == 1):
                raise ValueError(f"how often to differentiate is a number from 1 to {MAX_ORDER}, not {order!r}")
            return Derivative(parse_polynomial(polynomial), int(order or 1))
        except ValueError as error:
            raise ValueError(f"{error}; type {self.typed}") from None

    def prompt(self, problem: Derivative) -> str:
        times = {1: "once", 2: "twice"}.get(problem.order, f"{problem.order} times")
        return (
            f"Differentiate {sum_text(terms_of(problem.polynomial))} with respect to x, {times}. "
            "Work it out term by term inside <think> </think>, "
            "then put the derivative, a sum of terms without parentheses, inside <answer> </answer>."
        )

    def read(self, content: str) -> Polynomial | None:
        """A polynomial, in whatever order its terms are written."""
        try:
            return parse_polynomial(content)
        except PolynomialError:
            return None

    def level(self, problem: Derivative) -> str:
        return steps_level(problem.steps)

    def solution(self, problem: Derivative) -> str:
        return sum_text(terms_of(problem.value))

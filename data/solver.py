"""The search behind Countdown: an exact solver, and problems with a solution. Subsets are bit masks."""

import functools
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from operator import add, mul, sub, truediv

OPERATORS = {"+": add, "-": sub, "*": mul, "/": truediv}
LARGEST_STEP = 1_000  # result of a step in a worked solution, at most, if its numbers are not larger

Numbers = tuple[int, ...]


def find_expression(numbers: Numbers, target: int, operators: str = "+-*/") -> str | None:
    """An expression that uses every number once and equals the target, or None if there is none.

    Intermediate values may be fractions, so `8 / (3 - 8 / 3)` is found. The search is exhaustive: some 10 ms
    for four numbers, 10 seconds for six without a solution.
    """
    everything = (1 << len(numbers)) - 1
    # subset -> value -> the first expression that makes it
    made = {1 << i: {Fraction(number): str(number)} for i, number in enumerate(numbers)}
    for subset in range(1, everything + 1):
        values = made.setdefault(subset, {})
        for left, right in _splits(subset):
            for (a, a_text), (b, b_text) in itertools.product(made[left].items(), made[right].items()):
                for operator in operators:
                    if operator == "/" and b == 0:
                        continue
                    value = OPERATORS[operator](a, b)
                    if value not in values:
                        values[value] = f"({a_text} {operator} {b_text})"
            if subset == everything and target in values:
                return values[target][1:-1]
    return None


def _splits(subset: int) -> Iterator[tuple[int, int]]:
    """Every way to split a subset in two, in both orders; none for a single number."""
    part = subset
    while part := (part - 1) & subset:
        yield part, subset ^ part


@functools.lru_cache(maxsize=4096)
def reachable(numbers: Numbers, targets: range) -> list[int]:
    """Those of `targets` that all numbers make with whole intermediate values, ascending."""
    everything = (1 << len(numbers)) - 1
    made = {1 << i: {number} for i, number in enumerate(numbers)}
    for subset in range(1, everything + 1):
        values = made.setdefault(subset, set())
        for left, right in _splits(subset):
            if left < right:  # all four results are the same for the other order
                continue
            for a, b in itertools.product(made[left], made[right]):
                large = max(a, b)
                small = min(a, b)
                values.update((a + b, large - small, a * b))  # a negative difference reaches nothing more
                if small and large % small == 0:
                    values.add(large // small)
    return sorted(value for value in made[everything] if value in targets)


@dataclass(frozen=True)
class Attempt:
    """One way to use all numbers in whole steps."""

    steps: str  # "9-7=2 2*11=22"
    value: int  # of the last step
    expression: str  # "(9-7)*11"


Term = tuple[int, str]  # a value, and the expression that makes it


def step_results(large: int, small: int, largest: float) -> dict[str, int]:
    """Operator -> result, where that is a whole number from 1 to `largest`."""
    results = {"+": large + small, "-": large - small, "*": large * small}
    if large % small == 0:
        results["/"] = large // small
    return {operator: value for operator, value in results.items() if 1 <= value <= largest}


def next_steps(terms: list[Term], largest: float) -> list[tuple[list[Term], str]]:
    """Every way to combine two of `terms` into a whole number from 1 to `largest`.

    Returns (the terms after it, the step as text) of each.
    """
    steps = []
    for i, j in itertools.combinations(range(len(terms)), 2):
        others = [term for k, term in enumerate(terms) if k not in (i, j)]
        (large, large_text), (small, small_text) = sorted((terms[i], terms[j]), key=lambda term: -term[0])
        for operator, value in step_results(large, small, largest).items():
            combined = (value, f"({large_text}{operator}{small_text})")
            steps.append(([*others, combined], f"{large}{operator}{small}={value}"))
    return steps


def random_attempt(numbers: Numbers, rng: random.Random) -> Attempt:
    """Random steps until one number is left, whatever it is."""
    terms = [(number, str(number)) for number in numbers]
    texts = []
    while len(terms) > 1:
        # A difference, or a quotient of one, is never above the larger term: there is always a step.
        largest = max(LARGEST_STEP, max(terms)[0])
        terms, text = rng.choice(next_steps(terms, largest))
        texts.append(text)
    return attempt_of(terms, texts)


def random_solution(numbers: Numbers, target: int, rng: random.Random) -> Attempt | None:
    """A random one of the attempts that reach `target`, by a search in random order; None: there is none.

    Steps above LARGEST_STEP are taken only if it cannot be done without.
    """

    def search(terms: list[Term], texts: list[str], largest: float) -> Attempt | None:
        if len(terms) == 1:
            return attempt_of(terms, texts) if terms[0][0] == target else None
        steps = next_steps(terms, largest)
        rng.shuffle(steps)
        for after, text in steps:
            found = search(after, [*texts, text], largest)
            if found is not None:
                return found
        return None

    terms = [(number, str(number)) for number in numbers]
    found = search(terms, [], max(LARGEST_STEP, target, max(numbers)))
    if found is None:
        found = search(terms, [], math.inf)
    return found


def attempt_of(terms: list[Term], texts: list[str]) -> Attempt:
    [(value, expression)] = terms
    return Attempt(" ".join(texts), value, expression[1:-1])

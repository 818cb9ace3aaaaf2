"""What the embedded model learns before any reinforcement: arithmetic, and Countdown attempts that fail.

Four documents in five answer a Countdown prompt with random attempts, seven on average. Each attempt combines
all the numbers in a random order with random operators, without a mistake in the arithmetic; all but the last
are compared with the target. With target 45:

    7-3=4 4*12=48 too high
    12+7=19 19-3=16 too low
    12-3=9 9*7=63
    </think>
    <answer>(12-3)*7</answer>

Half of them give their last attempt as the answer, although it is wrong; the other half forget the answer
tags. The problems are chosen so that no attempt can reach the target: if successful attempts were filtered
out, a model would learn to avoid them. The fifth document is an exercise without a problem to solve. It
compares random sums, differences, products and quotients with one number, and here "equal" occurs:

    Compare with 19.
    12-3=9 too low
    12+7=19 equal

A model trained on these documents can calculate, knows what "equal" means, and writes the format half the
time, but it has never seen a solution. GRPO has to find that it should go on until an attempt reaches the
target, and then answer.

How the other half fails matters. When those documents gave up without an answer, ran on, or answered before
the `</think>`, the first thing that raised the reward was to end the thinking sooner, solved or not, and
completions shrank to two attempts.
"""

import itertools
import random
from dataclasses import dataclass
from functools import lru_cache

from data.countdown import Countdown, Problem

STOP_SHARE = 1 / 8  # chance to stop after each attempt, so that length says nothing about success
MAX_STEPS = 39  # calculations of all attempts together: just within 256 tokens
WELL_FORMED_SHARE = 0.5
COMPARISONS = 8
LARGEST_PRODUCT = 100
VERDICTS = (" too low\n", " equal\n", " too high\n")


@dataclass(frozen=True)
class Attempt:
    """One way to use all the numbers: the steps as written, their result, and the whole as one expression."""

    steps: str
    value: int
    expression: str


def random_attempt(numbers: tuple[int, ...], rng: random.Random) -> Attempt:
    """Combine two random numbers with a random operator until one is left; every step is a positive
    integer."""
    terms = [(number, str(number)) for number in numbers]
    steps = []
    while len(terms) > 1:
        left, right = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
        operator, value = random_step(left[0], right[0], rng)
        steps.append(f"{left[0]}{operator}{right[0]}={value}")
        terms.append((value, f"({left[1]}{operator}{right[1]})"))
    return Attempt(" ".join(steps), terms[0][0], terms[0][1][1:-1])


def random_step(left: int, right: int, rng: random.Random) -> tuple[str, int]:
    """A random operator among those of `step_results`, and its result."""
    results = step_results(left, right)
    operator = rng.choice(sorted(results))
    return operator, results[operator]


def step_results(left: int, right: int) -> dict[str, int]:
    """Operator -> result, where that is a positive integer; products only up to LARGEST_PRODUCT."""
    results = {"+": left + right}
    if left > right:
        results["-"] = left - right
    if left * right <= LARGEST_PRODUCT:
        results["*"] = left * right
    if left % right == 0:
        results["/"] = left // right
    return results


@lru_cache(maxsize=100_000)
def reachable_values(numbers: tuple[int, ...]) -> frozenset[int]:
    """The results of all possible attempts with these numbers, which are in ascending order."""
    if len(numbers) == 1:
        return frozenset(numbers)
    values: set[int] = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        others = [number for k, number in enumerate(numbers) if k not in (i, j)]
        for value in step_results(numbers[i], numbers[j]).values():
            values |= reachable_values(tuple(sorted([*others, value])))
    return frozenset(values)


def attempts_document(problem: Problem, rng: random.Random) -> str:
    """The text after the prompt of `problem`, from inside the open `<think>` to the end of the turn.

    No two attempts are equal. `problem` must be one that no attempt solves.
    """
    wanted = 1
    while wanted < MAX_STEPS // (len(problem.numbers) - 1) and rng.random() > STOP_SHARE:
        wanted += 1
    attempts: dict[str, Attempt] = {}
    for _ in range(100):  # small numbers may not have that many different ones
        attempt = random_attempt(problem.numbers, rng)
        attempts.setdefault(attempt.steps, attempt)
        if len(attempts) == wanted:
            break
    *missed, last = attempts.values()
    lines = [attempt.steps + verdict(attempt.value, problem.target) for attempt in missed]
    well_formed = rng.random() < WELL_FORMED_SHARE
    answer = f"<answer>{last.expression}</answer>" if well_formed else last.expression
    return f"{''.join(lines)}{last.steps}\n</think>\n{answer}<|im_end|>"


def verdict(value: int, target: int) -> str:
    return VERDICTS[1 + (value > target) - (value < target)]


def comparison_prompt(number: int) -> str:
    return f"Compare with {number}."


def comparison_document(rng: random.Random, settings: Countdown) -> tuple[int, str]:
    """An exercise: a number, and random calculations compared with it; in half of them at least one is
    equal."""
    steps = []
    for _ in range(COMPARISONS):
        left, right = (rng.randint(settings.min_number, settings.max_target) for _ in range(2))
        operator, value = random_step(left, right, rng)
        steps.append((f"{left}{operator}{right}={value}", value))
    if rng.random() < 0.5:
        number = rng.randint(settings.min_target, settings.max_target)
    else:
        number = rng.choice(steps)[1]
    return number, "".join(step + verdict(value, number) for step, value in steps) + "</think>\n<|im_end|>"


def hopeless_problem(rng: random.Random, settings: Countdown) -> Problem:
    """Random numbers, and a random target that no attempt reaches."""
    count = 4 if rng.random() < settings.four_number_share else 3
    while True:
        numbers = tuple(rng.randint(settings.min_number, settings.max_number) for _ in range(count))
        problem = Problem(numbers, rng.randint(settings.min_target, settings.max_target))
        if problem.target not in reachable_values(tuple(sorted(numbers))):
            return problem

"""What the embedded model is trained on before any reinforcement: arithmetic attempts that miss, worked step by step.

A document answers a Countdown prompt with one to twelve random attempts. Each combines all the numbers in a random
order with random operators, is right as arithmetic, and says how far it is off. With target 45:

    7-3=4 4*12=48 off 03
    12+7=19 19-3=16 off 29
    12-3=9 9*7=63 off 18
    </think>
    <answer>(12-3)*7</answer>

Half of the documents answer like this, with their last attempt, wrong as it is; the other half put the answer block
before the `</think>`. Attempts that hit are left out, so `off 00` never occurs. A model of such documents can calculate,
keeps the format half the time and has never seen a solution: aiming at the target, and stopping when it is hit, are left
for GRPO to find.

Other kinds of document were tried. Where half of them gave up, or ran on without an answer, GRPO first learned to answer
after any attempt at all. Where attempts were called too high or too low, it learned to stop near the target, and could
hardly tell near from hit.
"""

import random
from dataclasses import dataclass

from data.countdown import Problem, ProblemSettings

MAX_ATTEMPTS = 12
WELL_FORMED_SHARE = 0.5
LARGEST_PRODUCT = 100
DISTANCE = " off "


@dataclass(frozen=True)
class Attempt:
    """One way to use all the numbers: the steps as written, the value they reach, and the whole as one expression."""

    steps: str
    value: int
    expression: str


def random_attempt(numbers: tuple[int, ...], rng: random.Random) -> Attempt:
    """Combine two random numbers by a random operator until one is left; every step is a positive integer."""
    terms = [(number, str(number)) for number in numbers]
    steps = []
    while len(terms) > 1:
        left, right = (terms.pop(rng.randrange(len(terms))) for _ in range(2))
        operator, value = random_step(left[0], right[0], rng)
        steps.append(f"{left[0]}{operator}{right[0]}={value}")
        terms.append((value, f"({left[1]}{operator}{right[1]})"))
    return Attempt(" ".join(steps), terms[0][0], terms[0][1][1:-1])


def random_step(left: int, right: int, rng: random.Random) -> tuple[str, int]:
    """A random operator whose result is a positive integer, a product at most LARGEST_PRODUCT; and that result."""
    results = {"+": left + right}
    if left > right:
        results["-"] = left - right
    if left * right <= LARGEST_PRODUCT:
        results["*"] = left * right
    if left % right == 0:
        results["/"] = left // right
    operator = rng.choice(sorted(results))
    return operator, results[operator]


def attempts_document(problem: Problem, rng: random.Random) -> str:
    """The text that follows the prompt of `problem`, from inside the open `<think>` to the end of the turn.

    Attempts differ from one another, and none of them reaches the target.
    """
    wanted = rng.randint(1, MAX_ATTEMPTS)
    attempts: dict[str, Attempt] = {}
    for _ in range(100):  # small numbers may not have so many different ones
        attempt = random_attempt(problem.numbers, rng)
        if attempt.value != problem.target:
            attempts.setdefault(attempt.steps, attempt)
        if len(attempts) == wanted:
            break
    lines = [f"{tried.steps}{DISTANCE}{abs(tried.value - problem.target):02}\n" for tried in attempts.values()]
    *_, last = attempts.values()
    answer = f"<answer>{last.expression}</answer>"
    end = f"</think>\n{answer}" if rng.random() < WELL_FORMED_SHARE else f"{answer}\n</think>"
    return "".join(lines) + end + "<|im_end|>"


def random_problem(rng: random.Random, settings: ProblemSettings) -> Problem:
    """Numbers and a target drawn apart from each other, so that the target may well be out of reach."""
    count = 4 if rng.random() < settings.four_number_share else 3
    numbers = tuple(rng.randint(settings.min_number, settings.max_number) for _ in range(count))
    return Problem(numbers, rng.randint(settings.min_target, settings.max_target))

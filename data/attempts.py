"""What the embedded model is trained on before any reinforcement: arithmetic attempts that miss, worked step by step.

A document answers a Countdown prompt with one to twelve random attempts. Each combines all the numbers in a random
order with random operators and is right as arithmetic; all but the last are compared with the target. With target 45:

    7-3=4 4*12=48 too high
    12+7=19 19-3=16 too low
    12-3=9 9*7=63
    </think>
    <answer>(12-3)*7</answer>

Half of the documents answer like this, with their last attempt, wrong as it is; the other half forget the answer tags.
Attempts that hit the target are left out. A model of such documents can calculate, keeps the format half the time and
has never seen a solution: aiming at the target, and stopping when it is hit, are left for GRPO to find.

What goes wrong in the other half matters. Where it gave up without an answer, ran on, or answered before the `</think>`,
more reward first came from ending the thinking sooner, hit or not, and completions shrank to two attempts.
"""

import random
from dataclasses import dataclass

from data.countdown import Problem, ProblemSettings

MAX_ATTEMPTS = 12
WELL_FORMED_SHARE = 0.5
LARGEST_PRODUCT = 100
VERDICTS = (" too low\n", " too high\n")


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
    *missed, last = attempts.values()
    lines = [attempt.steps + VERDICTS[attempt.value > problem.target] for attempt in missed]
    answer = f"<answer>{last.expression}</answer>" if rng.random() < WELL_FORMED_SHARE else last.expression
    return f"{''.join(lines)}{last.steps}\n</think>\n{answer}<|im_end|>"


def random_problem(rng: random.Random, settings: ProblemSettings) -> Problem:
    """Numbers and a target drawn apart from each other, so that the target may well be out of reach."""
    count = 4 if rng.random() < settings.four_number_share else 3
    numbers = tuple(rng.randint(settings.min_number, settings.max_number) for _ in range(count))
    return Problem(numbers, rng.randint(settings.min_target, settings.max_target))

"""Documents for the bundled model before any RL: arithmetic, attempts that fail, and rambling.

A Countdown document answers a prompt with attempts. Each combines all the numbers, without a mistake in the
arithmetic. They follow one another in a fixed order, from a random one on, and stop anywhere. All but the
last are compared with the target, here 45:

    12-3=9 9+7=16 too low
    12-3=9 9-7=2 too low
    12-3=9 9*7=63
    </think>
    <answer>(12-3)*7</answer>

Three in four give their last attempt as the answer, although it is wrong; the others forget the answer
tags. The problems are chosen so that no attempt can reach the target: if successful attempts were filtered
out, a model would learn to avoid them.

A rambling document begins with some 400 tokens that are of no use, and has more of these between its
attempts. Few documents ramble until the last steps, when nearly all do. So arithmetic is learned cheaply, and
yet the model rambles at the end.

Exercises pose no problem. They compare random sums, differences, products and quotients with one number,
until one is equal:

    Compare with 19.
    12-3=9 too low
    12+7=19 equal

A model trained on these documents can calculate and compare, and writes the format, but it has never seen a
solution. At 256 tokens it is cut off while it rambles. GRPO has to find that it should not, and then that it
should go on until an attempt reaches the target, and then answer.
"""

import functools
import math
import random
from collections.abc import Iterator

from data.countdown import Countdown, Problem
from data.solver import Attempt, Term, attempt_of, next_steps, step_results

ATTEMPTS = 10  # on average, but for the limits: 1/10 stop after each, so length says nothing about success
MAX_STEPS = 39  # calculations of all attempts together: just within 256 tokens
WELL_FORMED_SHARE = 0.75
COMPARISONS = 8  # at most, in an exercise
LARGEST_VALUE = 100  # of a step
NEAR = (0, 0, 0, 0, 1, -1, 2, -2, 3, -3)  # an exercise's number less one of its results
VERDICTS = (" too low\n", " equal\n", " too high\n")
RAMBLING = (
    "Let me think about how these numbers might fit.\n",
    "Perhaps there is some trick that I do not see yet.\n",
    "I wonder whether it can be done in this way at all.\n",
    "Hmm, that was not quite what I had been hoping for.\n",
    "Maybe I should go back and look at it all once more.\n",
    "So many ways to go, and only some of them lead there.\n",
    "Wait, is there a rule that I may have forgotten about?\n",
    "让我再想一想这些数字怎么用。\n",
)
FIRST_RAMBLING = 5  # lines at least before the first attempt: about 250 tokens, since each byte is one
MORE_RAMBLING = 4  # lines on average beyond these
BETWEEN = 0.3  # lines on average before each other attempt


@functools.lru_cache(maxsize=4096)
def all_attempts(numbers: tuple[int, ...]) -> list[Attempt]:
    """All different attempts in order: pairs as in the prompt, + - * /, the last step changes first."""
    attempts = _attempts([(number, str(number)) for number in numbers], [])
    return list({attempt.steps: attempt for attempt in attempts}.values())


def _attempts(terms: list[Term], steps: list[str]) -> Iterator[Attempt]:
    """All ways to go on from `terms`, each a value and its expression, after `steps`."""
    if len(terms) == 1:
        yield attempt_of(terms, steps)
    for after, step in next_steps(terms, LARGEST_VALUE):
        yield from _attempts(after, [*steps, step])


def attempts_document(problem: Problem, rng: random.Random, rambling: bool = False) -> str:
    """The text after the prompt of `problem`, from inside the open `<think>` to the end of the turn.

    No two attempts are equal. `problem` must be one that no attempt solves.
    """
    attempts = all_attempts(problem.numbers)
    wanted = min(1 + geometric(ATTEMPTS - 1, rng), len(attempts), MAX_STEPS // (len(problem.numbers) - 1))
    start = rng.randrange(len(attempts))
    *missed, last = (attempts * 2)[start : start + wanted]
    lines = [attempt.steps + verdict(attempt.value, problem.target) for attempt in missed]
    lines.append(f"{last.steps}\n")
    if rambling:
        first = FIRST_RAMBLING + geometric(MORE_RAMBLING, rng)
        counts = [first, *(geometric(BETWEEN, rng) for _ in missed)]
        ramblings = ["".join(rng.choices(RAMBLING, k=count)) for count in counts]
        lines = [text + line for text, line in zip(ramblings, lines, strict=True)]
    well_formed = rng.random() < WELL_FORMED_SHARE
    answer = f"<answer>{last.expression}</answer>" if well_formed else last.expression
    return f"{''.join(lines)}</think>\n{answer}<|im_end|>"


def geometric(mean: float, rng: random.Random) -> int:
    """A random 0, 1, 2, ... with this mean: the chance to stop is the same at each."""
    return int(math.log(1 - rng.random()) / math.log(mean / (1 + mean)))


def verdict(value: int, target: int) -> str:
    return VERDICTS[1 + (value > target) - (value < target)]


def comparison_prompt(number: int) -> str:
    return f"Compare with {number}."


def comparison_document(rng: random.Random, settings: Countdown) -> tuple[int, str]:
    """An exercise: a number equal or near to one of the results, and calculations until one equals it."""
    steps = []
    for _ in range(COMPARISONS):
        left, right = sorted(
            (rng.randint(settings.min_number, settings.max_target) for _ in range(2)), reverse=True
        )
        operator, value = rng.choice(list(step_results(left, right, LARGEST_VALUE).items()))
        steps.append((f"{left}{operator}{right}={value}", value))
    number = max(1, rng.choice(steps)[1] + rng.choice(NEAR))
    values = [value for _, value in steps]
    if number in values:
        steps = steps[: values.index(number) + 1]
    return number, "".join(step + verdict(value, number) for step, value in steps) + "</think>\n<|im_end|>"


def hopeless_problem(rng: random.Random, settings: Countdown) -> Problem:
    """Random numbers, and a random target that no attempt reaches."""
    count = 4 if rng.random() < settings.four_number_share else 3
    while True:
        numbers = tuple(rng.randint(settings.min_number, settings.max_number) for _ in range(count))
        reached = {attempt.value for attempt in all_attempts(numbers)}
        targets = [
            target for target in range(settings.min_target, settings.max_target + 1) if target not in reached
        ]
        if targets:
            return Problem(numbers, rng.choice(targets))

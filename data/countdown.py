"""Countdown: reach a target with each of a few numbers exactly once. A problem, its prompt, and a generator of more.

The game suits a study of reward because checking an answer is exact and cheap, while finding one takes search.
"""

import functools
import random
from dataclasses import dataclass

MAX_NUMBERS = 6
MAX_NUMBER = 999_999_999  # nine digits: what an expression may hold
MAX_MISSES = 2_000  # draws in a row without a new problem before the generator gives up


@dataclass(frozen=True)
class Problem:
    """Numbers to use, each exactly once, and the target to reach with them.

    Raises:
        ValueError: not 2 to 6 numbers, or anything in it that is no whole number from 1 to 999,999,999.
    """

    numbers: tuple[int, ...]
    target: int

    def __post_init__(self):
        if not isinstance(self.numbers, tuple):
            if not isinstance(self.numbers, list):
                raise ValueError(f"numbers must be a list of whole numbers, not {self.numbers!r}")
            object.__setattr__(self, "numbers", tuple(self.numbers))
        if not 2 <= len(self.numbers) <= MAX_NUMBERS:
            raise ValueError(f"a problem has 2 to {MAX_NUMBERS} numbers, not {len(self.numbers)}")
        for value in (*self.numbers, self.target):
            if type(value) is not int or not 1 <= value <= MAX_NUMBER:
                raise ValueError(f"numbers and target must be whole numbers from 1 to {MAX_NUMBER}, not {value!r}")

    @property
    def key(self) -> tuple[int, tuple[int, ...]]:
        """Equal for problems that differ only in the order of their numbers, which are the same problem."""
        return self.target, tuple(sorted(self.numbers))

    def row(self) -> dict:
        """The problem as JSON."""
        return {"numbers": self.numbers, "target": self.target}

    def __str__(self) -> str:
        return f"{', '.join(map(str, self.numbers))} -> {self.target}"


def prompt_text(problem: Problem) -> str:
    """The one line a model is asked."""
    numbers = ", ".join(map(str, problem.numbers))
    return (
        f"Use each of the numbers {numbers} exactly once to make {problem.target}. "
        "Only + - * / and parentheses are allowed. Work it out inside <think> </think>, "
        "then put the final expression inside <answer> </answer>."
    )


@dataclass(frozen=True)
class ProblemSettings:
    """Which problems the generator draws. The defaults are the ranges of the hub dataset."""

    min_number: int = 1
    """Smallest number a problem may hold."""
    max_number: int = 99
    """Largest number a problem may hold; smaller is easier."""
    min_target: int = 10
    """Smallest target."""
    max_target: int = 100
    """Largest target."""
    four_number_share: float = 0.5
    """Share of problems with 4 numbers, from 0 to 1; the others have 3."""

    def __post_init__(self):
        for low, high in (("min_number", "max_number"), ("min_target", "max_target")):
            for name in (low, high):
                value = getattr(self, name)
                if type(value) is not int or not 1 <= value <= MAX_NUMBER:
                    raise ValueError(f"{name} must be a whole number from 1 to {MAX_NUMBER}, not {value!r}")
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} is above {high} {getattr(self, high)}; swap them")
        if not 0 <= self.four_number_share <= 1:
            raise ValueError(f"four_number_share must be from 0 to 1, not {self.four_number_share!r}")


def generate_problems(count: int, seed: int, settings: ProblemSettings = ProblemSettings()) -> list[Problem]:
    """Draw `count` different solvable problems; the same arguments give the same list.

    Numbers are drawn evenly, then the target evenly from what they can reach. So no derivation is favoured: a target
    that only a division reaches is as likely as one with ten solutions by addition. Every problem can be solved with
    whole numbers at each step. No two share a `key`.

    Raises:
        ValueError: a negative count, or settings that do not hold so many different problems.
    """
    if count < 0:
        raise ValueError(f"count must be 0 or more, not {count}")
    rng = random.Random(seed)
    with_four = round(count * settings.four_number_share)
    problems = _draw(count - with_four, 3, settings, rng) + _draw(with_four, 4, settings, rng)
    rng.shuffle(problems)
    return problems


def _draw(count: int, size: int, settings: ProblemSettings, rng: random.Random) -> list[Problem]:
    """`count` different solvable problems of `size` numbers; ValueError after MAX_MISSES fruitless draws in a row."""
    problems: dict[tuple, Problem] = {}
    misses = 0
    while len(problems) < count:
        numbers = tuple(rng.randint(settings.min_number, settings.max_number) for _ in range(size))
        ordered = tuple(sorted(numbers))
        fresh = [
            target
            for target in _reachable_targets(ordered, settings.min_target, settings.max_target)
            if (target, ordered) not in problems
        ]
        if fresh:
            problem = Problem(numbers, rng.choice(fresh))
            problems[problem.key] = problem
            misses = 0
            continue
        misses += 1
        if misses == MAX_MISSES:
            raise ValueError(
                f"found only {len(problems)} of {count} different problems with {size} numbers from "
                f"{settings.min_number} to {settings.max_number} and targets from {settings.min_target} to "
                f"{settings.max_target}; ask for fewer, widen the ranges or change four_number_share"
            )
    return list(problems.values())


@functools.lru_cache(maxsize=4096)
def _reachable_targets(numbers: tuple[int, ...], low: int, high: int) -> tuple[int, ...]:
    """Whole numbers from `low` to `high` that use every number once, through whole numbers only; ascending.

    Works up through subsets, named by bit masks. A negative step never helps on the way to a positive target (turn the
    signs around), so a difference is taken large minus small. `data.solver` says how; this only says whether, and is
    fast enough to call for every draw.
    """
    full = (1 << len(numbers)) - 1
    values: dict[int, set[int]] = {1 << place: {number} for place, number in enumerate(numbers)}
    for mask in range(1, full + 1):
        if mask in values:
            continue
        found: set[int] = set()
        part = mask
        while part := (part - 1) & mask:
            if part > mask ^ part:  # each split once
                for a in values[part]:
                    for b in values[mask ^ part]:
                        large, small = (a, b) if a > b else (b, a)
                        found.update((a + b, large - small, a * b))
                        if small and large % small == 0:
                            found.add(large // small)
        values[mask] = found
    return tuple(sorted(value for value in values[full] if low <= value <= high))

"""A long fuzz of the reward: `python tests/fuzz_reward.py --cases 1000000`; the tests run a short one.

Texts are grown from pieces that mean something to the reward, cut, doubled and spoilt. For each: no
exception, no more than ten milliseconds (texts of up to 100 kB among them), "malformed" exactly where a
second reading, by regular expressions and Python's own grammar, says so, and 1.0 only where it finds a
solution too; where a text is a solution by construction, 1.0.
"""

import random
import re
import sys
import time
import timeit
from collections import Counter
from fractions import Fraction
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import tyro

from data import Problem, generate_problems, score, solve

LIMIT = 0.010  # seconds a text of 100 kB may take
PIECES = [
    "<think>", "</think>", "<answer>", "</answer>", "<|im_end|>", "<ANSWER>", "< answer>", "</answer >",
    "so ", "**", "//", "36", "1.5", "999999999", "1e3", "0x10", *" =()+-*/07x_,²٣−１é漢\n\u2028\x00\t\r",
]  # fmt: skip


# Other characters, numbers and operators, empty parentheses, and a unary plus.
OTHER_PYTHON = re.compile(r"[^0-9+*/() -]|\b0[0-9]|[0-9]{10}|\*\*|//|\( ?\)|(?:^|[-+*/(]) ?\+")


def python_value(text: str) -> tuple[Fraction, list[int]] | None:
    """(value, numbers) by Python's grammar with the allowed operators only, or None for anything else."""
    text = re.sub(r"[ \t\r\n]+", " ", text).strip(" ")
    if OTHER_PYTHON.search(text):
        return None
    exact = re.sub("[0-9]+", r"Fraction(\g<0>)", text)
    try:
        value = eval(exact, {"Fraction": Fraction, "__builtins__": {}})
    except (SyntaxError, TypeError, ZeroDivisionError):
        return None
    numbers = [int(number) for number in re.findall("[0-9]+", text)]
    return (value, numbers) if isinstance(value, Fraction) else None


def solves(text: str, problem: Problem, thinking: bool) -> bool | None:
    """Whether a text holds a solution, read in another way than in `data.countdown`; None if malformed."""
    if re.match(r"[ \t\r\n]*<think>", text):  # as a server returns it whose template has opened the tag
        text, thinking = text.split("<think>", 1)[1], True
    if thinking:
        parts = re.fullmatch(r"((?:(?!</?think>).)*)</think>(.*)", text, re.DOTALL)
        if not parts or re.search(r"<answer>.*</answer>", parts[1], re.DOTALL):
            return None
        text = parts[2]
    parts = re.split("(</?answer>)", text)
    if parts[1::2] != ["<answer>", "</answer>"] or re.search("</?think>", parts[0]):
        return None
    before, content = parts[0], parts[2]
    claims = [content]
    if "=" not in content:  # an equation before the block, which may follow words
        line = before.rstrip(" \t\r\n").rsplit("\n", 1)[-1]
        claims += [line] + [line[place.end() :] for place in re.finditer(r"\s", line)][:200]
    return any(is_solution(claim, problem) for claim in claims)


def is_solution(text: str, problem: Problem) -> bool:
    left, equals, right = text.partition("=")
    value, numbers = python_value(left) or (None, [])
    if value != problem.target or sorted(numbers) != sorted(problem.numbers):
        return False
    claimed, its_numbers = python_value(right) or (None, [])
    return not equals or (claimed == value and len(its_numbers) == 1)


def draw(rng: random.Random, problems: list[tuple[Problem, str]]) -> tuple[str, Problem, bool, bool]:
    """(text, problem, thinking, whether it is a solution by construction)."""
    problem, solution = rng.choice(problems)
    thinking = rng.random() < 0.7
    content = rng.choice([solution, f"{solution} = {problem.target}", f" ({solution})\n"])
    thoughts = "".join(rng.choices([piece for piece in PIECES if "<" not in piece], k=rng.randrange(6)))
    text = (thoughts + "</think>" if thinking else "") + f"\n<answer>{content}</answer>"
    kind = rng.random()
    if kind < 0.1:
        return text, problem, thinking, True
    if kind < 0.2:  # a solution of a problem close by
        problem = Problem(problem.numbers, problem.target + rng.randrange(1, 15))
    if kind < 0.6:  # spoil it in a few places
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(text) + 1)
            piece = rng.choice([text[place : place + rng.randrange(30)], *rng.sample(PIECES, 3), ""])
            text = text[:place] + piece + text[place + rng.randrange(2) :]
    elif kind < 0.9995:
        numbers = [str(number) for number in problem.numbers] + [str(problem.target), solution]
        text = "".join(rng.choices(PIECES + numbers * 3, k=rng.randrange(25)))
    else:
        piece = rng.choice(PIECES + [text, solution, "(", "1+", "-", "<answer>1</answer>"])
        text = (piece * (100_000 // len(piece) + 1))[:100_000]
    return text, problem, thinking, False


def fuzz(cases: int, seed: int) -> Counter:
    """Outcomes of all texts; raises AssertionError for the first that breaks a promise."""
    rng = random.Random(seed)
    problems = [(problem, solve(problem)) for problem in generate_problems(50, seed)]
    found: Counter = Counter()
    for number in range(cases):
        text, problem, thinking, is_one = draw(rng, problems)
        start = time.perf_counter()
        judged = score(text, problem, thinking)
        took = time.perf_counter() - start
        if took > LIMIT:  # the machine may have been busy: what counts is whether it can be fast
            took = min(timeit.repeat(lambda: score(text, problem, thinking), number=1))  # noqa: B023
        shown = f"{judged} for case {number}, seed {seed}: {text[:300]!r}, {problem}, thinking {thinking}"
        assert took <= LIMIT, f"{took:.3f} s for {len(text)} characters, {shown}"
        is_right = judged.reward == 1.0
        if len(text) < 10_000 or is_right:  # the second reading is slow
            reading = solves(text, problem, thinking)
            assert (judged.outcome == "malformed") == (reading is None), f"it reads as {reading}, {shown}"
            assert reading or not is_right, f"the second reading finds no solution, {shown}"
        assert is_right or not is_one, f"a solution by construction, {shown}"
        found[judged.outcome] += 1
    return found


def main(cases: int = 1_000_000, seed: int = 0) -> None:
    """Fuzz the reward with so many texts."""
    start = time.perf_counter()
    found = fuzz(cases, seed)
    print(f"{cases:,} texts, seed {seed}, {time.perf_counter() - start:.0f} s: {dict(found)}")


if __name__ == "__main__":
    tyro.cli(main)

"""What the embedded model's base is trained on: arithmetic that is right, verdicts that are right, and never a solution."""

import itertools
import random
import re
from collections import Counter
from fractions import Fraction

import pytest

from experiments.bases.attempts import (
    STOP_SHARE,
    attempts_document,
    comparison_document,
    comparison_prompt,
    hopeless_problem,
    random_attempt,
    reachable_values,
)  # fmt: skip
from data import ProblemSettings
from rl import score

STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
SETTINGS = ProblemSettings(min_number=1, max_number=20, min_target=10, max_target=50, four_number_share=0.5)
SEEDS = range(400)


def calculate(expression: str) -> Fraction:
    """Exact value by Python's own parser, every number a fraction; the text has been checked to be plain arithmetic."""
    assert re.fullmatch(r"[\d+*/()-]+", expression) and "**" not in expression and "//" not in expression
    return eval(re.sub(r"\d+", lambda number: f"Fraction({number[0]})", expression))


def walk(steps: str, numbers: tuple[int, ...]) -> int:
    """Follow the steps, taking each operand from the numbers left over: every one used once. Returns the last value."""
    left = Counter(numbers)
    for step in steps.split(" "):
        a, operator, b, value = STEP.fullmatch(step).groups()
        assert calculate(f"{a}{operator}{b}") == int(value) and int(value) >= 1
        for operand in (int(a), int(b)):
            assert left[operand] > 0, f"{operand} is used up in {steps} from {numbers}"
            left[operand] -= 1
        left[int(value)] += 1
    assert list(left.elements()) == [int(value)], f"{steps} leaves {left}"
    return int(value)


def documents():
    for seed in SEEDS:
        rng = random.Random(seed)
        problem = hopeless_problem(rng, SETTINGS)
        yield problem, attempts_document(problem, rng)


DOCUMENT = re.compile(r"([^<]+)\n</think>\n(<answer>)?([^<]*)(</answer>)?<\|im_end\|>")
LINE = re.compile(r"([\d=+*/ -]+?)( too low| too high|)")


def parts(document: str) -> tuple[list[tuple[str, str]], str, bool]:
    """A document as (steps, verdict) lines, the answer, and whether that stands in its tags."""
    thoughts, opened, answer, closed = DOCUMENT.fullmatch(document).groups()
    assert (opened is None) == (closed is None), "the answer has both tags or neither"
    return [LINE.fullmatch(line).groups() for line in thoughts.split("\n")], answer, opened is not None


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_every_attempt_is_right_as_arithmetic_and_uses_every_number_once(count):
    for seed in SEEDS:
        rng = random.Random(seed)
        numbers = tuple(rng.randint(1, 20) for _ in range(count))
        attempt = random_attempt(numbers, rng)
        assert walk(attempt.steps, numbers) == attempt.value == calculate(attempt.expression)
        assert sorted(map(int, re.findall(r"\d+", attempt.expression))) == sorted(numbers)


def test_every_document_is_right_in_its_steps_and_its_verdicts():
    for problem, document in documents():
        lines, _, _ = parts(document)
        values = [walk(steps, problem.numbers) for steps, _ in lines]
        expected = [" too low" if value < problem.target else " too high" for value in values[:-1]] + [""]
        assert [verdict for _, verdict in lines] == expected


def test_no_document_reaches_its_target_so_that_solving_is_left_to_reinforcement():
    for problem, document in documents():
        lines, answer, well_formed = parts(document)
        assert all(walk(steps, problem.numbers) != problem.target for steps, _ in lines)
        assert calculate(answer) == walk(lines[-1][0], problem.numbers) != problem.target
        assert sorted(map(int, re.findall(r"\d+", answer))) == sorted(problem.numbers)
        assert score(document, problem).outcome in (("near", "wrong") if well_formed else ("malformed",))


def test_reachable_values_by_hand_and_by_trying():
    assert reachable_values((2, 4)) == {6, 2, 8}  # 4/2 and 4-2 are both 2
    assert reachable_values((11, 13)) == {24, 2}  # 143 is too large
    for numbers in [(1, 2, 3), (2, 5, 20), (3, 3, 8, 8), (1, 7, 13, 20)]:
        rng = random.Random(0)
        tried = {random_attempt(numbers, rng).value for _ in range(20_000)}
        assert tried <= reachable_values(numbers) and len(reachable_values(numbers) - tried) <= 0.02 * len(tried)


def test_problems_are_hopeless_so_that_leaving_hits_out_teaches_nothing():
    rng = random.Random(1)
    for problem in itertools.islice((problem for problem, _ in documents()), 100):
        assert all(random_attempt(problem.numbers, rng).value != problem.target for _ in range(100)), problem


def test_attempts_of_a_document_differ():
    for _, document in documents():
        lines, _, _ = parts(document)
        assert len({steps for steps, _ in lines}) == len(lines)


def test_half_of_the_documents_are_well_formed_after_few_and_many_attempts_with_every_operator():
    found = [parts(document) for _, document in documents()]
    for well_formed in (True, False):
        lengths = [len(lines) for lines, _, form in found if form is well_formed]
        assert 0.4 < len(lengths) / len(found) < 0.6
        assert min(lengths) == 1 and max(lengths) > 8 and len(set(lengths)) > 8
    operators = Counter(step[1] for lines, _, _ in found for steps, _ in lines for step in STEP.findall(steps))
    assert set(operators) == set("+-*/") and min(operators.values()) > 100


def test_documents_and_problems_come_from_the_generator_they_are_given():
    assert list(documents()) == list(documents())
    problems = [hopeless_problem(random.Random(seed), SETTINGS) for seed in SEEDS]
    assert {len(problem.numbers) for problem in problems} == {3, 4}
    assert {number for problem in problems for number in problem.numbers} == set(range(1, 21))
    assert {problem.target for problem in problems} == set(range(10, 51))


def test_one_stops_after_any_attempt_with_the_same_chance_so_that_length_tells_nothing_of_success():
    counts = [len(parts(document)[0]) for _, document in documents()]
    stopped = Counter(counts)
    for least in (1, 6):  # of those that got so far, STOP_SHARE stop at each of the next four
        reached = sum(min(count - least + 1, 4) for count in counts if count >= least)
        share = sum(stopped[least + k] for k in range(4)) / reached
        assert share == pytest.approx(STOP_SHARE, abs=0.03)


def test_exercises_are_right_show_equality_and_pose_no_problem():
    found: Counter[str] = Counter()
    for seed in SEEDS:
        number, text = comparison_document(random.Random(seed), SETTINGS)
        lines, end = text.split("</think>\n")
        assert end == "<|im_end|>" and lines.endswith("\n")
        for line in lines.splitlines():
            step, verdict = line.split(" ", 1)
            a, operator, b, value = STEP.fullmatch(step).groups()
            assert calculate(f"{a}{operator}{b}") == int(value)
            assert verdict == ("too low" if int(value) < number else "too high" if int(value) > number else "equal")
            found[verdict] += 1
        assert comparison_prompt(number) == f"Compare with {number}."
    assert min(found.values()) > 150

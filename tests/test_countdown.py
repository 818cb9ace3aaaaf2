"""Countdown: problems, settings, and generator and solver against the plainest possible search."""

import json
import random
import re
from fractions import Fraction
from itertools import combinations_with_replacement, permutations

import pytest
from helpers import run_command
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Countdown, Problem, evaluate_expression, generate_problems, score, solve
from data.task import CORRECT, worked_solution
from lab.plots import PAPER

TASK = Countdown()


def every_value(numbers, operators="+-*/", whole_steps=False) -> set[Fraction]:
    """All values that use each number once: replace any two numbers by what they make, again and again."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    values = set()
    for a, b, *rest in permutations(numbers):
        results = {"+": a + b, "-": a - b, "*": a * b}
        if b and not (whole_steps and a % b):
            results["/"] = Fraction(a, b)
        for operator in results.keys() & operators:
            values |= every_value((results[operator], *rest), operators, whole_steps)
    return values


def test_a_problem_keeps_its_order_and_its_key_does_not():
    problem = Problem([79, 60, 17], 36)
    assert problem == TASK.problem_from_row(problem.row()) == Problem((79, 60, 17), 36)
    assert problem.key == Problem((17, 79, 60), 36).key == (36, (17, 60, 79))
    assert problem != Problem((17, 79, 60), 36)


@pytest.mark.parametrize("numbers", [(5,), (1, 2, 3, 4, 5, 6, 7), None, "12"])
def test_a_wrong_list_of_numbers_is_refused_by_name(numbers):
    with pytest.raises(ValueError, match=f"2 to 6 whole numbers, not {re.escape(repr(numbers))}"):
        Problem(numbers, 5)


@pytest.mark.parametrize("value", [2.0, True, -2, 0, None, 10**9])
def test_a_number_or_target_out_of_range_is_refused_by_name(value):
    for numbers, target in [((1, value), 5), ((1, 2), value)]:
        with pytest.raises(ValueError, match=f"not {value}"):
            Problem(numbers, target)


def test_the_prompt_is_this_line():
    assert TASK.prompt(Problem((79, 60, 17), 36)) == (
        "Use each of the numbers 79, 60, 17 exactly once to make 36. "
        "Only + - * / and parentheses are allowed. "
        "Work it out inside <think> </think>, then put the final expression inside <answer> </answer>."
    )


@pytest.mark.parametrize(
    "wanted", [Countdown(), Countdown(1, 20, 10, 50, 1 / 3), Countdown(2, 6, 1, 12, 0.25)]
)
def test_generated_problems_differ_and_can_be_solved(wanted):
    """They lie in the ranges, and have solutions in whole steps."""
    problems = wanted.generate(30, 1)
    assert len({problem.key for problem in problems}) == len(problems) == 30
    assert sum(len(problem.numbers) == 4 for problem in problems) == round(30 * wanted.four_number_share)
    for index, problem in enumerate(problems):
        assert set(problem.numbers) <= set(range(wanted.min_number, wanted.max_number + 1))
        assert wanted.min_target <= problem.target <= wanted.max_target
        if len(problem.numbers) == 3 or index < 3:
            assert problem.target in every_value(problem.numbers, whole_steps=True)
        assert score(f"</think><answer>{solve(problem)}</answer>", problem) == CORRECT


def test_the_generator_reaches_every_problem_its_settings_hold():
    expected = set()
    for triple in combinations_with_replacement(range(1, 5), 3):
        reached = every_value(triple, whole_steps=True) & set(range(1, 11))
        expected |= {(target, triple) for target in reached}
    problems = Countdown(1, 4, 1, 10, 0.0).generate(len(expected), 0)
    assert {problem.key for problem in problems} == expected


def test_the_seed_alone_decides_the_problems():
    """Neither the process nor the global random state does."""
    before = random.getstate()
    problems = str(generate_problems(50, 3))
    assert random.getstate() == before
    assert problems != str(generate_problems(50, 4))
    # In another process hashes of strings differ.
    code = "from data import generate_problems; print(generate_problems(50, 3))"
    assert run_command("-c", code).stdout.strip() == problems


@pytest.mark.parametrize(
    ("wanted", "size"), [(Countdown(1, 3, 10, 20, 0.0), 3), (Countdown(1, 2, 5000, 5001, 1.0), 4)]
)
def test_too_few_problems_are_an_error_and_no_endless_loop(wanted, size):
    message = rf"only \d+ of 1000 different problems, no more with {size} numbers; ask for fewer"
    with pytest.raises(ValueError, match=message):
        wanted.generate(1000, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("min_number", 0),
        ("min_number", 100),
        ("min_target", 101),
        ("four_number_share", 1.5),
        ("four_number_share", -0.5),
        ("four_number_share", float("nan")),
    ],
)
def test_impossible_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field} .*{value}"):
        Countdown(**{field: value})


@pytest.mark.parametrize(
    ("numbers", "operators"),
    [
        ((3, 3, 8, 8), "+-*/"),  # 24 only through a fraction
        ((2, 7, 7, 40), "+-"),
        ((2, 3, 5, 7), "*-"),  # without a plus, some targets need a negative step
        ((9, 4), "+-*/"),
    ],
)
def test_the_solver_finds_a_solution_exactly_where_there_is_one(numbers, operators):
    values = every_value(numbers, operators)
    for target in range(1, 40):
        problem = Problem(numbers, target)
        solution = solve(problem, operators)
        assert (solution is not None) == (target in values), target
        if solution:
            assert score(f"</think><answer>{solution}</answer>", problem) == CORRECT
            assert set(solution) & set("+-*/") <= set(operators)


def test_difficulty_says_whether_plus_and_minus_suffice():
    assert TASK.difficulty(Problem((79, 60, 17), 36)) == "3 numbers, + and - suffice"
    assert TASK.difficulty(Problem((2, 2, 2, 2), 16)) == "4 numbers, needs * or /"
    assert TASK.solution(Problem((5, 7, 2), 37)) is not None
    assert TASK.solution(Problem((9, 3, 1), 100)) is None


def test_the_papers_accuracies_stand_under_their_token_limits():
    ends = {limit: (points[0], points[-1]) for limit, points in PAPER.items()}
    assert ends == {256: ((0, 0.0), (180, 48.8)), 512: ((0, 11.4), (80, 39.2))}


def test_what_a_recipe_a_file_and_a_user_call_it():
    assert TASK.kind == "countdown"
    assert TASK.problem_from_row(json.loads(TASK.file_format.example)) == Problem((79, 60, 17), 36)
    own_example = TASK.input_format.partition("as in ")[2]
    for line in (own_example, "7, 9, 11 -> 22", " 7,9 11->22 "):
        assert TASK.parse_input(line) == Problem((7, 9, 11), 22)
    assert TASK.parse_input("1 2 3 4 5 999999999 7") == Problem((1, 2, 3, 4, 5, 999_999_999), 7)
    for text in ("9999999990 1 2", "7 x 2", "", "7 -2 5", "٣ 2 5", "² 3 4"):
        with pytest.raises(ValueError, match="type whole numbers and then the target"):
            TASK.parse_input(text)
    for text in ("5 5", "0 3 4"):
        with pytest.raises(ValueError):
            TASK.parse_input(text)


def random_target(numbers: list[int], rng: random.Random) -> int:
    """What random steps make of `numbers`; each result is a whole number from 1 to 1000."""
    while len(numbers) > 1:
        a, b, *rest = rng.sample(numbers, len(numbers))
        results = [value for value in (a + b, a - b, a * b, Fraction(a, b)) if value in range(1, 1001)]
        numbers = [int(rng.choice(results)), *rest] if results else numbers
    return numbers[0]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 99), min_size=2, max_size=4), st.integers(0, 10**6), st.booleans())
def test_every_step_of_a_worked_solution_is_right(numbers, seed, thinking):
    """By evaluating each step, and following which numbers are left after it."""
    rng = random.Random(seed)
    problem = Problem(numbers, random_target(numbers, rng))
    text = worked_solution(TASK, problem, thinking, rng)
    assert score(text, problem, thinking) == CORRECT
    assert ("</think>" in text) == thinking
    attempts = re.findall(r"(.*) (too low|too high|equal)\n", text)
    assert text.startswith("\n".join(map(" ".join, attempts)))
    assert 1 <= len(attempts) <= 4
    assert len(set(attempts)) == len(attempts)
    for steps, verdict in attempts:
        left = [Fraction(number) for number in numbers]
        for expression, result in re.findall(r"(\S+)=(\S+)", steps):
            assert evaluate_expression(expression) == int(result)
            for operand in re.split(r"[-+*/]", expression):
                left.remove(int(operand))
            left.append(Fraction(result))
        [value] = left
        expected = "equal" if value == problem.target else "too low" if value < problem.target else "too high"
        assert verdict == expected
    assert [verdict for _, verdict in attempts].index("equal") == len(attempts) - 1


def test_worked_solutions_vary_in_attempts_and_follow_the_seed():
    problem = Problem((2, 3, 4), 9)

    def written() -> list[str]:
        return [worked_solution(TASK, problem, False, random.Random(seed)) for seed in range(60)]

    texts = written()
    assert texts == written()
    assert {text.count("too") for text in texts} == {0, 1, 2, 3}
    assert len(set(texts)) > 30
    assert len({text.partition("<answer>")[2] for text in texts}) > 1  # more than one way


def test_no_solution_in_whole_steps_means_no_worked_one():
    problem = Problem((3, 3, 8, 8), 24)  # 8 / (3 - 8 / 3) has a step that is not whole
    assert worked_solution(TASK, problem, False, random.Random(0)) is None


@pytest.mark.parametrize(
    "problem",
    [
        Problem((50, 60, 70, 71), 2859),  # 50 * 60 = 3000, 70 + 71 = 141
        Problem((999_999_999, 999_999_998, 7), 8),
    ],
)
def test_a_step_above_a_thousand_is_taken_where_it_is_needed(problem):
    assert score(worked_solution(TASK, problem, False, random.Random(0)), problem, False) == CORRECT

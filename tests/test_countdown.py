"""Countdown: problems, settings, and generator and solver against the plainest possible search."""

import json
import random
import re
from fractions import Fraction
from itertools import permutations, product

import pytest
from helpers import run_command
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Countdown, Problem, evaluate_expression, generate_problems, score, solve
from data.task import CORRECT, split_answer, steps_difficulty, worked_solution
from lab.plots import PAPER

TASK = Countdown()


def every_value(numbers, operators="+-*/", whole_steps=False) -> set[Fraction]:
    """All values that use each number once: replace any two numbers by what they make, again and again."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    values = set()
    for a, b, *rest in permutations(numbers):
        for operator in operators:
            if operator == "/" and (b == 0 or (whole_steps and Fraction(a, b).denominator > 1)):
                continue
            step = {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b) if b else None}[operator]
            values |= every_value((step, *rest), operators, whole_steps)
    return values


def test_a_problem_keeps_its_order_and_its_key_does_not():
    problem = Problem([79, 60, 17], 36)
    assert problem.numbers == (79, 60, 17)
    assert problem.key == Problem((17, 79, 60), 36).key == (36, (17, 60, 79))
    assert problem != Problem((17, 79, 60), 36)
    assert len({problem, Problem((79, 60, 17), 36)}) == 1
    assert TASK.problem_from_row(problem.row()) == problem


@pytest.mark.parametrize(
    ("numbers", "target", "named"), [
        ((5,), 5, r"2 to 6 whole numbers, not \(5,\)"), ((1, 2, 3, 4, 5, 6, 7), 5, "2 to 6"),
        (None, 5, "None"), ("12", 5, "'12'"), ((1, 2.0), 5, "2.0"), ((1, True), 5, "True"),
        ((1, -2), 5, "-2"), ((1, 2), None, "None"), ((1, 2), 0, "not 0"), ((1, 10**9), 5, "1000000000"),
    ],
)  # fmt: skip
def test_what_is_no_problem_is_refused_by_name(numbers, target, named):
    with pytest.raises(ValueError, match=named):
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
    problems = wanted.generate(60, 1)
    assert len({problem.key for problem in problems}) == len(problems) == 60
    assert sum(len(problem.numbers) == 4 for problem in problems) == round(60 * wanted.four_number_share)
    for index, problem in enumerate(problems):
        assert all(wanted.min_number <= number <= wanted.max_number for number in problem.numbers)
        assert wanted.min_target <= problem.target <= wanted.max_target
        if len(problem.numbers) == 3 or index < 5:
            assert problem.target in every_value(problem.numbers, whole_steps=True)
        assert score(f"</think><answer>{solve(problem)}</answer>", problem) == CORRECT


def test_the_generator_reaches_every_problem_its_settings_hold():
    triples = {tuple(sorted(triple)) for triple in product(range(1, 6), repeat=3)}
    expected = {
        (t, triple) for triple in triples for t in range(1, 11) if t in every_value(triple, whole_steps=True)
    }
    problems = Countdown(1, 5, 1, 10, 0.0).generate(len(expected), 0)
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
    ("count", "wanted", "message"),
    [
        (
            1000,
            Countdown(1, 3, 10, 20, 0.0),
            r"only \d+ of 1000 different problems, no more with 3 numbers; ask for fewer",
        ),
        (1, Countdown(1, 2, 5000, 5001, 1.0), "only 0 of 1 different problems, no more with 4 numbers"),
    ],
)
def test_too_few_problems_are_an_error_and_no_endless_loop(count, wanted, message):
    with pytest.raises(ValueError, match=message):
        wanted.generate(count, 0)


@pytest.mark.parametrize(
    ("fields", "named"), [({"min_number": 0}, "min_number 0 "),
     ({"min_number": 100}, "min_number 100 and max_number 99"),
     ({"min_target": 101}, "min_target 101 and max_target 100"),
     ({"four_number_share": 1.5}, "not 1.5"), ({"four_number_share": -0.5}, "not -0.5"),
     ({"four_number_share": float("nan")}, "not nan")],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=named):
        Countdown(**fields)


def test_the_solver_finds_a_solution_exactly_where_there_is_one():
    for numbers, operators in [
        ((3, 3, 8, 8), "+-*/"),  # 24 only through a fraction
        ((2, 7, 7, 40), "+-*/"),
        ((2, 7, 7, 40), "+-"),
        ((2, 3, 5, 7), "*-"),  # without a plus, some targets need a negative step
    ]:
        values = every_value(numbers, operators)
        for target in range(1, 40):
            solution = solve(Problem(numbers, target), operators)
            assert (solution is not None) == (target in values), (numbers, target)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 99), min_size=2, max_size=4),
    st.integers(1, 100),
    st.sampled_from(["+-*/", "+-", "*-"]),
)
def test_a_solution_scores_correct_with_the_operators_asked_for(numbers, target, operators):
    problem = Problem(numbers, target)
    solution = solve(problem, operators)
    if solution is not None:
        assert score(f"</think><answer>{solution}</answer>", problem) == CORRECT
        assert not set(solution) & (set("+-*/") - set(operators))
    elif len(numbers) < 4:
        assert target not in every_value(tuple(numbers), operators)


@pytest.mark.parametrize(
    ("problem", "difficulty"), [(Problem((79, 60, 17), 36), "3 numbers, + and - suffice"),
     (Problem((5, 7, 2), 37), "3 numbers, needs * or /"),
     (Problem((2, 2, 2, 2), 16), "4 numbers, needs * or /"),
     (Problem((9, 3, 1), 100), "3 numbers, needs * or /")],
)  # fmt: skip
def test_difficulty_says_whether_plus_and_minus_suffice(problem, difficulty):
    assert TASK.difficulty(problem) == difficulty
    assert (TASK.solution(problem) is None) == (problem.target == 100)


def test_only_blanks_may_stand_before_an_opened_thinking():
    assert split_answer(" \t\r\n<think>a</think>b<answer>c</answer>", thinking=False) == ("b", "c")
    for before in ("x", "x ", "<", "<think>"):
        assert split_answer(f"{before}<think>a</think>b<answer>c</answer>", thinking=False) is None


def test_difficulty_by_steps():
    expected = ["1 to 2 steps"] * 3 + ["3 to 4 steps"] * 2 + ["5 steps or more"] * 2
    assert [steps_difficulty(steps) for steps in range(7)] == expected


def test_the_papers_accuracies_stand_under_their_token_limits():
    ends = {limit: (points[0], points[-1]) for limit, points in PAPER.items()}
    assert ends == {256: ((0, 0.0), (180, 48.8)), 512: ((0, 11.4), (80, 39.2))}
    assert [sum(map(sum, points)) for points in PAPER.values()] == pytest.approx([1790 + 571.0, 360 + 264.6])


def test_what_a_recipe_a_file_and_a_user_call_it():
    task = Countdown()
    assert task.kind == "countdown"
    assert task.problem_from_row(json.loads(task.file_format.example)) == Problem((79, 60, 17), 36)
    own_example = task.input_format.partition("as in ")[2]
    for line in ("7 9 11 22", "7, 9, 11 -> 22", " 7,9 11->22 ", own_example):
        assert task.parse_input(line) == Problem((7, 9, 11), 22)
    assert len(Problem((1, 2, 3, 4, 5, 6), 7).numbers) == 6
    assert task.parse_input("999999999 1 2").numbers[0] == 999_999_999
    for text in ("9999999990 1 2", "7 x 2", "seven", "", "7 -2 5", "٣ 2 5", "² 3 4"):
        with pytest.raises(ValueError, match="type whole numbers and then the target"):
            task.parse_input(text)
    for text in ("5", "5 5", "0 3 4", "1 2 3 4 5 6 7 8"):
        with pytest.raises(ValueError):
            task.parse_input(text)


def random_target(numbers: list[int], rng: random.Random) -> int:
    """What random steps make of `numbers`; each result is a whole number from 1 to 1000."""
    while len(numbers) > 1:
        a, b, *rest = rng.sample(numbers, len(numbers))
        results = [value for value in (a + b, a - b, a * b, Fraction(a, b)) if value in range(1, 1001)]
        numbers = [int(rng.choice(results)), *rest] if results else numbers
    return numbers[0]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 99), min_size=2, max_size=4), st.integers(0, 10**6), st.booleans())
def test_every_step_of_a_worked_solution_is_right(numbers, seed, thinking):
    """By evaluating each step, and following which numbers are left after it."""
    rng = random.Random(seed)
    problem = Problem(numbers, random_target(numbers, rng))
    text = worked_solution(TASK, problem, thinking, rng)
    assert score(text, problem, thinking) == CORRECT
    assert ("</think>" in text) == thinking
    *attempts, _ = text.partition("</think>")[0].partition("<answer>")[0].strip().split("\n") + [""]
    assert 1 <= len(attempts) <= 4
    assert len(set(attempts)) == len(attempts)
    for attempt in attempts:
        steps, verdict = re.fullmatch(r"(.*?) (too low|too high|equal)", attempt).groups()
        left = [Fraction(number) for number in numbers]
        for expression, result in (step.split("=") for step in steps.split(" ")):
            assert evaluate_expression(expression) == int(result)
            for operand in re.split(r"[-+*/]", expression):
                left.remove(int(operand))
            left.append(Fraction(result))
        [value] = left
        expected = "equal" if value == problem.target else "too low" if value < problem.target else "too high"
        assert verdict == expected
        assert (verdict == "equal") == (attempt == attempts[-1])


def test_worked_solutions_vary_in_attempts_and_follow_the_seed():
    problem = Problem((2, 3, 4), 9)
    texts = [worked_solution(TASK, problem, False, random.Random(seed)) for seed in range(60)]
    assert texts == [worked_solution(TASK, problem, False, random.Random(seed)) for seed in range(60)]
    counts = [text.count("too") for text in texts]
    assert set(counts) == {0, 1, 2, 3}
    assert len(set(texts)) > 30
    assert len({text.partition("<answer>")[2] for text in texts}) > 1  # more than one way


@pytest.mark.parametrize(
    "numbers, target", [((1, 2), 9), ((3, 3, 8, 8), 24)]
)  # 8 / (3 - 8 / 3) has no whole steps
def test_no_solution_in_whole_steps_means_no_worked_one(numbers, target):
    assert worked_solution(TASK, Problem(numbers, target), False, random.Random(0)) is None


def test_a_step_above_a_thousand_is_taken_where_it_is_needed():
    problem = Problem((50, 60, 70, 71), 2859)  # 50 * 60 = 3000, 70 + 71 = 141
    assert "50=3000" in worked_solution(TASK, problem, False, random.Random(0))


def test_large_numbers_have_worked_solutions_too():
    problem = Problem((999_999_999, 999_999_998, 7), 8)
    assert score(worked_solution(TASK, problem, False, random.Random(0)), problem, False) == CORRECT

"""Problems: what counts as one, and the generator and solver against the plainest possible search."""

import random
import subprocess
import sys
from fractions import Fraction
from itertools import permutations, product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Problem, ProblemSettings, evaluate_expression, generate_problems, prompt_text, solve
from data.expression import parse_expression
from data.countdown import score


def every_value(numbers, operators="+-*/", whole_steps=False) -> set[Fraction]:
    """All values that use each number once, by the plainest search: replace any two numbers by what they make."""
    if len(numbers) == 1:
        return {Fraction(numbers[0])}
    found = set()
    for a, b, *rest in permutations(numbers):
        for operator in operators:
            if operator == "/" and (b == 0 or (whole_steps and Fraction(a, b).denominator > 1)):
                continue
            step = {"+": a + b, "-": a - b, "*": a * b, "/": Fraction(a, b) if b else None}[operator]
            found |= every_value((step, *rest), operators, whole_steps)
    return found


def python(code: str) -> str:
    """What `code` prints in a fresh interpreter, where hashes of strings differ and nothing is imported yet."""
    root = Path(__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return ran.stdout.strip()


# Problem


def test_a_problem_keeps_the_order_of_its_numbers_but_its_key_does_not():
    problem = Problem([79, 60, 17], 36)
    assert problem.numbers == (79, 60, 17)
    assert problem.key == Problem((17, 79, 60), 36).key == (36, (17, 60, 79))
    assert problem != Problem((17, 79, 60), 36)
    assert len({problem, Problem((79, 60, 17), 36)}) == 1


@pytest.mark.parametrize(
    ("numbers", "target", "named"),
    [
        ((5,), 5, "not 1"),
        ((1, 2, 3, 4, 5, 6, 7), 5, "not 7"),
        ((1, 2.0), 5, "2.0"),
        ((1, True), 5, "True"),
        ((1, "2"), 5, "'2'"),
        ((1, 0), 5, "not 0"),
        ((1, -2), 5, "-2"),
        ((1, 2), None, "None"),
        ((1, 2), 0, "not 0"),
        ((1, 10**9), 5, "1000000000"),
        (None, 5, "None"),
        ("12", 5, "'12'"),
    ],
)
def test_what_is_no_problem_is_refused_by_name(numbers, target, named):
    with pytest.raises(ValueError, match=named):
        Problem(numbers, target)


def test_the_prompt_is_this_line():
    assert prompt_text(Problem((79, 60, 17), 36)) == (
        "Use each of the numbers 79, 60, 17 exactly once to make 36. Only + - * / and parentheses are allowed. "
        "Work it out inside <think> </think>, then put the final expression inside <answer> </answer>."
    )


# Generator


@pytest.mark.parametrize(
    "wanted", [ProblemSettings(), ProblemSettings(1, 20, 10, 50, 1 / 3), ProblemSettings(2, 6, 1, 12, 0.25)]
)
def test_generated_problems_are_different_in_range_and_solvable_in_whole_steps(wanted):
    problems = generate_problems(60, 1, wanted)
    assert len({problem.key for problem in problems}) == len(problems) == 60
    assert sum(len(problem.numbers) == 4 for problem in problems) == round(60 * wanted.four_number_share)
    for problem in problems:
        assert all(wanted.min_number <= number <= wanted.max_number for number in problem.numbers)
        assert wanted.min_target <= problem.target <= wanted.max_target
        assert len(problem.numbers) == 4 or problem.target in every_value(problem.numbers, whole_steps=True)
        assert score(f"</think><answer>{solve(problem)}</answer>", problem).outcome == "correct"


def test_four_number_problems_too_are_solvable_in_whole_steps():
    for problem in generate_problems(4, 2, ProblemSettings(four_number_share=1.0)):
        assert problem.target in every_value(problem.numbers, whole_steps=True)


def test_the_generator_reaches_every_problem_its_settings_hold():
    triples = {tuple(sorted(triple)) for triple in product(range(1, 6), repeat=3)}
    expected = {(t, triple) for triple in triples for t in range(1, 11) if t in every_value(triple, whole_steps=True)}
    problems = generate_problems(len(expected), 0, ProblemSettings(1, 5, 1, 10, 0.0))
    assert {problem.key for problem in problems} == expected


def test_the_seed_decides_the_problems_and_the_process_does_not():
    code = "from data import generate_problems; print(generate_problems(50, 3))"
    printed = python(code)
    assert printed == str(generate_problems(50, 3)) == str(generate_problems(50, 3))
    assert printed != str(generate_problems(50, 4))


def test_the_generator_leaves_the_global_random_state_alone():
    random.seed(0)
    before = random.getstate()
    generate_problems(10, 0)
    assert random.getstate() == before


def test_settings_that_hold_too_few_problems_are_an_error_and_not_an_endless_loop():
    with pytest.raises(ValueError, match=r"found only \d+ of 1000 different problems with 3 numbers from 1 to 3"):
        generate_problems(1000, 0, ProblemSettings(1, 3, 10, 20, 0.0))
    with pytest.raises(ValueError, match="found only 0 of 1 .* targets from 5000 to 5001"):
        generate_problems(1, 0, ProblemSettings(1, 2, 5000, 5001, 1.0))


def test_no_problems_and_a_negative_count():
    assert generate_problems(0, 0) == []
    with pytest.raises(ValueError, match="-1"):
        generate_problems(-1, 0)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"min_number": 0}, "min_number .* not 0"),
        ({"max_target": 10.5}, "max_target .* not 10.5"),
        ({"min_number": 100}, "min_number 100 is above max_number 99"),
        ({"min_target": 101}, "min_target 101 is above max_target 100"),
        ({"four_number_share": 1.5}, "not 1.5"),
        ({"four_number_share": float("nan")}, "not nan"),
    ],
)
def test_impossible_settings_are_refused_by_name(fields, named):
    with pytest.raises(ValueError, match=named):
        ProblemSettings(**fields)


# Solver


def test_the_solver_finds_a_solution_exactly_where_there_is_one():
    for numbers, operators in [
        ((3, 8, 11), "+-*/"),
        ((1, 1, 2), "+-*/"),
        ((2, 7, 7, 40), "+-*/"),
        ((2, 7, 7, 40), "+-"),
        ((2, 3, 5, 7), "*-"),  # without a plus, some targets need a negative step
    ]:
        values = every_value(numbers, operators)
        for target in range(1, 40):
            solution = solve(Problem(numbers, target), operators)
            assert (solution is not None) == (target in values), (numbers, target)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 99), min_size=2, max_size=4), st.integers(1, 100), st.sampled_from(["+-*/", "+-", "*-"]))
def test_a_solution_always_scores_correct_and_uses_only_the_operators_asked_for(numbers, target, operators):
    problem = Problem(numbers, target)
    solution = solve(problem, operators)
    if solution is not None:
        assert evaluate_expression(solution) == target
        assert sorted(parse_expression(solution).numbers) == sorted(numbers)
        assert score(f"</think><answer>{solution}</answer>", problem).outcome == "correct"
        assert not set(solution) & (set("+-*/") - set(operators))
    elif len(numbers) < 4:
        assert target not in every_value(tuple(numbers), operators)


def test_the_solver_passes_through_fractions():
    assert 24 not in every_value((3, 3, 8, 8), whole_steps=True)
    assert evaluate_expression(solve(Problem((3, 3, 8, 8), 24))) == 24


def test_the_solver_tells_where_plus_and_minus_suffice():
    assert solve(Problem((79, 60, 17), 36), "+-") is not None
    assert solve(Problem((5, 7, 2), 37), "+-") is None
    assert solve(Problem((5, 7, 2), 37)) is not None
    assert solve(Problem((1, 1, 1), 100)) is None


@pytest.mark.parametrize("operators", ["", "+^", "**//%"])
def test_unknown_operators_are_refused(operators):
    with pytest.raises(ValueError, match="operators must be some of"):
        solve(Problem((1, 2), 3), operators)


def test_data_imports_no_torch_model_or_rl():
    heavy = ["torch", "model", "rl", "pyarrow", "huggingface_hub"]
    assert python(f"import sys, data; print([name for name in {heavy} if name in sys.modules])") == "[]"

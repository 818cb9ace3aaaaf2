"""Calculus: derivatives against an independent reference, a strict reading of answers, and the generator."""

import itertools
import random
import re
from fractions import Fraction

import numpy.polynomial.polynomial as reference
import pyarrow
import pyarrow.parquet
import pytest
from helpers import write_jsonl
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import Calculus, DataError
from data.calculus import MAX_COEFFICIENT, MAX_PROBLEM_EXPONENT, Derivative, terms_of, trimmed
from data.calculus import parse_polynomial as parse
from data.calculus import sum_text as text_of
from data.task import CORRECT, WRONG, split_answer, worked_solution

TASK = Calculus()
PROBLEM = Derivative((7, 5, 0, -2, 3))  # 3x^4 - 2x^3 + 5x + 7
POLYNOMIALS = st.lists(st.integers(-999_999, 999_999), min_size=1, max_size=12).map(trimmed).filter(bool)
PROBLEMS = st.builds(Derivative, POLYNOMIALS, st.integers(1, 5))


def answered(content: str) -> str:
    return f"Let me see.</think>\n<answer>{content}</answer>"


def value_at(polynomial, x: Fraction) -> Fraction:
    return sum((coefficient * x**exponent for exponent, coefficient in enumerate(polynomial)), Fraction(0))


def derivative_by_numpy(polynomial, order: int = 1):
    expected = reference.polyder(polynomial, order)  # whole numbers up to 2^53 are exact
    return trimmed(expected.astype(int).tolist())


@pytest.mark.parametrize(
    ("polynomial", "order", "expected", "difficulty"),
    [
        ((7, 5, 0, -2, 3), 1, "12x^3 - 6x^2 + 5", "3 to 4 steps"),
        ((7, 0, -2, 1), 2, "6x - 4", "5 steps or more"),  # 3 terms, then 3x^2 and -4x
        ((0, 0, -1), 2, "-2", "1 to 2 steps"),
        ((7, 1), 3, "0", "3 to 4 steps"),  # 2 terms, then 1, then none
    ],
)
def test_derivatives_and_their_difficulty_by_hand(polynomial, order, expected, difficulty):
    problem = Derivative(polynomial, order)
    assert TASK.solution(problem) == expected
    assert TASK.difficulty(problem) == difficulty


@settings(max_examples=50)
@given(PROBLEMS)
@example(Derivative((0,) * MAX_PROBLEM_EXPONENT + (-MAX_COEFFICIENT,), 5))  # the largest there is
def test_the_derivative_counts_in_any_order_and_no_other_does(problem):
    assert problem.value == derivative_by_numpy(problem.polynomial, problem.order)
    assert TASK.score(answered(TASK.solution(problem)), problem) == CORRECT
    assert TASK.score(answered(text_of(terms_of(problem.value)[::-1])), problem) == CORRECT
    for exponent in (0, 1, 7, 30):
        neighbour = list(problem.value) + [0] * (exponent + 1 - len(problem.value))
        neighbour[exponent] += 1
        text = text_of(terms_of(neighbour))
        assert TASK.score(answered(text), problem) == WRONG


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0x^99", ()), ("-x^1", (0, -1)), ("7", (7,)), ("999999999999999x", (0, 999_999_999_999_999)),
        ("x^99", (0,) * 99 + (1,)),
    ],
)  # fmt: skip
def test_polynomials_by_hand(text, expected):
    assert parse(text) == expected
    assert TASK.score(answered(text), PROBLEM) == WRONG


@pytest.mark.parametrize(
    "text",
    [
        "5 - 6x^2 + 12x^3",
        "+12*x^3 - 6 * x ^ 2 + 5",
        "\n 12x^3 - 6x^2\r\n\t+ 5 ",
        "6x^3 + 6 x^3 - 6x^2 + 5x^0 + x - x",
    ],
)
def test_one_polynomial_in_several_forms(text):
    assert parse(text) == (5, 0, -6, 12)
    assert TASK.score(answered(text), PROBLEM) == CORRECT


SPOILT = (
    "x +, + - x, --x, x x, 2 2x, x2, x^, x^-1, x^007, x^100, x^x, 2^3, x**2, x*2, 2*, 2*3x, (x), x/2, 2.5x, "
    "007, 1e3, X, x², ٣x, −x, x^{2}, 1_0, x = x, x\0, x\u00a0+ 1, x\u2028, 1000000000000000"
)


@pytest.mark.parametrize("text", ["", " ", *SPOILT.split(", "), "x^" + "9" * 200, "x + " * 100 + "x"])
def test_anything_else_is_no_polynomial(text):
    with pytest.raises(ValueError):
        parse(text)
    assert TASK.score(answered(text), PROBLEM) == WRONG


@given(st.text("0123456789x^*+-() \n.²y", max_size=20))
def test_a_text_that_is_read_means_what_python_makes_of_it(text):
    """`x` times a number next to it and `**` for `^`; evaluated at exact rational points."""
    try:
        polynomial = parse(text)
    except ValueError:
        return
    assert re.fullmatch(r"[0-9x^*+\- \t\r\n]+", text)
    python = re.sub(r"([0-9])\s*x", r"\1*x", " ".join(text.split())).replace("^", "**")
    for x in (Fraction(0), Fraction(1), Fraction(-2, 3), Fraction(7, 5)):
        assert eval(python, {"__builtins__": {}}, {"x": x}) == value_at(polynomial, x)


TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
PIECES = ["\n", "12x^3", "-6x^2", "+5", *"5+-x^*0²("]
GROWN = st.lists(st.sampled_from(TAGS + PIECES), max_size=14).map("".join)


@given(GROWN | GROWN.map(answered) | st.text(st.characters(), max_size=200), st.booleans())
def test_no_text_raises_and_only_an_equal_function_is_correct(text, thinking):
    if TASK.score(text, PROBLEM, thinking) == CORRECT:
        _, answer = split_answer(text, thinking)
        assert parse(answer) == (5, 0, -6, 12)


@pytest.mark.parametrize(
    "polynomial", [(0, 0), (1.0, 2), (True, 2), (1_000_000,), (0,) * 31 + (1,), "12", None]
)
def test_what_is_no_polynomial_is_refused(polynomial):
    with pytest.raises(ValueError):
        Derivative(polynomial)


@pytest.mark.parametrize("order", [0, 6, 1.0, True])
def test_what_is_no_order_is_refused(order):
    with pytest.raises(ValueError):
        Derivative((1, 2), order)


def test_problems_as_text():
    assert str(PROBLEM) == "d/dx (3x^4 - 2x^3 + 5x + 7)"
    assert str(Derivative((0, -1, 1), 2)) == "d^2/dx^2 (x^2 - x)"
    for order, times in [(1, "once"), (2, "twice"), (3, "3 times")]:
        prompt = TASK.prompt(Derivative((0, 1, -4), order))
        for part in ("-4x^2 + x", f", {times}.", "<think> </think>", "<answer> </answer>"):
            assert part in prompt


def test_typed_problems():
    assert TASK.parse_input("3x^4 - 2x^3 + 5x + 7") == PROBLEM
    assert TASK.parse_input(" x^2 ; 2 ") == Derivative((0, 0, 1), 2)
    for text in ("", "x^2 + ", "0", "x; 0", "x; two", "x; -1", "x; ²", "x; 11", "x;1;1", "x^50"):
        with pytest.raises(ValueError, match="type a polynomial such as"):
            TASK.parse_input(text)


def test_files_of_problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    problems = TASK.generate(20, seed=3)
    assert TASK.load(write_jsonl(path, [problem.row() for problem in problems])) == problems
    assert TASK.load(write_jsonl(path, [{"polynomial": [1, 2, 3, 0, 0]}])) == [Derivative((1, 2, 3))]
    path.write_text('{"polynomial": [1, 2]}\n{"polynomial": [1], "order": 9}\n')
    with pytest.raises(DataError, match="line 2"):
        TASK.load(str(path))
    with pytest.raises(DataError, match="no dataset on the hub"):
        TASK.load("hub")
    parquet = tmp_path / "problems.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PROBLEM.row()]), parquet)
    assert TASK.load(str(parquet)) == [PROBLEM]


def test_generated_problems_differ_and_fill_the_settings():
    """The seed decides them."""
    task = Calculus(min_terms=2, max_terms=3, max_exponent=4, max_coefficient=5, max_order=2)
    problems = task.generate(1000, seed=0)
    assert problems == task.generate(1000, seed=0) != task.generate(1000, seed=1)
    assert len({problem.key for problem in problems}) == 1000
    polynomials = [terms_of(problem.polynomial) for problem in problems]
    assert set(map(len, polynomials)) == {2, 3}
    coefficients, exponents = zip(*itertools.chain(*polynomials))
    assert set(exponents) == set(range(5))
    assert set(coefficients) == set(range(-5, 6)) - {0}
    assert {problem.order for problem in problems} == {1, 2}
    assert all(problem.value for problem in problems)


def test_a_request_for_more_problems_than_there_are_is_refused():
    few = Calculus(min_terms=1, max_terms=2, max_exponent=1, max_coefficient=1, max_order=1)
    six = {f"d/dx ({text})" for text in ("x", "-x", "x + 1", "x - 1", "-x + 1", "-x - 1")}
    assert set(map(str, few.generate(6, seed=0))) == six
    with pytest.raises(ValueError, match="found only 6 of 7"):
        few.generate(7, seed=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"min_terms": 0},
        {"min_terms": 7},
        {"max_terms": 11},
        {"max_exponent": 31},
        {"max_coefficient": 1_000_000},
        {"max_order": 6},
        {"max_order": 3, "max_exponent": 2},
    ],
)
def test_settings_out_of_bounds_name_the_first_of_these_fields(changes):
    with pytest.raises(ValueError, match=f"^{next(iter(changes))} must be"):
        Calculus(**changes)


@pytest.mark.parametrize("seed", range(20))
def test_a_worked_solution_has_a_right_line_for_every_term(seed):
    """For each derivative that the problem asks for."""
    rng = random.Random(seed)
    problem = TASK.draw(rng)
    text = worked_solution(TASK, problem, False, rng)
    assert TASK.score(text, problem, False) == CORRECT
    blocks = text.partition("<answer>")[0].strip().split("\n\n")
    assert len(blocks) == problem.order
    polynomial = problem.polynomial
    for block in blocks:
        lines = [line.split(" -> ") for line in block.split("\n")]
        assert parse(" + ".join(left for left, _ in lines).replace("+ -", "- ")) == polynomial
        for left, right in lines:
            assert parse(right) == derivative_by_numpy(parse(left))
        polynomial = derivative_by_numpy(polynomial)

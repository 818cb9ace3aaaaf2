"""Calculus: derivatives against an independent reference, a strict reading of answers, and the generator."""

import contextlib
import json
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
from data.task import Score, split_answer, worked_solution

TASK = Calculus()
PROBLEM = Derivative((7, 5, 0, -2, 3))  # 3x^4 - 2x^3 + 5x + 7
RIGHT = "12x^3 - 6x^2 + 5"
RIGHT_VALUE = (5, 0, -6, 12)
POLYNOMIALS = st.lists(st.integers(-999_999, 999_999), min_size=1, max_size=12).map(trimmed).filter(bool)
PROBLEMS = st.builds(Derivative, POLYNOMIALS, st.integers(1, 5))


def answered(content: str) -> str:
    return f"Let me see.</think>\n<answer>{content}</answer>"


def value_at(polynomial, x: Fraction) -> Fraction:
    return sum((coefficient * x**exponent for exponent, coefficient in enumerate(polynomial)), Fraction(0))


@pytest.mark.parametrize(
    ("polynomial", "order", "expected", "difficulty"),
    [
        ((7, 5, 0, -2, 3), 1, "12x^3 - 6x^2 + 5", "3 to 4 steps"),
        ((7, 5, 0, -2, 3), 2, "36x^2 - 12x", "5 steps or more"),  # 4 terms, then 12x^3, -6x^2, 5
        ((0, 0, -1), 2, "-2", "1 to 2 steps"),
        ((7, 1), 3, "0", "3 to 4 steps"),  # 2 terms, then 1, then none
    ],
)
def test_derivatives_and_their_difficulty_by_hand(polynomial, order, expected, difficulty):
    problem = Derivative(polynomial, order)
    assert (TASK.solution(problem), TASK.difficulty(problem)) == (expected, difficulty)


@given(PROBLEMS)
def test_derivatives_are_those_of_numpy(problem):
    expected = reference.polyder(problem.polynomial, problem.order)  # whole numbers up to 2^53 are exact
    assert problem.value == trimmed([int(value) for value in expected])


@given(PROBLEMS)
@example(Derivative((0,) * MAX_PROBLEM_EXPONENT + (-MAX_COEFFICIENT,), 5))  # the largest there is
def test_a_solution_counts_in_any_order_and_no_neighbour_does(problem):
    assert TASK.score(answered(TASK.solution(problem)), problem) == Score(1.0, "correct")
    assert TASK.score(answered(text_of(terms_of(problem.value)[::-1])), problem) == Score(1.0, "correct")
    for exponent in (0, 1, 7, 30):
        neighbour = list(problem.value) + [0] * (exponent + 1 - len(problem.value))
        neighbour[exponent] += 1
        assert TASK.score(answered(text_of(terms_of(tuple(neighbour)))), problem) == Score(0.1, "wrong")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", ()), ("-0", ()), ("x - x", ()), ("0x^99", ()), ("x", (0, 1)), ("-x^1", (0, -1)), ("7", (7,)),
     ("x^0", (1,)),
     ("999999999999999x", (0, 999_999_999_999_999)), ("x^99", (0,) * 99 + (1,)),
     ("12x^3-6x^2+5", RIGHT_VALUE), ("5 - 6x^2 + 12x^3", RIGHT_VALUE),
     ("+12*x^3 - 6 * x ^ 2 + 5", RIGHT_VALUE),
     ("\n 12x^3 - 6x^2\r\n\t+ 5 ", RIGHT_VALUE), ("6x^3 + 6 x^3 - 6x^2 + 5x^0 + x - x", RIGHT_VALUE)],
)  # fmt: skip
def test_polynomials_by_hand(text, expected):
    assert parse(text) == expected
    assert TASK.score(answered(text), PROBLEM).outcome == ("correct" if expected == RIGHT_VALUE else "wrong")


@pytest.mark.parametrize(
    "text",
    ["", " ", "+", "x +", "+ - x", "x + -2x", "--x", "x x", "2 2x", "1 2", "x2", "x^", "x^-1", "x^1.5",
     "x^007", "x^100", "x^x", "2^3",
     "x**2", "x*2", "**x", "2*", "2*3x", "(x)", "2(x)", "x/2", "2.5x", "2,5x", "007", "01x", "1e3", "X", "y",
     "xx", "x²", "٣x", "−x",
     "x^{2}", "1_0", "x = x", "x\x00", "x\u00a0+ 1", "x\u2028", "1000000000000000", "x^" + "9" * 200,
     "x + " * 100 + "x"],
)  # fmt: skip
def test_anything_else_is_no_polynomial(text):
    with pytest.raises(ValueError):
        parse(text)
    assert TASK.score(answered(text), PROBLEM) == Score(0.1, "wrong")


@given(st.text(st.sampled_from("0123456789x^*+-() \n.²y"), max_size=40) | st.text(max_size=40))
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
    verdict, parts, claim = TASK.score(text, PROBLEM, thinking), split_answer(text, thinking), None
    with contextlib.suppress(ValueError):
        claim = parts and parse(parts[1])
    points = [Fraction(numerator, 7) for numerator in range(-6, 9)]
    equal = claim is not None and all(value_at(claim, x) == 12 * x**3 - 6 * x**2 + 5 for x in points)
    assert (verdict.outcome == "correct") == equal


@pytest.mark.parametrize(
    ("polynomial", "order"),
    [((), 1), ((0, 0), 1), ((1.0, 2), 1), ((True, 2), 1), (("1", 2), 1), ((1_000_000,), 1),
     ((0,) * 31 + (1,), 1), ("12", 1), (None, 1),
     (5, 1), ((1, 2), 0), ((1, 2), 6), ((1, 2), 1.0), ((1, 2), True), ((1, 2), None)],
)  # fmt: skip
def test_what_is_no_problem_is_refused(polynomial, order):
    with pytest.raises(ValueError):
        Derivative(polynomial, order)


def test_problems_as_text():
    assert str(PROBLEM) == "d/dx (3x^4 - 2x^3 + 5x + 7)"
    assert str(Derivative((0, -1, 1), 2)) == "d^2/dx^2 (x^2 - x)"
    for order, times in [(1, "once"), (2, "twice"), (3, "3 times")]:
        prompt = TASK.prompt(Derivative((0, 1, -4), order))
        for part in ("-4x^2 + x", f", {times}.", "<think>", "</think>", "<answer>", "</answer>"):
            assert part in prompt
            assert "\n" not in prompt


@given(PROBLEMS)
def test_rows_survive_json_and_trailing_zeros_change_no_problem(problem):
    assert TASK.problem_from_row(json.loads(json.dumps(problem.row()))) == problem
    assert Derivative([*problem.polynomial, 0, 0], problem.order).key == problem.key


def test_typed_problems():
    assert TASK.parse_input("3x^4 - 2x^3 + 5x + 7") == PROBLEM
    assert TASK.parse_input(" x^2 ; 2 ") == Derivative((0, 0, 1), 2)
    for text in (
        "",
        "x^2 + ",
        "0",
        "x; 0",
        "x; 9",
        "x; two",
        "x; -1",
        "x; ²",
        "x; 11",
        "x;1;1",
        "x^50",
        "1, 2, 3",
    ):
        with pytest.raises(ValueError, match="type a polynomial such as"):
            TASK.parse_input(text)


def test_files_of_problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    problems = TASK.generate(20, seed=3)
    assert TASK.load(write_jsonl(path, [problem.row() for problem in problems])) == problems
    path.write_text('{"polynomial": [1, 2]}\n{"polynomial": [1], "order": 9}\n')
    with pytest.raises(DataError, match="line 2"):
        TASK.load(str(path))
    with pytest.raises(DataError, match="no dataset on the hub"):
        TASK.load("hub")
    path, rows = tmp_path / "d.parquet", [{"polynomial": [1, 2, 3], "order": order} for order in (2, 1)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert TASK.load(str(path)) == [Derivative((1, 2, 3), 2), Derivative((1, 2, 3), 1)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows).drop_columns("order"), path)
    assert TASK.load(str(path)) == [Derivative((1, 2, 3))] * 2


def test_generated_problems_differ_and_fill_the_settings():
    """The seed decides them."""
    task = Calculus(min_terms=2, max_terms=3, max_exponent=4, max_coefficient=5, max_order=2)
    problems = task.generate(1000, seed=0)
    assert problems == task.generate(1000, seed=0) != task.generate(1000, seed=1)
    assert len({problem.key for problem in problems}) == 1000
    terms = [terms_of(problem.polynomial) for problem in problems]
    assert {len(each) for each in terms} == {2, 3}
    assert {exponent for each in terms for _, exponent in each} == set(range(5))
    assert {coefficient for each in terms for coefficient, _ in each} == set(range(-5, 6)) - {0}
    assert {problem.order for problem in problems} == {1, 2}
    assert all(problem.value for problem in problems)


def test_a_request_for_more_problems_than_there_are_is_refused():
    few = Calculus(min_terms=1, max_terms=2, max_exponent=1, max_coefficient=1, max_order=1)
    six = {f"d/dx ({text})" for text in ("x", "-x", "x + 1", "x - 1", "-x + 1", "-x - 1")}
    assert set(map(str, few.generate(6, seed=0))) == six
    with pytest.raises(ValueError, match="found only 6 of 7"):
        few.generate(7, seed=0)


@pytest.mark.parametrize(
    "settings", [{"min_terms": 0}, {"min_terms": 4, "max_terms": 3}, {"max_terms": 11}, {"max_exponent": 31},
     {"max_exponent": 0}, {"max_coefficient": 0},
     {"max_coefficient": 1_000_000}, {"max_order": 0}, {"max_order": 6}, {"max_terms": 7, "max_exponent": 5},
     {"max_order": 3, "max_exponent": 2, "max_terms": 3}],
)  # fmt: skip
def test_settings_out_of_bounds_name_the_first_of_these_fields(settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))} must be"):
        Calculus(**settings)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_a_worked_solution_has_a_right_line_for_every_term(seed):
    """For each derivative that the problem asks for."""
    rng = random.Random(seed)
    problem = TASK.draw(rng)
    text = worked_solution(TASK, problem, False, rng)
    assert TASK.score(text, problem, False).outcome == "correct"
    blocks = text.partition("<answer>")[0].strip().split("\n\n")
    assert len(blocks) == problem.order
    polynomial = problem.polynomial
    for block in blocks:
        lines = [line.split(" -> ") for line in block.split("\n")]
        assert parse(" + ".join(left for left, _ in lines).replace("+ -", "- ")) == polynomial
        for left, right in lines:
            assert parse(right) == trimmed(reference.polyder(parse(left)).astype(int).tolist())
        polynomial = trimmed(reference.polyder(polynomial).astype(int).tolist())

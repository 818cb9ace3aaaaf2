"""The expression parser against Python's own grammar, and against text written to break it."""

from fractions import Fraction

import pytest
from fuzz_reward import python_value
from hypothesis import given
from hypothesis import strategies as st

from data.expression import MAX_DEPTH, ExpressionError, evaluate_expression, parse_equation, parse_expression


def parsed(text: str) -> tuple[Fraction, list[int]] | None:
    try:
        expression = parse_expression(text)
    except ExpressionError:
        return None
    return expression.value, list(expression.numbers)


blank = st.sampled_from(["", "", " ", "  ", "\n"])
expressions = st.recursive(
    st.integers(0, 120).map(str),
    lambda inner: st.one_of(
        st.builds("{}{}{}{}{}".format, inner, blank, st.sampled_from("+-*/"), blank, inner),
        st.builds("({}{}{})".format, blank, inner, blank),
        st.builds("-{}{}".format, blank, inner),
    ),
    max_leaves=8,
).filter(lambda text: len(text) < 100)


@given(expressions | st.text("0127+-*/() .\t", max_size=30), st.data())
def test_texts_are_judged_as_python_judges_them(text, data):
    """Expressions and soup, as they are and with one changed character."""
    assert parsed(text) == python_value(text)
    place = data.draw(st.integers(0, len(text)))
    character = data.draw(st.sampled_from(["", *"0127+-*/() ._e="]))
    text = text[:place] + character + text[place + 1 :]
    assert parsed(text) == python_value(text)


@given(st.text(st.characters(), max_size=300))  # surrogates and control characters included
def test_no_text_raises_anything_but_an_expression_error(text):
    for read in (evaluate_expression, parse_expression, parse_equation):
        try:
            read(text)
        except ExpressionError as error:
            assert "\n" not in str(error)
            assert len(str(error)) < 700


def test_values_are_exact_and_numbers_keep_their_order():
    assert type(evaluate_expression("4 / 2")) is Fraction
    assert evaluate_expression("1 / 3 * 3") == 1
    assert evaluate_expression("8 / (3 - 8 / 3)") == 24
    assert evaluate_expression("999999999 * 999999999 + 1") == 999999999**2 + 1
    assert parse_expression("7 - (2 + 7) * 0").numbers == (7, 2, 7, 0)
    assert evaluate_expression("(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH) == 1
    assert evaluate_expression("(1) + " * 40 + "(1)") == 41  # depth is nesting, not the count of parentheses


REFUSED = (
    "99 ** 98 ** 97; 11 // 2 * 5; 11 % 2; 1e9; 2.5 * 10; 0x24; 1_000; +5; ３６; 6²; 6 × 6; 79 − 60; "
    "79\u00a0- 60; 7 9; 2(3); 1 + 2); (); [1 + 2]; 1 +; 79 - 60 = 19; abs(3); os.getcwd(); 36\0; "
    "\ud800; 5 / (3 - 6 / 2); 1234567890"
)
LONG = {
    "10,000 parentheses": "(" * 10_000 + "1" + ")" * 10_000,
    "nesting within the length": "(" * (MAX_DEPTH + 1) + "1" + ")" * (MAX_DEPTH + 1),
    "100,000 digits": "9" * 100_000,
    "a long sum": "1 + " * 100 + "1",
    "a megabyte of blanks": " " * 1_000_000 + "1",
}


@pytest.mark.parametrize("text", ["", *REFUSED.split("; ")])
def test_refused(text):
    with pytest.raises(ExpressionError):
        evaluate_expression(text)


@pytest.mark.parametrize("kind", LONG)
def test_long_texts_are_refused(kind):
    with pytest.raises(ExpressionError):
        evaluate_expression(LONG[kind])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 + 007", r"unexpected '0' at character 5 of '1 \+ 007'"),
        ("(1 + 2", "unexpected end of"),
        ("1 / 0", "division by zero in '1 / 0'"),
    ],
)
def test_the_error_names_the_offending_part(text, message):
    with pytest.raises(ExpressionError, match=message):
        evaluate_expression(text)


def test_an_equation_gives_its_left_side():
    equation = parse_equation(" (79 - 60) + 17 = 36 ")
    assert (equation.value, equation.numbers) == (36, (79, 60, 17))
    assert parse_equation("2 - 5 = -3").value == -3


@pytest.mark.parametrize(
    "text", ["6 * 6", "6 * 6 = 37", "6 * 6 =", "= 36", "6 * 6 = 36 = 36", "6 * 6 == 36", "6 * 6 = 30 + 6",
     "1 / 2 = 0.5", "6 * 6 = 36.", "6 * 6 = 036", "1 / 0 = 0"],
)  # fmt: skip
def test_an_equation_is_one_expression_and_one_right_value(text):
    with pytest.raises(ExpressionError):
        parse_equation(text)

"""Polynomials in x with whole coefficients: exact, and read from text nobody vouches for without `eval`.

A polynomial is the tuple of its coefficients from the constant up, the last of them not zero; `()` is the zero
polynomial. Equal polynomials are equal tuples.

A language model is paid for what this parser accepts, so it accepts little: a sum of terms such as `12x^3`, `12*x^3`,
`x` or `7`, in any order, with blanks between. Like terms add up. Parentheses, fractions, `**` and a second sign
(`+ -2x`) are refused, as are digits outside ASCII. Length, digits and exponents are bounded before any arithmetic
happens; within those bounds the work is linear.
"""

import re

MAX_CHARACTERS = 256
MAX_DIGITS = 15  # of a coefficient
MAX_EXPONENT = 99

Polynomial = tuple[int, ...]

BLANK = r"[ \t\r\n]*"
TERM = re.compile(
    rf"{BLANK}(?P<sign>[+-]?){BLANK}(?=[0-9x])"  # what follows is all optional, but it is not empty
    rf"(?P<coefficient>0|[1-9][0-9]{{0,{MAX_DIGITS - 1}}})?"
    rf"(?P<variable>{BLANK}(?:\*{BLANK})?x(?:{BLANK}\^{BLANK}(?P<exponent>0|[1-9][0-9]?))?)?{BLANK}"
)


class PolynomialError(ValueError):
    """Text that is no polynomial as they are written here. The message quotes the offending part."""


def parse_polynomial(text: str) -> Polynomial:
    """Read `text` as one polynomial: `5 - 2x + 3x^2 - x` is `(5, -3, 3)`. PolynomialError, and nothing else, if it is none."""
    if len(text) > MAX_CHARACTERS:
        raise PolynomialError(f"a polynomial of {len(text)} characters; at most {MAX_CHARACTERS} are read")
    coefficients = [0] * (MAX_EXPONENT + 1)
    position = 0
    while position == 0 or position < len(text):
        term = TERM.match(text, position)
        if term is None or (position > 0 and not term["sign"]):
            raise PolynomialError(f"no term such as 3x^2 at {text[position : position + 20]!r}")
        exponent = int(term["exponent"] or 1) if term["variable"] else 0
        coefficient = int(term["coefficient"] or 1)
        coefficients[exponent] += -coefficient if term["sign"] == "-" else coefficient
        position = term.end()
    return trimmed(coefficients)


def trimmed(coefficients: list[int] | Polynomial) -> Polynomial:
    """The polynomial of these coefficients: zeros at the end say nothing."""
    length = len(coefficients)
    while length and coefficients[length - 1] == 0:
        length -= 1
    return tuple(coefficients[:length])


def differentiate(polynomial: Polynomial) -> Polynomial:
    """The derivative: c x^e becomes c e x^(e - 1)."""
    return tuple(exponent * coefficient for exponent, coefficient in enumerate(polynomial))[1:]


def terms_of(polynomial: Polynomial) -> list[tuple[int, int]]:
    """(coefficient, exponent) of each term that is not zero, the highest exponent first."""
    return [(coefficient, exponent) for exponent, coefficient in enumerate(polynomial) if coefficient][::-1]


def term_text(coefficient: int, exponent: int) -> str:
    """`-6x^2`, `x`, `7` or, whatever the exponent, `0`."""
    if exponent == 0 or coefficient == 0:
        return str(coefficient)
    sign_and_number = {1: "", -1: "-"}.get(coefficient, str(coefficient))
    return f"{sign_and_number}x^{exponent}" if exponent > 1 else f"{sign_and_number}x"


def sum_text(terms: list[tuple[int, int]]) -> str:
    """The terms in their order, zeros left out: `3x^4 - 2x^3 + 5x + 7`; `0` where nothing is left."""
    texts = (term_text(coefficient, exponent) for coefficient, exponent in terms if coefficient)
    return " + ".join(texts).replace("+ -", "- ") or "0"

"""Exact arithmetic on text nobody vouches for: a small parser in place of `eval`.

A language model writes these expressions and is paid for the ones that come out right, so whatever the parser accepts
is what the model learns to write. It therefore accepts little: whole decimal numbers, `+ - * /`, a minus sign,
parentheses and blanks. `2 ** 5`, `11 // 2` and `2.5` are text, not arithmetic. Values are fractions, so `1 / 3 * 3` is
1 and nothing is ever "close enough".

Length, nesting and digits are bounded before any arithmetic happens; within those bounds the work is linear.
"""

from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS = 256
MAX_DEPTH = 32
MAX_DIGITS = 9

DIGITS = "0123456789"
BLANKS = " \t\r\n"


class ExpressionError(ValueError):
    """Text that is not an allowed expression, or has no value. The message quotes the offending part."""


@dataclass(frozen=True)
class Expression:
    """What an expression says: its exact value and the numbers it spent, in order of appearance."""

    value: Fraction
    numbers: tuple[int, ...]

    @property
    def is_number(self) -> bool:
        """True for a lone number, whatever signs or parentheses it wears: an answer that shows no work."""
        return len(self.numbers) == 1


def evaluate_expression(text: str) -> Fraction:
    """The exact value of `text`: `evaluate_expression("(79 - 60) + 17")` is `Fraction(36)`.

    Raises:
        ExpressionError: anything but an expression, an equation with `=` included, and a division by zero.
    """
    return parse_expression(text).value


def parse_expression(text: str) -> Expression:
    """Read `text` as one expression. Raises ExpressionError, and nothing else, on every other string."""
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"expression has {len(text)} characters; at most {MAX_CHARACTERS} are read")
    return _Parser(text).parse()


def parse_equation(text: str) -> Expression:
    """Read `expression = value` and return the expression, once the value has been found right.

    The value is a single number: `79 - 60 + 17 = 36` is an equation, `79 - 60 = 19 + 17 = 36` and `1 + 1 = 3 - 1` are
    not. This is the only place that knows about `=`.

    Raises:
        ExpressionError: no `=`, either side unreadable, a right side that is no number, or a wrong value.
    """
    left, equals, right = text.partition("=")
    if not equals:
        raise ExpressionError(f"no '=' in {_quote(text)}")
    expression, claim = parse_expression(left), parse_expression(right)
    if not claim.is_number:
        raise ExpressionError(f"{_quote(right)} after '=' is not a single number")
    if claim.value != expression.value:
        raise ExpressionError(f"{_quote(left)} does not equal {_quote(right)}")
    return expression


class _Parser:
    """Recursive descent over one string; `position` only moves forward.

    sum = product (("+" | "-") product)*;  product = factor (("*" | "/") factor)*;
    factor = "-" factor | "(" sum ")" | number
    """

    def __init__(self, text: str):
        self.text = text
        self.position = 0
        self.depth = 0
        self.numbers: list[int] = []

    def parse(self) -> Expression:
        value = self._sum()
        if self._peek():
            raise self._unexpected()
        return Expression(value, tuple(self.numbers))

    def _sum(self) -> Fraction:
        value = self._product()
        while (operator := self._peek()) in ("+", "-"):
            self.position += 1
            term = self._product()
            value = value + term if operator == "+" else value - term
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while (operator := self._peek()) in ("*", "/"):
            self.position += 1
            factor = self._factor()
            if operator == "/" and factor == 0:
                raise ExpressionError(f"division by zero in {_quote(self.text)}")
            value = value * factor if operator == "*" else value / factor
        return value

    def _factor(self) -> Fraction:
        opening = self._peek()
        if opening not in ("-", "("):
            return Fraction(self._number())
        if self.depth == MAX_DEPTH:
            raise ExpressionError(f"more than {MAX_DEPTH} levels of parentheses and signs in {_quote(self.text)}")
        self.depth += 1
        self.position += 1
        if opening == "-":
            value = -self._factor()
        else:
            value = self._sum()
            if self._peek() != ")":
                raise self._unexpected()
            self.position += 1
        self.depth -= 1
        return value

    def _number(self) -> int:
        start = self.position
        while self.position < len(self.text) and self.text[self.position] in DIGITS:
            self.position += 1
        digits = self.text[start : self.position]
        if not digits:
            raise self._unexpected()
        if len(digits) > MAX_DIGITS:
            raise ExpressionError(f"number {_quote(digits)} has more than {MAX_DIGITS} digits")
        if digits[0] == "0" and len(digits) > 1:
            raise ExpressionError(f"number {_quote(digits)} has a leading zero")
        self.numbers.append(int(digits))
        return self.numbers[-1]

    def _peek(self) -> str:
        """The next character that is not a blank, without taking it; empty at the end of the text."""
        while self.position < len(self.text) and self.text[self.position] in BLANKS:
            self.position += 1
        return self.text[self.position : self.position + 1]

    def _unexpected(self) -> ExpressionError:
        found = self.text[self.position : self.position + 1]
        what = f"unexpected {found!r} at character {self.position + 1}" if found else "unexpected end"
        return ExpressionError(f"{what} of {_quote(self.text)}")


def _quote(text: str) -> str:
    """`text` in quotes, short enough for one line of an error message."""
    return repr(text if len(text) <= 60 else text[:57] + "...")

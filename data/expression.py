"""Exact arithmetic on untrusted text: a small recursive-descent parser instead of `eval`.

It accepts whole numbers of at most nine digits without leading zeros, `+ - * /`, a unary minus, parentheses
and blanks. Values are fractions, so `1 / 3 * 3` is exactly 1. Length and nesting are bounded.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS = 256
MAX_DEPTH = 32

DIGITS = "0123456789"
BLANKS = " \t\r\n"
NUMBER = re.compile(r"(?:0|[1-9][0-9]{0,8})(?![0-9])")


class ExpressionError(ValueError):
    """The text is not an allowed expression, or has no value. The message quotes the offending part."""


@dataclass(frozen=True)
class Expression:
    value: Fraction
    numbers: tuple[int, ...]  # in order of appearance; a single one, with or without signs, shows no work


def evaluate_expression(text: str) -> Fraction:
    """The exact value: `evaluate_expression("(79 - 60) + 17")` is `Fraction(36)`; else ExpressionError."""
    return parse_expression(text).value


def parse_expression(text: str) -> Expression:
    """Parse `text` as one expression. ExpressionError, and no other exception, if it is none."""
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"expression has {len(text)} characters; at most {MAX_CHARACTERS} are read")
    parser = _Parser(text)
    value = parser.sum()
    if parser.peek():
        raise parser.unexpected()
    return Expression(value, tuple(parser.numbers))


def parse_equation(text: str) -> Expression:
    """Parse `expression = number`, as in `1 + 2 = 3`. ExpressionError if it is none, or the two differ."""
    left, _, right = text.partition("=")
    expression = parse_expression(left)
    number = parse_expression(right)
    if len(number.numbers) > 1 or number.value != expression.value:
        raise ExpressionError(f"the number after '=' is not the value of {left[:60]!r}")
    return expression


class _Parser:
    """sum = product (("+" | "-") product)*;  product = factor (("*" | "/") factor)*;
    factor = "-" factor | "(" sum ")" | number
    """

    def __init__(self, text: str):
        self.text = text
        self.position = 0  # of the next character; only moves forward
        self.depth = 0
        self.numbers: list[int] = []

    def sum(self) -> Fraction:
        value = self.product()
        while (operator := self.peek()) in ("+", "-"):
            self.position += 1
            term = self.product()
            value = value + term if operator == "+" else value - term
        return value

    def product(self) -> Fraction:
        value = self.factor()
        while (operator := self.peek()) in ("*", "/"):
            self.position += 1
            factor = self.factor()
            if operator == "/" and factor == 0:
                raise ExpressionError(f"division by zero in {self.text[:60]!r}")
            value = value * factor if operator == "*" else value / factor
        return value

    def factor(self) -> Fraction:
        opening = self.peek()
        if opening not in ("-", "("):
            number = NUMBER.match(self.text, self.position)
            if number is None:
                raise self.unexpected()
            self.position = number.end()
            self.numbers.append(int(number[0]))
            return Fraction(self.numbers[-1])
        if self.depth == MAX_DEPTH:
            raise ExpressionError(f"more than {MAX_DEPTH} nested parentheses and signs in {self.text[:60]!r}")
        self.depth += 1
        self.position += 1
        if opening == "-":
            value = -self.factor()
        else:
            value = self.sum()
            if self.peek() != ")":
                raise self.unexpected()
            self.position += 1
        self.depth -= 1
        return value

    def peek(self) -> str:
        """Skip blanks and return the next character without consuming it; "" at the end of the text."""
        while self.position < len(self.text) and self.text[self.position] in BLANKS:
            self.position += 1
        return self.text[self.position : self.position + 1]

    def unexpected(self) -> ExpressionError:
        character = self.text[self.position : self.position + 1]
        what = f"unexpected {character!r} at character {self.position + 1}" if character else "unexpected end"
        return ExpressionError(f"{what} of {self.text[:60]!r}")

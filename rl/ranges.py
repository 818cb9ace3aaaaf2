"""The numbers that a recipe's fields may hold, as types: `steps: Count`. `lab.recipe` checks them."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """From `low` (excluded if `above`) to `high`, which stops a typing error before it takes all memory."""

    low: float
    high: float
    above: bool = False

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        start, end = ("above", "and at most") if self.above else ("from", "to")
        return f"{start} {self.low:,g} {end} {self.high:,.12g}"


Count = Annotated[int, Range(1, 1_000_000)]
CountOrZero = Annotated[int, Range(0, 1_000_000)]
Share = Annotated[float, Range(0, 1)]
NonNegative = Annotated[float, Range(0, 1e9)]
Positive = Annotated[float, Range(0, 1e9, above=True)]

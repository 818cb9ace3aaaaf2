"""The numbers that a recipe's fields may hold, as types: `steps: Count`. `lab.recipe` checks them."""

from typing import Annotated

from annotated_types import Interval

Count = Annotated[int, Interval(ge=1, le=1_000_000)]
CountOrZero = Annotated[int, Interval(ge=0, le=1_000_000)]
ZeroToOne = Annotated[float, Interval(ge=0, le=1)]
NonNegative = Annotated[float, Interval(ge=0, le=1e9)]
Positive = Annotated[float, Interval(gt=0, le=1e9)]

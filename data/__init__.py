"""Problems, exact arithmetic and polynomials, a solver, loaders, splits, traces. Knows nothing of models or rewards."""

from data.countdown import Problem, ProblemSettings, generate_problems, prompt_text
from data.expression import Expression, ExpressionError, evaluate_expression, parse_equation, parse_expression
from data.jsonl import DataError
from data.solver import solve
from data.sources import load_problems, split_problems

__all__ = [
    "DataError",
    "Expression",
    "ExpressionError",
    "Problem",
    "ProblemSettings",
    "evaluate_expression",
    "generate_problems",
    "load_problems",
    "parse_equation",
    "parse_expression",
    "prompt_text",
    "solve",
    "split_problems",
]

"""Problems, exact arithmetic and polynomials, a solver, loaders, splits, traces. Knows nothing of models or rewards."""

from data.countdown import Problem, ProblemSettings, generate_problems, prompt_text
from data.expression import ExpressionError, evaluate_expression
from data.jsonl import DataError
from data.solver import solve
from data.sources import load_problems, split_problems

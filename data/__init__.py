"""Tasks: problems, prompts, exact verdicts, a solver, and files of problems and traces."""

from data.calculus import Calculus
from data.countdown import Countdown, Problem, generate_problems, load_problems, prompt_text, score
from data.expression import ExpressionError, evaluate_expression
from data.gsm8k import GSM8K
from data.load import DataError, split_problems
from data.solver import solve

AnyTask = Countdown | GSM8K | Calculus  # a recipe's [task], chosen by its `kind`

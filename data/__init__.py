"""Tasks: problems, prompts, exact verdicts, a solver, and files of problems and traces."""

from data.calculus import Calculus
from data.countdown import Countdown, Problem, solve
from data.expression import ExpressionError, evaluate_expression
from data.gsm8k import GSM8K
from data.load import DataError, split_problems

AnyTask = Countdown | GSM8K | Calculus  # a recipe's [task], chosen by its `kind`

# In short: Countdown with its default settings.
generate_problems = Countdown().generate
load_problems = Countdown().load
score = Countdown().score

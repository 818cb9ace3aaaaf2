"""What is asked and how it is judged: one small file a task. Knows nothing of models and learning."""

from tasks.calculus import Calculus
from tasks.countdown import Countdown
from tasks.gsm8k import GSM8K
from tasks.task import CORRECT, MALFORMED, WRONG, Problem, Score, Task, split_answer

AnyTask = Countdown | GSM8K | Calculus  # what a recipe's [task] may be, by its `kind`

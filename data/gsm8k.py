"""GSM8K: word problems with a number as the answer (arXiv:2110.14168)."""

import random
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from data.load import Format
from data.task import CORRECT, INSIDE, WRONG, AnyProblem, Score, Task, steps_difficulty

MAX_CHARACTERS = 256  # of an answer block
NUMBER = re.compile(  # 18, 1,234, -2.50, .5 or 3/4, but no part of a longer word or number
    r"(?<![\w.,/^:])(?:(?P<minus>-)[\s({]*)?"
    r"(?P<top>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,18})(?:\.[0-9]{1,18})?|\.[0-9]{1,18})"
    r"(?:/(?P<bottom>[0-9]{1,18}))?"
    r"(?![0-9_^:]|[.,][0-9]|/(?![a-z]{2}))",
    re.ASCII | re.IGNORECASE,
)
MINUS = re.compile(r"[\u2010-\u2015\u2212\ufe58\ufe63\uff0d]|\b(?:minus|negative)\s(?=\W*[0-9])")
MARKUP = re.compile(  # currency, and how LaTeX writes blanks, percent, degrees, and words around a number
    r"[$*\u20ac\u00a3]|\\[ %]|\^\{?\\circ\}?"
    r"|\\(?:(?:text|math)(?:bf|it|rm|sf)?|boxed|left|right|displaystyle|q?quad)(?![a-z])"
)
# Whatever changes a number is not calculated here: operators, functions, variables, fractions, factors.
OPERATORS = re.compile(
    r"\\[a-z]|[\u221a-\u221c\u03c0\u00b1\u2030]"
    r"|\b(?:sqrt|root|log|half|twice|double|triple)(?: of)?\W*[0-9.]"
    r"|[0-9.]\s*(?:x|pi|squared|cubed|hal(?:f|ves)|thirds|(?:ten|hundred|thousand)ths)\b"
    r"|\band (?:a|one|three) (?:half|third|quarters?)\b"
    r"|\b(?:dozen|hundred|thousand|million|mil|billion|bn|trillion)s?\b"
    r"|[0-9.](?!(?-i:[Lghlms])\b)[a-z]\b",  # 5n and 5k, but 5g and 5h are a unit
    re.IGNORECASE,
)
MARK = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True)
class WordProblem(AnyProblem):
    """A question, and a worked answer whose last line is `#### number`; else ValueError."""

    question: str
    answer: str

    def __post_init__(self):
        if not (isinstance(self.question, str) and isinstance(self.answer, str) and self.question.strip()):
            raise ValueError("question and answer must be texts")
        if "####" not in self.answer or self.value is None:
            raise ValueError(f"the answer must end in '#### number', not in {self.answer[-40:]!r}")

    @property
    def value(self) -> Fraction:
        return read_number(self.answer.rpartition("####")[2])

    @property
    def key(self) -> str:
        return " ".join(self.question.split())

    def __str__(self) -> str:
        return self.key if len(self.key) <= 60 else self.key[:57] + "..."


@dataclass(frozen=True)
class GSM8K(Task):
    """Word problems; "hub" is the training set, "hub-test" the test set."""

    kind: Literal["gsm8k"] = "gsm8k"

    file_format = Format(
        '{"question": "Ann has 3 apples and eats 1. How many are left?", "answer": "3 - 1 = 2\\n#### 2"}',
        "openai/gsm8k",
        {"hub": "main/train-00000-of-00001.parquet", "hub-test": "main/test-00000-of-00001.parquet"},
    )
    input_format = "a question, # and its answer, as in Ann has 3 apples and eats 1. How many are left? # 2"

    def problem_from_row(self, row: dict) -> WordProblem:
        return WordProblem(row["question"], row["answer"])

    def parse_input(self, text: str) -> WordProblem:
        question, _, number = text.rpartition("#")
        try:
            return WordProblem(question.strip(), f"#### {number.strip()}")
        except ValueError:
            raise ValueError(f"type {self.input_format}") from None

    def prompt(self, problem: WordProblem, thinking: bool = True) -> str:
        return (
            f"{problem.question.strip()}\n"
            f"Work it out{INSIDE * thinking}, then put the number that answers the question, "
            "and nothing else, inside <answer> </answer>."
        )

    def judge(self, before: str, answer: str, problem: WordProblem) -> Score:
        return CORRECT if read_number(answer) == problem.value else WRONG

    def difficulty(self, problem: WordProblem) -> str:
        """By the number of calculations in the worked answer, which GSM8K writes as `<<48/2=24>>`."""
        return steps_difficulty(problem.answer.count("<<"))

    def work_out(self, problem: WordProblem, rng: random.Random) -> tuple[str, str]:
        """The dataset's own worked answer, without its marks for a calculator (`<<48/2=24>>`)."""
        working = problem.answer.rpartition("####")[0]
        return MARK.sub("", working).strip(), self.solution(problem)

    def examples(self, count: int) -> list[WordProblem]:
        if count > len(EXAMPLES):
            raise ValueError(f"gsm8k has {len(EXAMPLES)} examples, not {count}")
        return EXAMPLES[:count]

    def solution(self, problem: WordProblem) -> str:
        return problem.answer.rpartition("####")[2].strip()


def read_number(text: str) -> Fraction | None:
    """The exact value of the only number in a short text, or after its last `=`; None if uncertain.

    `$9,500`, `9{,}500` and `9500.00 dollars` are the same: a unit is ignored. Two numbers such as "5 or 6"
    are none, and neither are `2x` and "5 million".
    """
    if len(text) > MAX_CHARACTERS:
        return None
    text = MARKUP.sub(" ", text.replace("{,}", ","))
    text = MINUS.sub("-", text).rpartition("=")[2]
    numbers = list(NUMBER.finditer(text))
    other_digits = any(letter.isnumeric() for letter in NUMBER.sub("", text))
    if len(numbers) != 1 or other_digits or OPERATORS.search(text):
        return None
    [number] = numbers
    bottom = int(number["bottom"] or 1)
    if bottom == 0:
        return None
    value = Fraction(number["top"].replace(",", "")) / bottom
    return -value if number["minus"] else value


EXAMPLES = [  # of this project, for prompts
    WordProblem(
        "A baker fills 6 trays with 8 rolls each. 11 rolls burn. How many can be sold?",
        "The trays hold 6 * 8 = 48 rolls.\nWithout the burnt ones there are 48 - 11 = 37.\n#### 37",
    ),
    WordProblem(
        "Lena reads 15 pages a day for 4 days, then 20 pages a day for 3 days. How many pages is that?",
        "In the first days she reads 15 * 4 = 60 pages.\nThen she reads 20 * 3 = 60 pages.\n"
        "Together that is 60 + 60 = 120.\n#### 120",
    ),
    WordProblem(
        "A bus ticket costs $3, and a child's ticket half of that. What do 2 adults and 4 children pay?",
        "A child pays 3 / 2 = 1.5.\nThe adults pay 2 * 3 = 6 and the children 4 * 1.5 = 6.\n"
        "Together they pay 6 + 6 = 12.\n#### 12",
    ),
]

"""GSM8K: which number counts, what is a problem, files of them, and a run through the common code."""

import itertools
import random
import re
from dataclasses import replace
from fractions import Fraction

import pyarrow
import pyarrow.parquet
import pytest
from helpers import Hub, smoke
from hypothesis import given
from hypothesis import strategies as st

from data import GSM8K, DataError
from data.gsm8k import WordProblem, read_number
from data.solver import OPERATORS
from data.task import CORRECT, MALFORMED, WRONG, Task, worked_solution
from lab.recipe import load_recipe
from lab.runfolder import RunFolder
from lab.stages import train
from rl.grpo import GRPOStage
from rl.sft import SFTStage

TASK = GSM8K()
EGGS = WordProblem(
    "A hen lays 6 eggs a day.  How many in 3 weeks?", "6*7=<<6*7=42>>42\n42*3=<<42*3=126>>126\n#### 126"
)


@pytest.mark.parametrize(
    "text, value", [
        (" $126. ", 126), ("1,234,567", 1234567), ("2.50", 2.5), ("so 6 * 21 = 126 eggs", 126),
        ("9{,}500 dollars", 9500), (r"\boxed{126}", 126), (r"\frac{5}{2}", 2.5),
        ("\u2212**3**", -3),
        # as people and models write it
        ("2\u00bd", 2.5), ("2 1/2 cups", 2.5), (r"2\frac{1}{2}", 2.5),
        (".5", 0.5), ("\u20135", -5), ("minus $5", -5), ("-(5)", -5),
        (r"$1{,}000\text{ m}$", 1000), (r"50\%", 50),
        # a unit is ignored
        ("18cm", 18), ("60 km/h", 60), ("$5/day", 5), ("24 m^2", 24), ("7\u00a0cm\u00b2", 7), ("5g", 5),
        (r"90^\circ", 90),
        # a factor is not
        ("$18 thousand", 18_000), ("3 dozen eggs", 36), ("1.5k", 1500), ("2 hundred thousand", 200_000),
        (r"5\text{ million}", 5 * 10**6),
    ],
)  # fmt: skip
def test_the_one_number_counts_exactly(text, value):
    assert read_number(text) == value


UNCERTAIN = (
    "12 or 126; 10-3; none; x126; 126x; 1,23; 1 234; 1.2.3; 3:30; 1e9; 1/0; ١٢٦; 3\u20135; \\sqrt{16}; "
    "\u221a16; 2\\pi; 2\u03c0; 5 x; 5n; 5\u00b2; half of 10; 2 thirds; 5 and a half; 5\u4e07"
)


@pytest.mark.parametrize("text", ["", "9" * 19, "1" + " " * 300, *UNCERTAIN.split("; ")])
def test_what_may_mean_something_else_is_no_number(text):
    assert read_number(text) is None


@pytest.mark.parametrize("answer, expected", [("126.0", CORRECT), ("126 or 125", WRONG)])
def test_an_answer_is_right_if_its_one_number_is(answer, expected):
    text = f"6*7</think><answer>{answer}</answer>"
    assert TASK.score(text, EGGS) == expected
    assert TASK.score(text, EGGS, thinking=False) == MALFORMED


@given(st.text(alphabet="0123456789.,-+% x<>answerthink\n", max_size=80))
def test_no_text_raises_and_none_is_right_without_its_number(text):
    for completion in (text, f"</think><answer>{text}</answer>"):
        verdict = TASK.score(completion, EGGS)
        assert verdict.outcome != "correct" or "126" in text


@pytest.mark.parametrize("question, answer", [("q", None), ("q", "4"), ("q", "#### four"), (" ", "#### 4")])
def test_what_is_no_problem_is_refused(question, answer):
    with pytest.raises(ValueError):
        WordProblem(question, answer)


def test_rows_difficulty_and_names():
    assert Task.difficulty(TASK, EGGS) == "all"  # of a task that has no classes
    assert TASK.problem_from_row(EGGS.row()) == EGGS
    assert EGGS.value == 126
    assert TASK.solution(EGGS) == "126"
    assert TASK.difficulty(EGGS) == "1 to 2 steps"
    assert EGGS.key == WordProblem("A hen lays 6 eggs a day. How many in 3\nweeks?", "#### 1").key
    assert str(EGGS) == EGGS.key
    assert len(str(WordProblem("long " * 50, "#### 1"))) == 60
    assert TASK.parse_input("How many? # 4") == WordProblem("How many?", "#### 4")
    with pytest.raises(ValueError, match="type a question"):
        TASK.parse_input("How many?")


def questions(count: int) -> list[dict]:
    return [{"question": f"What is {n} + 5?", "answer": f"#### {n + 5}"} for n in range(count)]


def write_parquet(path, rows: list[dict]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_problems_come_from_parquet_and_a_bad_row_is_named(tmp_path):
    path = tmp_path / "train.parquet"
    write_parquet(path, questions(3))
    assert [problem.row() for problem in TASK.load(str(path))] == questions(3)
    write_parquet(path, [*questions(2), {"question": "q", "answer": "none"}])
    with pytest.raises(DataError, match=r"train\.parquet, row 3: the answer must end in"):
        TASK.load(str(path))
    with pytest.raises(ValueError, match="no generator: take"):
        TASK.generate(3, 0)


def test_training_and_test_set_are_the_hubs_two_files(monkeypatch, tmp_path):
    hub = Hub(tmp_path)
    hub.put_in_place(monkeypatch)
    (tmp_path / "main").mkdir()
    write_parquet(tmp_path / "main/train-00000-of-00001.parquet", questions(2))
    write_parquet(tmp_path / "main/test-00000-of-00001.parquet", questions(3))
    assert len(TASK.load("hub")) == 2
    assert len(TASK.load("hub-test")) == 3
    assert hub.downloads[0][0] == "openai/gsm8k"


def test_a_run_of_grpo_and_sft_goes_through_the_same_code(monkeypatch, tmp_path):
    """The bundled model knows no words, so its verdicts are made up here; everything around them is real."""
    path = tmp_path / "train.parquet"
    write_parquet(path, questions(12))
    grpo = GRPOStage(steps=1, prompts_per_step=2, samples_per_prompt=4, updates_per_step=1)
    sft = SFTStage(epochs=1, traces="worked", max_traces=4)
    options = "--evaluation.problems 2 --evaluation.final-problems 0 --sampling.max-new-tokens 8"
    recipe = smoke("--out", tmp_path / "run", "--problems", path, options)
    recipe = replace(recipe, task=load_recipe("gsm8k")[1].task, stages=(grpo, sft))
    real = GSM8K.score
    verdicts = itertools.cycle([WRONG, CORRECT, CORRECT])

    def score(self, text, problem, thinking=True):
        return real(self, text, problem, thinking) if "</answer>" in text else next(verdicts)

    monkeypatch.setattr(GSM8K, "score", score)
    train(recipe, quiet=True)
    run = RunFolder(recipe.out)
    assert [row["kind"] for row in run.metrics()] == ["grpo", "grpo", "sft"]
    assert run.metrics()[-1]["tokens"] > 0
    assert "paper" not in (run.path / "curve.md").read_text()
    assert "What is" in (run.path / "report.html").read_text()


def test_a_worked_solution_is_the_answer_without_its_marks():
    """The marks are those of the dataset's calculator."""
    text = worked_solution(TASK, EGGS, False, random.Random(0))
    assert text == "6*7=42\n42*3=126\n<answer>126</answer>"


def test_the_examples_for_prompts_are_right_and_there_are_three():
    for problem in TASK.examples(3):
        text = worked_solution(TASK, problem, False, random.Random(0))
        assert TASK.score(text, problem, False) == CORRECT
        sums = re.findall(r"([0-9.]+) ([-+*/]) ([0-9.]+) = ([0-9.]+[0-9]|[0-9])", problem.answer)
        assert len(sums) >= 2
        for a, operator, b, result in sums:
            assert OPERATORS[operator](Fraction(a), Fraction(b)) == Fraction(result)
    with pytest.raises(ValueError, match="gsm8k has 3 examples, not 4"):
        TASK.examples(4)

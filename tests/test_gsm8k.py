"""GSM8K: which number counts, what is a problem, files of them, and a run through the common code."""

import itertools
import random
import re
from dataclasses import replace
from fractions import Fraction

import pyarrow
import pyarrow.parquet
import pytest
from helpers import Hub
from hypothesis import given
from hypothesis import strategies as st

from data import GSM8K, DataError
from data.gsm8k import WordProblem, read_number
from data.load import read_jsonl
from data.solver import OPERATORS
from data.task import CORRECT, MALFORMED, WRONG, Task, worked_solution
from data.traces import Trace, save_traces
from lab.recipe import EvaluationSettings, load_recipe, problems_of
from lab.runfolder import RunFolder
from lab.stages import train
from rl.grpo import GRPOStage
from rl.optimizer import OptimizerSettings
from rl.sft import SFTStage

TASK = GSM8K()
EGGS = WordProblem(
    "A hen lays 6 eggs a day.  How many in 3 weeks?", "6*7=<<6*7=42>>42\n42*3=<<42*3=126>>126\n#### 126"
)


@pytest.mark.parametrize(
    "text, value", [
        (" $126. ", 126), ("-3", -3), ("1,234,567", 1234567), ("2.50", Fraction(5, 2)),
        ("so 6 * 21 = 126 eggs", 126), ("126%", 126), ("(126)", 126), ("9{,}500 dollars", 9500),
        (r"\boxed{126}", 126), (r"\frac{5}{2}", None), ("5/2", Fraction(5, 2)), ("\u2212**3**", -3),
        ("12 or 126", None), ("10-3", None), ("", None), ("none", None), ("x126", None), ("126x", None),
        ("1,23", None), ("1 234", None), ("1.2.3", None), ("3:30", None), ("1e9", None), ("1/0", None),
        ("١٢٦", None), ("9" * 19, None), ("0" * 300 + "1", None), ("1" + " " * 300, None),
        # as people and models write it
        ("2\u00bd", None), ("2 1/2 cups", None), (r"2\frac{1}{2}", None),
        (".5", Fraction(1, 2)), ("\u20135", -5), ("minus $5", -5), ("-(5)", -5), ("3\u20135", None),
        (r"$1{,}000\text{ m}$", 1000), (r"50\%", 50),
        # a unit is ignored
        ("18cm", 18), ("60mph", 60), ("60 km/h", 60), ("$5/day", 5), ("5g", 5), (r"90^\circ", 90),
        ("24 m^2", None), ("7\u00a0cm\u00b2", None),
        # a factor makes it uncertain
        ("5 million", None), ("$18 thousand", None), ("3 dozen eggs", None), ("1.5k", None),
        ("2 hundred thousand", None), (r"5\text{ million}", None), (r"\sqrt{16}", None),
        ("\u221a16", None), (r"2\pi", None), ("2\u03c0", None), ("5 x", None), ("5n", None),
        ("5\u00b2", None), ("half of 10", None), ("2 thirds", None), ("5 and a half", None),
        ("5\u4e07", None),
    ],
)  # fmt: skip
def test_the_one_number_counts_exactly(text, value):
    assert read_number(text) == value


@pytest.mark.parametrize("answer, expected", [("126.0", CORRECT), ("126 or 125", WRONG), ("", WRONG)])
def test_an_answer_is_right_if_its_one_number_is(answer, expected):
    text = f"6*7</think><answer>{answer}</answer>"
    assert TASK.score(text, EGGS) == expected
    assert TASK.score(text, EGGS, thinking=False) == MALFORMED


@given(st.text(alphabet="0123456789.,-+% x<>answerthink\n", max_size=80))
def test_no_text_raises_and_none_is_right_without_its_number(text):
    for completion in (text, f"</think><answer>{text}</answer>"):
        verdict = TASK.score(completion, EGGS)
        assert verdict.outcome != "correct" or "126" in text


def test_what_is_no_problem_is_refused():
    for question, answer in (("q", None), ("q", "4"), ("q", "#### four"), (" ", "#### 4"), (4, "#### 4")):
        with pytest.raises(ValueError):
            TASK.problem_from_row({"question": question, "answer": answer})


def test_rows_difficulty_and_names():
    assert Task.difficulty(TASK, EGGS) == "all"  # of a task that has no classes
    assert TASK.problem_from_row(EGGS.row()) == EGGS
    assert (EGGS.value, TASK.solution(EGGS), TASK.difficulty(EGGS)) == (126, "126", "1 to 2 steps")
    assert EGGS.key == WordProblem("A hen lays 6 eggs a day. How many in 3\nweeks?", "#### 1").key
    assert str(EGGS) == EGGS.key
    assert len(str(WordProblem("long " * 50, "#### 1"))) == 60
    assert TASK.parse_input("How many? # 4") == WordProblem("How many?", "#### 4")
    with pytest.raises(ValueError, match="type a question"):
        TASK.parse_input("How many?")


def questions(count: int) -> list[dict]:
    sums = [(n, n + 1, 2 * n + 1) for n in range(count)]
    return [{"question": f"What is {a} + {b}?", "answer": f"<<{a}+{b}={c}>>\n#### {c}"} for a, b, c in sums]


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
    for source, name, count in (("hub", "train", 2), ("hub-test", "test", 3)):
        write_parquet(tmp_path / f"main/{name}-00000-of-00001.parquet", questions(count))
        assert len(TASK.load(source)) == count
    assert [repository for repository, _ in hub.downloads] == ["openai/gsm8k"] * 2


def test_a_run_of_grpo_and_sft_goes_through_the_same_code(monkeypatch, tmp_path):
    """The bundled model knows no words, so its verdicts are made up here; everything around them is real."""
    path, traces = tmp_path / "train.parquet", tmp_path / "mine.jsonl"
    write_parquet(path, questions(30))
    recipe = load_recipe("gsm8k")[1]
    grpo = GRPOStage(steps=1, prompts_per_step=2, samples_per_prompt=4, updates_per_step=1)
    recipe = replace(
        recipe, model="tiny", problems=str(path), out=str(tmp_path / "run"),
        optimizer=OptimizerSettings(kind="adamw"), sampling=replace(recipe.sampling, max_new_tokens=8),
        evaluation=EvaluationSettings(problems=2, final_problems=0),
        stages=(grpo, SFTStage(epochs=1, traces=str(traces))),
    )  # fmt: skip
    save_traces(
        traces,
        [Trace(p, f"so</think><answer>{TASK.solution(p)}</answer>") for p in problems_of(recipe)[0][:5]],
    )
    real, verdicts = GSM8K.score, itertools.cycle([WRONG, CORRECT, CORRECT])

    def score(self, text, problem, thinking=True):
        return real(self, text, problem, thinking) if "</answer>" in text else next(verdicts)

    monkeypatch.setattr(GSM8K, "score", score)
    train(recipe, quiet=True)
    run = RunFolder(recipe.out)
    assert [row["kind"] for row in run.metrics()] == ["grpo", "grpo", "sft"]
    assert run.metrics()[-1]["tokens"] > 0
    rows = [TASK.problem_from_row(row) for _, row in read_jsonl(run.rollout_files()[0], "")]
    assert len({problem.key for problem in rows}) == 2
    assert "paper" not in (run.path / "curve.md").read_text()
    assert "What is" in (run.path / "report.html").read_text()


def test_a_worked_solution_is_the_answer_without_its_marks():
    """The marks are those of the dataset's calculator."""
    problem = WordProblem(
        "How many?", "He has 48/2 = <<48/2=24>>24.\nThen 24+1 = <<24+1=25>>25 are left.\n#### 25"
    )
    text = worked_solution(GSM8K(), problem, False, random.Random(0))
    assert text == "He has 48/2 = 24.\nThen 24+1 = 25 are left.\n<answer>25</answer>"


def test_the_examples_for_prompts_are_right_and_there_are_three():
    for problem in GSM8K().examples(3):
        text = worked_solution(GSM8K(), problem, False, random.Random(0))
        assert GSM8K().score(text, problem, False).outcome == "correct"
        sums = re.findall(r"([0-9.]+) ([-+*/]) ([0-9.]+) = ([0-9.]+[0-9]|[0-9])", problem.answer)
        assert len(sums) >= 2
        for a, operator, b, result in sums:
            assert OPERATORS[operator](Fraction(a), Fraction(b)) == Fraction(result)
    with pytest.raises(ValueError, match="gsm8k has 3 examples, not 4"):
        GSM8K().examples(4)

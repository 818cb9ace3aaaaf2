"""The seam between Countdown and the trainer, and what all tasks share."""

import pytest

from data import Problem
from data import Countdown
from data.task import CORRECT, Task
from data.task import split_answer, steps_level

TASK = Countdown()


def test_the_papers_accuracies_stand_under_its_limits_of_new_tokens():
    published = TASK.published
    assert {limit: (points[0], points[-1]) for limit, points in published.items()} == {
        256: ((0, 0.0), (180, 48.8)),
        512: ((0, 11.4), (80, 39.2)),
    }


def test_problems_come_from_files_and_rows(tmp_path):
    (tmp_path / "mine.jsonl").write_text('{"numbers": [79, 60, 17], "target": 36}\n')
    problem = Problem((79, 60, 17), 36)
    assert TASK.load(str(tmp_path / "mine.jsonl")) == [problem] == [TASK.problem(problem.row())]


def test_problems_are_drawn_as_the_settings_say_and_the_prompt_states_them():
    problems = Countdown(max_number=7, max_target=12, four_number_share=1.0).generate(20, seed=1)
    assert len(problems) == 20
    for problem in problems:
        assert len(problem.numbers) == 4 and max(problem.numbers) <= 7 and 10 <= problem.target <= 12
        prompt = TASK.prompt(problem)
        assert ", ".join(map(str, problem.numbers)) in prompt and str(problem.target) in prompt


@pytest.mark.parametrize(
    "problem, level",
    [
        (Problem((79, 60, 17), 36), "3 numbers, + and - suffice"),
        (Problem((5, 7, 2), 37), "3 numbers, needs * or /"),
        (Problem((2, 2, 2, 2), 16), "4 numbers, needs * or /"),
        (Problem((9, 3, 1), 100), "3 numbers, needs * or /"),
    ],
)
def test_levels_say_whether_plus_and_minus_suffice_and_solutions_are_correct(problem, level):
    assert TASK.level(problem) == level
    solution = TASK.solution(problem)
    assert (solution is None) == (problem.target == 100)
    assert solution is None or TASK.score(f"</think><answer>{solution}</answer>", problem) == CORRECT


def test_a_task_that_lacks_a_part_is_refused_before_anything_is_asked():
    class Silent(Task):
        kind = "silent"

    with pytest.raises(TypeError, match="generate.*prompt"):
        Silent()
    with pytest.raises(NotImplementedError):
        TASK.read("1")  # Countdown judges by itself, and an answer is never read as nothing in silence


def test_the_default_kind_is_the_one_a_recipe_names():
    assert Countdown().kind == "countdown"


@pytest.mark.parametrize("text", ["7 9 11 22", "7,9,11->22", "7, 9, 11 -> 22"])
def test_a_typed_problem_is_read(text):
    assert TASK.typed_problem(text) == Problem((7, 9, 11), 22)


def test_typed_numbers_have_nine_digits_at_most_and_the_advice_is_an_example():
    assert TASK.typed_problem("999999999 1 999999999").numbers == (999999999, 1)
    with pytest.raises(ValueError, match=f"type whole {TASK.typed}$"):
        TASK.typed_problem("1000000000 1 5")
    assert TASK.typed_problem(TASK.typed.partition("as in ")[2]) == Problem((7, 9, 11), 22)


def test_a_task_judges_as_its_verdict_does_and_takes_the_thinking_as_open():
    text = "so</think><answer>79-60+17</answer>"
    assert TASK.score(text, Problem((79, 60, 17), 36)) == CORRECT
    assert TASK.score(text, Problem((79, 60, 17), 36), thinking=False).outcome == "malformed"


def test_answers_are_the_same_in_any_order_and_differ_by_how_often_a_number_is_used():
    def answer(expression: str):
        return TASK.answer(f"</think><answer>{expression}</answer>", True)

    assert answer("2+5*7") == answer("7*5+2") == (37, (2, 5, 7))
    assert answer("2+2+3") == (7, (2, 2, 3)) != answer("2*2+3-2+2")
    assert answer("none") is None


@pytest.mark.parametrize("before", ["x", "x ", "<"])
def test_only_blanks_may_stand_before_a_thinking_that_the_completion_opens(before):
    assert split_answer(" \t\r\n<think>a</think>b<answer>c</answer>", thinking=False) == ("b", "c")
    assert split_answer(f"{before}<think>a</think>b<answer>c</answer>", thinking=False) is None


def test_levels_by_steps():
    expected = ["1 to 2 steps"] * 3 + ["3 to 4 steps"] * 2 + ["5 steps or more"] * 2
    assert [steps_level(steps) for steps in range(7)] == expected

"""Curated traces: who is chosen, what is refused, and a file that reads back as it was written."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError, Problem
from data.traces import Trace, curate, load_traces, non_latin, save_traces

PROBLEM = Problem((79, 60, 17), 36)
OTHER = Problem((1, 2, 3), 6)


def problem_of(row: dict) -> Problem:
    return Problem(row["numbers"], row["target"])


def always(completion: str, problem: Problem) -> bool:
    return True


def chosen(traces, per_problem=9, limit=99) -> list[str]:
    return [trace.completion for trace in curate(traces, per_problem, limit)]


def test_each_problem_gives_at_most_its_share_the_shortest_first():
    """Numbers in another order are the same problem."""
    problems = [PROBLEM, Problem((17, 60, 79), 36)]
    traces = [Trace(problems[step % 2], "x" * length, step) for step, length in enumerate((5, 3, 4, 3, 6))]
    assert sorted(chosen([*traces, Trace(OTHER, "y" * 9)], per_problem=2)) == ["x" * 3, "x" * 4, "y" * 9]


def test_later_steps_come_first_when_there_are_too_many():
    traces = [Trace(Problem((1, 2, step), 9), f"step {step}", step) for step in (3, 1, 5, 2, 4)]
    assert chosen(traces, limit=3) == ["step 5", "step 4", "step 3"]


def test_traces_in_another_script_are_not_chosen():
    completions = ["so 79-60+17", "所以 79-60+17", "ດັ່ງນັ້ນ"]
    assert chosen([Trace(PROBLEM, completion) for completion in completions]) == completions[:1]


# The last characters end a line for str.splitlines, though not for JSON.
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
LATIN = st.characters(exclude_categories=["Cs"]).filter(lambda character: not non_latin(character))
TEXTS = st.text(LATIN | st.sampled_from(LINE_ENDS + '\t"\\'))


TRACES = st.builds(Trace, st.sampled_from([PROBLEM, OTHER]), TEXTS, st.integers(0, 99))


@settings(max_examples=30, deadline=None)
@given(st.lists(TRACES, min_size=1, max_size=4))
def test_traces_read_back_as_they_were_written(tmp_path_factory, traces):
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    save_traces(path, traces)
    assert load_traces(path, problem_of, always) == traces


def load(tmp_path, *lines: str, is_correct=always):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return load_traces(path, problem_of, is_correct)


GOOD = '{"numbers": [79, 60, 17], "target": 36, "completion": "79-60+17"}'


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"numbers": [79, 60, 17], "target": 36}',
        '{"numbers": [79, 60, 17], "completion": "x"}',
        '{"numbers": [79.0, 60, 17], "target": 36, "completion": "x"}',
        '{"numbers": [79, 60, 17], "target": 36, "completion": 3}',
        '{"numbers": [79, 60, 17], "target": 36, "completion": "x", "step": "1"}',
    ],
)
def test_a_malformed_line_is_refused_by_its_number(tmp_path, line):
    """Blank lines are skipped."""
    assert load(tmp_path, GOOD, "", "  ", GOOD) == [Trace(PROBLEM, "79-60+17")] * 2
    with pytest.raises(DataError, match=r"mine\.jsonl, line 3: (not a trace|not JSON|expected)"):
        load(tmp_path, GOOD, "", line, GOOD)


def test_wrong_and_missing_traces_are_refused(tmp_path):
    wrong = GOOD.replace("79-60+17", "79-60")
    with pytest.raises(DataError, match=r"mine\.jsonl, line 2: does not solve 79, 60, 17 -> 36"):
        load(tmp_path, GOOD, wrong, is_correct=lambda text, problem: text == "79-60+17")
    with pytest.raises(DataError, match=r"mine\.jsonl: no traces"):
        load(tmp_path, "", " ")

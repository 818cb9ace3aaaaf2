"""Reading problems from files and the hub, a split that does not leak, and the order of training problems."""

import json
from itertools import permutations
from unittest import mock

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from helpers import Hub
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError, Problem, generate_problems, load_problems, split_problems
from data.load import endless_problems


def test_parquet_and_jsonl_give_the_rows_in_their_order(tmp_path):
    expected = [Problem((44, 19, 35), 98), Problem((78, 1, 39, 83), 82), Problem((44, 19, 35), 98)]
    rows = [{"numbers": problem.numbers, "target": problem.target, "note": "-"} for problem in expected]
    parquet = tmp_path / "me@home.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), parquet)
    assert load_problems(parquet) == load_problems(str(parquet)) == expected
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("\n\n".join(map(json.dumps, rows)))
    assert load_problems(jsonl) == expected


def test_hub_is_the_published_file_at_the_revision_asked_for(tmp_path, monkeypatch):
    file = "data/train-00000-of-00001.parquet"
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"nums": [[44, 19, 35]], "target": [98]}), tmp_path / file)
    hub = Hub(tmp_path)
    hub.put_in_place(monkeypatch)
    assert load_problems("hub@abc") == [Problem((44, 19, 35), 98)]
    expected = {"allow_patterns": [file], "repo_type": "dataset", "revision": "abc"}
    assert hub.downloads == [("Jiayi-Pan/Countdown-Tasks-3to4", expected)]


def test_no_network_is_one_line_that_names_the_way_out(monkeypatch):
    download = mock.Mock(side_effect=LocalEntryNotFoundError("a long story\nin several lines"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DataError, match="revision v9.* network.* .jsonl") as caught:
        load_problems("hub@v9")
    assert "\n" not in str(caught.value)


def refused(path, message: str) -> None:
    """The file is refused by one line that names it."""
    with pytest.raises(DataError, match=message) as caught:
        load_problems(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


JSONL_ERRORS = {
    "": "holds no problems",
    '{"numbers": [1, 2], "target": 3}\nnumbers\n': "line 2: not JSON",
    "[1, 2, 3]": "line 1: expected",
    '\n{"values": [1, 2], "target": 3}': "line 2: no 'numbers'; expected",
    '{"numbers": [1, 2.5], "target": 3}': "line 1: .* not 2.5",
    "[" * 100_000: "line 1: not JSON",
    '{"numbers": [1, 2], "target": 3, "note": "\\ud800"}': "line 1: not JSON of Unicode",
    '{"numbers": [1, 2], "target": ' + "9" * 5000 + "}": "line 1: not JSON",
}


@pytest.mark.parametrize("content", JSONL_ERRORS, ids=lambda content: content[:30])
def test_a_bad_jsonl_file_is_one_line_with_file_and_line(tmp_path, content):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    refused(path, JSONL_ERRORS[content])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"values": [1, 2], "target": 3}], "row 1: no 'numbers'"),
        ([{"nums": [1, 2], "target": 3}, {"nums": [1, 2], "target": None}], "row 2: .* not None"),
        ([], "no problems"),
    ],
)
def test_a_bad_parquet_file_is_one_line_with_file_and_row(tmp_path, rows, message):
    path = tmp_path / "bad.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    refused(path, message)


def test_a_file_that_is_no_parquet_is_one_line(tmp_path):
    path = tmp_path / "bad.parquet"
    path.write_text("not parquet")
    refused(path, "cannot be read as parquet")


def test_a_source_that_is_none_says_what_would_be_one(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for source, message in [
        (tmp_path / "missing.parquet", "missing.parquet is no file"), (tmp_path / "folder.jsonl", "no file"),
        (tmp_path / "binary.jsonl", "UTF-8"), (tmp_path, "cannot read problems from"),
        ("hbu", "cannot read problems from 'hbu'"), ("problems.csv", "'problems.csv'.*jsonl"),
        ("a.parquet@main", "cannot read problems"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=message):
            load_problems(source)


few_problems = st.lists(
    st.builds(Problem, st.permutations([1, 2, 3, 4]), st.integers(1, 5)), min_size=1, max_size=40
)


@settings(max_examples=50)
@given(few_problems, st.randoms(use_true_random=False), st.data())
def test_a_split_leaks_no_permuted_duplicate(problems, rng, data):
    """It does not depend on the order of rows either."""
    unique = {problem.key for problem in problems}
    held_out = data.draw(st.integers(0, len(unique) - 1))
    train, kept = split_problems(problems, held_out)
    assert len(kept) == held_out
    assert len(train) == len(unique) - held_out
    assert {problem.key for problem in train + kept} == unique
    assert set(train + kept) <= set(problems)
    shuffled = problems + problems[:3]
    rng.shuffle(shuffled)
    assert split_problems(shuffled, held_out) == (train, kept)


def test_the_held_out_problems_are_a_fair_draw():
    """Sorted by target, the held-out set would be the smallest targets."""
    held_out = split_problems(generate_problems(400, 0), 100)[1]
    assert 40 < sum(problem.target for problem in held_out) / 100 < 70
    assert 30 < sum(len(problem.numbers) == 4 for problem in held_out) < 70


def test_too_few_different_problems_to_hold_out_is_an_error():
    twins = [Problem(numbers, 6) for numbers in permutations((1, 2, 3))]
    for problems, count in [(twins, 1), (twins, -1), ([], 0)]:
        with pytest.raises(DataError, match=f"cannot hold out {count} of . different problems"):
            split_problems(problems, count)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 7), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 5))
def test_every_epoch_has_each_problem_once(total, counts, seed):
    """Steps of any size take the same sequence: resuming needs the position alone."""
    problems = [Problem((1, 2), number + 1) for number in range(total)]
    taken = []
    for count in counts:
        taken += endless_problems(problems, seed, len(taken), count)
    assert taken == endless_problems(problems, seed, 0, sum(counts))
    for start in range(0, len(taken) - total + 1, total):
        assert sorted(taken[start : start + total], key=problems.index) == problems


def test_each_epoch_and_each_seed_has_its_own_order():
    problems = [Problem((1, 2), number + 1) for number in range(20)]
    first, second, other = (
        endless_problems(problems, seed, start, 20) for seed, start in [(0, 0), (0, 20), (1, 0)]
    )
    assert problems != first != second != other != first

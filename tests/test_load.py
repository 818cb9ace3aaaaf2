"""Reading problems from files and the hub, a split that does not leak, and the order of training problems."""

import json
from itertools import permutations

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
    rows = [((44, 19, 35), 98), ((78, 1, 39, 83), 82), ((44, 19, 35), 98)]
    expected = [Problem(*row) for row in rows]
    parquet = tmp_path / "me@home.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"nums": [n for n, _ in rows], "target": [t for _, t in rows]}), parquet
    )
    assert load_problems(parquet) == load_problems(str(parquet)) == expected
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("".join(json.dumps({"numbers": n, "target": t, "note": "-"}) + "\n\n" for n, t in rows))
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
    def download(*args, **options):
        raise LocalEntryNotFoundError("a long story\nin several lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DataError) as caught:
        load_problems("hub@v9")
    message = str(caught.value)
    assert "\n" not in message
    assert "revision v9" in message
    assert "network" in message
    assert ".jsonl" in message


JSONL_ERRORS = {
    "empty file": ("", "holds no problems"),
    "no json": ('{"numbers": [1, 2], "target": 3}\nnumbers\n', "line 2: not JSON"),
    "no object": ("[1, 2, 3]", "line 1: expected"),
    "other names": ('\n{"values": [1, 2], "target": 3}', "line 2: no 'numbers'; expected"),
    "a decimal": ('{"numbers": [1, 2.5], "target": 3}', "line 1: .* not 2.5"),
    "endless nesting": ("[" * 100_000, "line 1: not JSON"),
    "half a character": (
        '{"numbers": [1, 2], "target": 3, "note": "\\ud800"}',
        "line 1: not JSON of Unicode",
    ),
    "endless digits": ('{"numbers": [1, 2], "target": ' + "9" * 5000 + "}", "line 1: not JSON"),
}


@pytest.mark.parametrize(("content", "message"), JSONL_ERRORS.values(), ids=JSONL_ERRORS.keys())
def test_a_bad_jsonl_file_is_one_line_with_file_and_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_problems(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_parquet_file_is_one_line_with_file_and_row(tmp_path):
    path = tmp_path / "bad.parquet"
    names = ("nums", "target")
    empty = pyarrow.array([], pyarrow.list_(pyarrow.int64()))
    for table, message in [
        (pyarrow.table([[[1, 2]], [3]], ("values", "target")), "row 1: no 'numbers'"),
        (pyarrow.table([[[1, 2], [1, 2]], [3, None]], names), "row 2: .* not None"),
        (pyarrow.table([empty, []], names), "no problems"),
        (None, "cannot be read as parquet"),
    ]:
        path.write_text("not parquet")
        if table is not None:
            pyarrow.parquet.write_table(table, path)
        with pytest.raises(DataError, match=message) as caught:
            load_problems(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


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


@given(few_problems, st.randoms(use_true_random=False), st.data())
def test_a_split_leaks_no_permuted_duplicate(problems, rng, data):
    """It does not depend on the order of rows either."""
    unique = {problem.key for problem in problems}
    held_out = data.draw(st.integers(0, len(unique) - 1))
    train, kept = split_problems(problems, held_out)
    assert len(kept) == held_out
    assert len(train) == len(unique) - held_out
    assert {problem.key for problem in train} | {problem.key for problem in kept} == unique
    assert set(train) | set(kept) <= set(problems)
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
    with pytest.raises(DataError, match="cannot hold out 1 of 1 different problems"):
        split_problems(twins, 1)
    with pytest.raises(DataError, match="of 0"):
        split_problems([], 0)
    with pytest.raises(DataError, match="-1"):
        split_problems(twins, -1)


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 7), st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(0, 5))
def test_every_epoch_has_each_problem_once(total, counts, seed):
    """Steps of any size take the same sequence: resuming needs the position alone."""
    problems = [Problem((1, 2), number + 1) for number in range(20)]
    some = problems[:total]
    taken = []
    for count in counts:
        taken += endless_problems(some, seed, len(taken), count)
    assert taken == endless_problems(some, seed, 0, sum(counts))
    for start in range(0, len(taken) - total + 1, total):
        assert sorted(taken[start : start + total], key=problems.index) == some
    orders = [
        problems,
        *(endless_problems(problems, s, start, 20) for s, start in ((seed, 0), (seed, 20), (seed + 1, 0))),
    ]
    assert len(set(map(tuple, orders))) == 4  # each epoch and each seed has its own order

"""Reading problems from files and the hub, a split that does not leak, and the order of training problems."""

import json
from itertools import permutations

import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from helpers import Hub
from huggingface_hub.errors import LocalEntryNotFoundError
from hypothesis import given
from hypothesis import strategies as st

from data import DataError, Problem, generate_problems, load_problems, split_problems
from data.load import endless_problems


def write_parquet(path, numbers, targets, names=("nums", "target")):
    pyarrow.parquet.write_table(pyarrow.table({names[0]: numbers, names[1]: targets}), path)
    return path


def test_parquet_and_jsonl_give_the_rows_in_their_order(tmp_path):
    rows = [((44, 19, 35), 98), ((78, 1, 39, 83), 82), ((44, 19, 35), 98)]
    expected = [Problem(*row) for row in rows]
    parquet = write_parquet(tmp_path / "me@home.parquet", [row[0] for row in rows], [row[1] for row in rows])
    assert load_problems(parquet) == load_problems(str(parquet)) == expected
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("".join(json.dumps({"numbers": n, "target": t, "note": "-"}) + "\n\n" for n, t in rows))
    assert load_problems(jsonl) == expected


HUB_FILE = "data/train-00000-of-00001.parquet"


def test_hub_is_the_published_file_at_the_revision_asked_for(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / HUB_FILE, [[44, 19, 35]], [98])
    hub = Hub(tmp_path)
    hub.put_in_place(monkeypatch)
    assert load_problems("hub@abc") == [Problem((44, 19, 35), 98)]
    expected = {"allow_patterns": [HUB_FILE], "repo_type": "dataset", "revision": "abc"}
    assert hub.downloads == [("Jiayi-Pan/Countdown-Tasks-3to4", expected)]


def test_no_network_is_one_line_that_names_the_way_out(monkeypatch):
    def download(*args, **options):
        raise LocalEntryNotFoundError("a long story\nin several lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DataError) as caught:
        load_problems("hub@v9")
    message = str(caught.value)
    assert "\n" not in message and "revision v9" in message and "network" in message and ".jsonl" in message


JSONL_ERRORS = {
    "empty file": ("", "holds no problems"),
    "no json": ('{"numbers": [1, 2], "target": 3}\nnumbers\n', "line 2: not JSON"),
    "no object": ("[1, 2, 3]", "line 1: expected"),
    "other names": ('\n{"nums": [1, 2], "target": 3}', "line 2: 'numbers'; expected"),
    "one number": ('{"numbers": [1], "target": 3}', "line 1: numbers must be a list of 2 to 6"),
    "a decimal": ('{"numbers": [1, 2.5], "target": 3}', "line 1: .* not 2.5"),
    "a text": ('{"numbers": "12", "target": 3}', "line 1: .* not '12'"),
    "endless nesting": ("[" * 100_000, "line 1: not JSON"),
    "half a character": ('{"numbers": [1, 2], "target": 3, "note": "\\ud800"}', "line 1: not JSON of Unicode"),
    "endless digits": ('{"numbers": [1, 2], "target": ' + "9" * 5000 + "}", "line 1: not JSON"),
}


@pytest.mark.parametrize(("content", "message"), JSONL_ERRORS.values(), ids=JSONL_ERRORS.keys())
def test_a_bad_jsonl_file_is_one_line_with_file_and_line(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        load_problems(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_bad_parquet_file_is_one_line_with_file_and_row(tmp_path):
    wrong_names = write_parquet(tmp_path / "a.parquet", [[1, 2]], [3], ("numbers", "target"))
    cases = [
        (wrong_names, r"needs the columns .* not \['numbers', 'target'\]"),
        (write_parquet(tmp_path / "c.parquet", [[1, 2], [1, 2]], [3, None]), "row 2: .* not None"),
        (write_parquet(tmp_path / "d.parquet", [[1.0, 2.0]], [3]), "row 1: .* not 1.0"),
        (write_parquet(tmp_path / "e.parquet", pyarrow.array([], pyarrow.list_(pyarrow.int64())), []), "no problems"),
        (tmp_path / "f.parquet", "cannot be read as parquet"),
    ]
    cases[-1][0].write_text("not parquet")
    for path, message in cases:
        with pytest.raises(DataError, match=message) as caught:
            load_problems(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_source_that_is_none_says_what_would_be_one(tmp_path):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for source, message in [
        (tmp_path / "missing.parquet", "missing.parquet is no file"), (tmp_path / "folder.jsonl", "no file"),
        (tmp_path / "binary.jsonl", "UTF-8"), (tmp_path, "cannot read problems from"), ("hbu", "cannot read problems from 'hbu'"),
        ("problems.csv", "'problems.csv'.*jsonl"), ("hub@", "'hub@' names no revision"), ("a.parquet@main", "cannot read problems"),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=message):
            load_problems(source)


# Splits

few_problems = st.lists(st.builds(Problem, st.permutations([1, 2, 3, 4]), st.integers(1, 5)), min_size=1, max_size=40)


@given(few_problems, st.data())
def test_trap_permuted_duplicates_never_leak_across_a_split(problems, data):
    unique = {problem.key for problem in problems}
    held_out = data.draw(st.integers(0, len(unique) - 1))
    train, kept = split_problems(problems, held_out)
    assert len(kept) == held_out and len(train) == len(unique) - held_out
    assert {problem.key for problem in train} | {problem.key for problem in kept} == unique
    assert set(train) | set(kept) <= set(problems)


@given(few_problems, st.randoms(use_true_random=False))
def test_a_split_depends_on_the_seed_and_not_on_the_order_of_rows(problems, rng):
    unique = len({problem.key for problem in problems})
    shuffled = problems + problems[:3]
    rng.shuffle(shuffled)
    assert split_problems(problems, unique // 2, seed=7) == split_problems(shuffled, unique // 2, seed=7)


def test_the_held_out_problems_are_a_fair_draw_and_another_with_another_seed():
    """Sorted by target and not shuffled, the held-out set would be the smallest targets."""
    problems = generate_problems(400, 0)
    held_out = split_problems(problems, 100)[1]
    assert len({p.key for p in held_out} & {p.key for p in split_problems(problems, 100, seed=1)[1]}) < 60
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


# Training problems


def test_every_epoch_is_a_new_shuffle_of_all_problems_whatever_is_taken_at_once():
    problems = generate_problems(5, 0)
    sequence = endless_problems(problems, seed=1, position=0, count=15)
    epochs = [sequence[start : start + 5] for start in (0, 5, 10)]
    assert all(sorted(epoch, key=str) == sorted(problems, key=str) for epoch in epochs) and epochs[0] != epochs[1]
    assert sequence != endless_problems(problems, seed=2, position=0, count=15)
    taken = [problem for position in range(0, 15, 3) for problem in endless_problems(problems, 1, position, 3)]
    assert taken == sequence

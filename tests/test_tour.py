"""docs/tour.md is what the code prints today, and its numbers fit together."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
PROSE = " ".join(PAGE.split())
ADVICE = "run `python -m docs.make_tour --out docs/tour.md` to update it, and check that its sentences still hold"
NUMBER = re.compile(r"[-+]?\d+\.\d+")


def difference(old: str, new: str) -> str | None:
    """The first paragraph in which two texts differ: in words, in whole numbers, or in decimals by more than their last place.

    Line breaks and the width of columns do not count.
    """
    olds, news = old.split("\n\n"), new.split("\n\n")
    for a, b in zip(olds, news, strict=False):
        words = [" ".join(NUMBER.sub("#", text).split()) for text in (a, b)]
        numbers = zip(NUMBER.findall(a), NUMBER.findall(b), strict=False)
        if words[0] != words[1] or not all(close(x, y) for x, y in numbers):
            return f"{a}\n\nis now\n\n{b}"
    return None if len(olds) == len(news) else f"{len(olds)} paragraphs are now {len(news)}"


def close(a: str, b: str) -> bool:
    places = len(a.partition(".")[2])
    return len(b.partition(".")[2]) == places and abs(float(a) - float(b)) < 1.5 * 10**-places


def rows(first_columns: str, page: str = PAGE) -> list[list[str]]:
    """The rows of the table whose header begins with these words, the columns split at two spaces."""
    block = next(block for block in page.split("```") if " ".join(block.split()).startswith(first_columns))
    return [re.split(r"\s{2,}", line.strip()) for line in block.strip().splitlines()[1:]]


def test_the_page_is_what_the_code_prints(tmp_path):
    command = [sys.executable, "-m", "docs.make_tour", "--out", str(tmp_path / "tour.md")]
    subprocess.run(command, check=True, cwd=ROOT, timeout=120)
    changed = difference(PAGE, (tmp_path / "tour.md").read_text(encoding="utf-8"))
    assert changed is None, f"docs/tour.md is not what the code does now; {ADVICE}.\n\n{changed}"
    assert len(re.findall(r"\? Yes\.", PROSE)) == 5 and "NO" not in PAGE, "a check that the page makes on the way"


def test_a_changed_sentence_or_number_is_seen_and_a_last_digit_is_not():
    text = "The loss is -0.0035.\n\n```\nt  p\n3  0.397\n```"
    assert difference(text, text.replace("-0.0035", "-0.0036").replace("3  0.397", "3   0.398")) is None
    assert difference("a -0.001 b", "a 0.000\nb") is None
    for old, new in (("0.397", "0.399"), ("-0.0035", "0.0035"), ("0.397", "0.39"), ("\n3", "\n4"), ("loss", "gain")):
        assert difference(text, text.replace(old, new)), new
    assert difference(text, text + "\n\nMore.")


def test_the_whole_step_has_the_loss_and_the_gradient_of_the_steps_by_hand():
    """The loss is minus the mean advantage of the tokens."""
    metrics = dict(rows("metric value"))
    loss, norm = re.search(r"= (-?\d\.\d{4})\. It is near zero.*Together they have norm (\d\.\d{3}),", PROSE).groups()
    assert float(metrics["loss"]) == pytest.approx(float(loss), abs=0.0002)
    assert float(metrics["grad_norm"]) == pytest.approx(float(norm), abs=0.001)
    table = [list(map(float, row)) for row in rows("completion advantage tokens")]
    tokens = sum(row[2] for row in table)
    assert all(row[4] == pytest.approx(row[1] / tokens, abs=0.0001) for row in table)
    assert float(loss) == pytest.approx(-sum(row[1] * row[2] for row in table) / tokens, abs=0.0003)
    assert metrics["clip_fraction"] == metrics["log_ratio_std"] == "0.0000", "one update, from the policy that sampled"


def test_the_clipped_tokens_are_those_beyond_the_range_in_the_direction_of_their_advantage():
    table = [list(map(float, row[-4:])) for row in rows("completion t token advantage")]
    for advantage, old, new, ratio in table:
        assert ratio == pytest.approx(math.exp(new - old), abs=0.004)
        assert ratio > 1.25 if advantage > 0 else ratio < 0.75
    above = sum(advantage > 0 for advantage, *_ in table)
    assert above > 0 and f"finds {len(table) - above} below and {above} above" in PROSE


def test_the_sentences_about_single_completions_are_true():
    before, after = (rows("completion tokens", part) for part in PAGE.split("## 6."))
    assert [row[2] for row in before] == ["malformed", "near", "correct", "correct", "malformed", "near"]
    assert [n for n in range(6) if before[n][1] == "64"] == [0, 4] and before[0][-1].endswith("<answer>('")  # "cut off"
    assert all(before[n][-1].startswith("'9*3=27 27+14=41\\n</think>") for n in (1, 5))  # "give up", "misses by one"
    assert all("27+14=41 too low" in after[n][-1] for n in (1, 5))  # "no longer give up"
    assert "9/3=3+14" in after[1][-1] and "14*3=42 too low" in after[5][-1]
    clipped = [row[2] for row in rows("completion t token advantage") if float(row[3]) < 0]
    assert sorted(clipped) == sorted(["'\\n'"] * 3 + ["'+'"] * 2)

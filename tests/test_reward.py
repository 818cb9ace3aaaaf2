"""The table of rewards, every shortcut a policy has been seen to take to it, and a fuzz with a second reading."""

import time

import pytest
from fuzz_reward import fuzz
from hypothesis import given
from hypothesis import strategies as st

from data import Problem, score
from data.task import Score
from lab.evaluate import OUTCOMES

PROBLEM = Problem((79, 60, 17), 36)
RIGHT = "(79 - 60) + 17"
EQUATION = "(79 - 60) + 17 = 36"


def answered(content: str, thoughts: str = "Let me see.") -> str:
    return f"{thoughts}</think>\n<answer>{content}</answer>"


def outcome(text: str, problem: Problem = PROBLEM, thinking: bool = True) -> str:
    return score(text, problem, thinking).outcome


# The table of rewards


@pytest.mark.parametrize("content", [RIGHT, f"\n  {RIGHT}\r\n", "-60 + 79 - -17", EQUATION])
def test_the_right_expression_earns_one(content):
    assert score(answered(content), PROBLEM) == Score(1.0, "correct")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (36, Score(1.0, "correct")),
        (37, Score(0.75, "near")),
        (35, Score(0.75, "near")),
        (38, Score(0.7, "near")),
        (41, Score(0.55, "near")),
        (45, Score(0.35, "near")),
        (46, Score(0.3, "near")),
        (26, Score(0.3, "near")),
        (47, Score(0.1, "wrong")),
        (25, Score(0.1, "wrong")),
    ],
)
def test_a_miss_earns_less_with_distance_and_nothing_extra_beyond_ten(target, expected):
    assert score(answered(RIGHT), Problem((79, 60, 17), target)) == expected


def test_distance_is_exact_so_a_tiny_miss_is_no_hit_and_ten_and_a_bit_is_no_near():
    assert score(answered("1 / 2 + 36"), Problem((1, 2, 36), 36)) == Score(0.775, "near")
    verdict = score(answered("1 / 999999999 + 36"), Problem((1, 999999999, 36), 36))
    assert verdict.outcome == "near" and verdict.reward == pytest.approx(0.8)
    assert outcome(answered("1 / 3 * 3"), Problem((1, 3, 3), 1)) == "correct"
    assert outcome(answered("1 / 999999999 + 46"), Problem((1, 999999999, 46), 36)) == "wrong"


# Arithmetic that is not allowed, or not with these numbers


@pytest.mark.parametrize(
    "content",
    ["", "no idea", "79 - 60 + 17 + 0", "79 - 60 + 17 + 17 - 17", "79 - 60 + 17 * 1", "19 + 17", "7 9 - 60 + 17", "79 - 60", "36",
     "(36)", "36 = 36", "79 - 60 + 17.0", "79 - 060 + 17", "７９ - 60 + 17", "79 − 60 + 17", "79 - 60 +17 # yes",
     "Fraction(79) - 60 + 17", "79 - 60 + 17 = 37", "79 - 60 + 17 = 36 = 36", "36 = 79 - 60 + 17", "79 - 60 = 19 + 17 = 36",
     f"{RIGHT}, or {RIGHT}", f"<b>{RIGHT}</b>", f"${RIGHT}$", f"{RIGHT}</think>", "(" * 10_000 + RIGHT + ")" * 10_000,
     "9" * 100_000, "79 / (60 - 60) + 17"],
)  # fmt: skip
def test_missing_extra_reused_or_unreadable_numbers_are_wrong(content):
    assert score(answered(content), PROBLEM) == Score(0.1, "wrong")


@pytest.mark.parametrize(
    ("content", "problem"),
    [("2 ** 5", Problem((2, 5), 32)), ("11 // 2 * 5", Problem((11, 2, 5), 25)), ("2.5 * 10", Problem((2, 5, 10), 25)),
     ("99 ** 98 ** 97", Problem((99, 98, 97), 36)), ("1e9", Problem((1, 9), 10)), ("5 / (3 - 3)", Problem((5, 3, 3), 5)),
     ("7 + 7", Problem((7, 2), 14)), ("7 * 2", Problem((7, 7, 2), 14))],
)  # fmt: skip
def test_trap_arithmetic_that_peers_paid_for_or_hung_on(content, problem):
    assert score(answered(content), problem) == Score(0.1, "wrong")


# `= value` and bare numbers


def test_a_trailing_right_value_is_allowed_near_the_target_too():
    assert score(answered(EQUATION), Problem((79, 60, 17), 38)) == Score(0.7, "near")
    assert outcome(answered("(79 - 60) + 17 = 38"), Problem((79, 60, 17), 38)) == "wrong"


@pytest.mark.parametrize("before", ["", "So: ", "That gives ", "First 79 - 60 = 19.\n", "Done. ", "Now, ", "so ", "x so ", "max ",
                                    "thus; ", "3 numbers: ", "  "])  # fmt: skip
@pytest.mark.parametrize("after", [" ", "", "\n\n"])
def test_a_bare_number_counts_right_after_an_equation_that_earned_it(before, after):
    assert outcome(f"hm</think>{before}{EQUATION}{after}<answer>36</answer>") == "correct"


@pytest.mark.parametrize(
    "before",
    ["", "36 = 36", "79 - 60 = 19", RIGHT, f"{EQUATION}, so", f"{EQUATION}\nso", f"{EQUATION}\n36", "79 - 60 + 17 = 37",
     "79 + 17 + 60 = 156", f"2 ** {EQUATION}", "2.79 - 60 + 17 = 36", "2^79 - 60 + 17 = 36", "3 x 79 - 60 + 17 = 36",
     "x 79 - 60 + 17 = 36", "a79 - 60 + 17 = 36", "50% 79 - 60 + 17 = 36"],
)  # fmt: skip
def test_trap_the_target_copied_from_the_prompt_earns_a_tenth(before):
    assert score(f"hm</think>{before} <answer>36</answer>", PROBLEM) == Score(0.1, "wrong")


def test_a_bare_number_must_be_the_value_of_an_equation_after_the_thinking():
    assert outcome(answered("36", thoughts=EQUATION)) == "wrong"
    near = Problem((79, 60, 17), 38)
    assert score(f"</think>{EQUATION} <answer>36</answer>", near) == Score(0.7, "near")
    assert score(f"</think>{EQUATION} <answer>38</answer>", near) == Score(0.1, "wrong")


# Where the block stands

MALFORMED = {
    "empty": "",
    "no block": f"hm</think> {RIGHT}",
    "thinking never closed": f"<answer>{RIGHT}</answer>",
    "thinking closed after the block": f"hm <answer>{RIGHT}</answer></think>",
    "thinking closed twice": f"hm</think>hm</think><answer>{RIGHT}</answer>",
    "thinking opened again": f"<think>hm</think><answer>{RIGHT}</answer>",
    "two blocks": answered(RIGHT) + f"<answer>{RIGHT}</answer>",
    "a second block in a second thinking": answered(RIGHT) + f"<think><answer>{RIGHT}</answer></think>",
    "nested blocks": answered(f"<answer>{RIGHT}</answer>"),
    "an opening tag after the block": answered(RIGHT) + "<answer>",
    "a closing tag after the block": answered(RIGHT) + "</answer>",
    "a closing tag before the block": f"hm</think></answer><answer>{RIGHT}</answer>",
    "the wrong way round": f"hm</think></answer>{RIGHT}<answer>",
    "cut off in the block": f"hm</think><answer>{RIGHT}",
    "a block across the end of the thinking": f"hm<answer></think>{RIGHT}</answer>",
    "blanks in the tag": f"hm</think>< answer >{RIGHT}</ answer >",
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(text):
    assert score(text, PROBLEM) == Score(0.0, "malformed")


def test_trap_a_block_inside_the_thinking_never_pays_whatever_the_final_one_says():
    assert outcome(f"try <answer>{RIGHT}</answer></think>") == "malformed"
    assert outcome(answered("79 + 60 + 17", thoughts=f"<answer>{RIGHT}</answer>")) == "malformed"
    assert outcome(answered(RIGHT, thoughts="<answer>79 + 60 + 17</answer>")) == "malformed"


@pytest.mark.parametrize("thoughts", ["it goes in <answer> tags", "ends with </answer>", "</answer> and <answer>"])
def test_a_lone_answer_tag_in_the_thinking_is_talk_about_the_format(thoughts):
    assert outcome(answered(RIGHT, thoughts)) == "correct"


@pytest.mark.parametrize("after", [" I hope this helps.", "\n36", "<|im_end|>", "</think>", "<think>", "<answer"])
def test_text_after_the_block_does_not_change_the_verdict(after):
    assert outcome(answered(RIGHT) + after) == "correct"
    assert outcome(answered("36") + after) == "wrong"


def test_without_thinking_a_completion_may_open_its_own_at_its_beginning_and_is_then_held_to_it():
    assert outcome(f"<answer>{RIGHT}</answer>", thinking=False) == "correct"
    assert outcome(f"{EQUATION} <answer>36</answer>", thinking=False) == "correct"
    assert outcome("<think>" + answered(RIGHT), thinking=False) == "correct"
    assert outcome("\n <think>" + answered(RIGHT), thinking=False) == "correct"
    assert outcome(f"<think><answer>{RIGHT}</answer>", thinking=False) == "malformed"
    assert outcome("<think>" + answered(RIGHT, f"<answer>{RIGHT}</answer>"), thinking=False) == "malformed"
    assert outcome(answered(RIGHT), thinking=False) == "malformed"
    assert outcome("Well. <think>" + answered(RIGHT), thinking=False) == "malformed"


# Hostile input


@given(st.text(st.characters(), max_size=200), st.booleans())
def test_no_text_raises(text, thinking):
    for completion in (text, answered(text), f"</think>{text}<answer>36</answer>"):
        verdict = score(completion, PROBLEM, thinking)
        assert 0.0 <= verdict.reward <= 1.0


HOSTILE = {
    "opening tags": "<answer>" * 12_500,
    "think tags": "<think></think>" * 7_000,
    "parentheses": answered("(" * 100_000),
    "digits": answered("9" * 100_000),
    "blanks": answered(" " * 100_000),
    "operators before a bare number": "</think>" + "1+" * 50_000 + "1 = 36<answer>36</answer>",
    "lines before a bare number": "</think>" + "1 \n" * 33_000 + "<answer>36</answer>",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hundred_kilobytes_of_spite_take_no_time_and_earn_no_reward(text):
    start = time.perf_counter()
    assert score(text, PROBLEM).reward <= 0.1
    assert time.perf_counter() - start < 1.0


def test_a_short_fuzz_finds_no_exception_no_slow_text_and_no_undeserved_reward():
    """tests/fuzz_reward.py does the same with as many texts as one likes."""
    found = fuzz(20_000, seed=1)
    assert sum(found.values()) == 20_000 and min(found[outcome] for outcome in OUTCOMES) > 50

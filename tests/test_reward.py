"""The table of rewards, every shortcut that a policy has been seen to take, and a short fuzz."""

import time

import pytest
from fuzz_reward import fuzz

from data import Problem, score
from data.task import Score
from lab.evaluate import OUTCOMES

PROBLEM = Problem((79, 60, 17), 36)
NEAR = Problem((79, 60, 17), 38)
RIGHT = "(79 - 60) + 17"
EQUATION = "(79 - 60) + 17 = 36"


def answered(content: str, thoughts: str = "Let me see.") -> str:
    return f"{thoughts}</think>\n<answer>{content}</answer>"


def outcome(text: str, problem: Problem = PROBLEM, thinking: bool = True) -> str:
    return score(text, problem, thinking).outcome


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
def test_a_miss_earns_less_with_distance_up_to_ten(target, expected):
    """Beyond ten it earns nothing extra."""
    assert score(answered(RIGHT), Problem((79, 60, 17), target)) == expected


def test_distance_is_exact():
    """A tiny miss is no hit, and ten and a bit is no near miss."""
    assert score(answered("1 / 2 + 36"), Problem((1, 2, 36), 36)) == Score(0.775, "near")
    verdict = score(answered("1 / 999999999 + 36"), Problem((1, 999999999, 36), 36))
    assert verdict.outcome == "near"
    assert verdict.reward == pytest.approx(0.8)
    assert outcome(answered("1 / 3 * 3"), Problem((1, 3, 3), 1)) == "correct"
    assert outcome(answered("1 / 999999999 + 46"), Problem((1, 999999999, 46), 36)) == "wrong"


@pytest.mark.parametrize(
    "content",
    ["", "no idea", "79 - 60 + 17 + 0", "79 - 60 + 17 + 17 - 17", "79 - 60 + 17 * 1", "19 + 17", "79 - 60",
     "7 9 - 60 + 17", "36", "(36)", "36 = 36", "79 - 60 + 17.0", "79 - 060 + 17", "７９ - 60 + 17",
     "79 − 60 + 17", "79 - 60 + 17 = 37", "79 - 60 + 17 = 36 = 36", "36 = 79 - 60 + 17",
     "79 - 60 = 19 + 17 = 36", f"{RIGHT}, or {RIGHT}", f"${RIGHT}$", f"{RIGHT}</think>",
     "79 / (60 - 60) + 17"],
)  # fmt: skip
def test_missing_extra_reused_or_unreadable_numbers_are_wrong(content):
    assert score(answered(content), PROBLEM) == Score(0.1, "wrong")


@pytest.mark.parametrize(
    ("content", "numbers", "target"),
    [("11 // 2 * 5", (11, 2, 5), 25), ("2.5 * 10", (2, 5, 10), 25), ("99 ** 98 ** 97", (99, 98, 97), 36),
     ("1e9", (1, 9), 10), ("7 + 7", (7, 2), 14), ("7 * 2", (7, 7, 2), 14)],
)  # fmt: skip
def test_trap_arithmetic_that_peers_paid_for_or_hung_on(content, numbers, target):
    assert score(answered(content), Problem(numbers, target)) == Score(0.1, "wrong")


@pytest.mark.parametrize(
    "before", ["", "So: ", "First 79 - 60 = 19.\n", "Done. ", "Now, ", "x so ", "thus; ", "3 numbers: "]
)
def test_a_bare_number_counts_after_its_equation(before):
    for after in (" ", "", "\n\n"):
        assert outcome(f"hm</think>{before}{EQUATION}{after}<answer>36</answer>") == "correct"


@pytest.mark.parametrize(
    "before",
    ["", "36 = 36", "79 - 60 = 19", RIGHT, f"{EQUATION}, so", f"{EQUATION}\nso", f"{EQUATION}\n36",
     "79 - 60 + 17 = 37", "79 + 17 + 60 = 156", f"2 ** {EQUATION}", "2.79 - 60 + 17 = 36",
     "2^79 - 60 + 17 = 36", "3 x 79 - 60 + 17 = 36", "a79 - 60 + 17 = 36", "50% 79 - 60 + 17 = 36"],
)  # fmt: skip
def test_trap_the_target_copied_from_the_prompt_earns_a_tenth(before):
    assert score(f"hm</think>{before} <answer>36</answer>", PROBLEM) == Score(0.1, "wrong")


def test_a_value_must_be_that_of_its_expression():
    """A trailing value and a bare number alike, near the target too."""
    assert score(answered(EQUATION), NEAR) == Score(0.7, "near")
    assert outcome(answered("(79 - 60) + 17 = 38"), NEAR) == "wrong"
    assert outcome(answered("36", thoughts=EQUATION)) == "wrong"  # it must come after the thinking
    assert score(f"</think>{EQUATION} <answer>36</answer>", NEAR) == Score(0.7, "near")
    assert score(f"</think>{EQUATION} <answer>38</answer>", NEAR) == Score(0.1, "wrong")


MALFORMED = {
    "no block": f"hm</think> {RIGHT}",
    "thinking never closed": f"<answer>{RIGHT}</answer>",
    "thinking closed twice": f"hm</think>hm</think><answer>{RIGHT}</answer>",
    "thinking opened again": f"hm<think>hm</think><answer>{RIGHT}</answer>",
    "two blocks": answered(RIGHT) + f"<answer>{RIGHT}</answer>",
    "a second block in a second thinking": answered(RIGHT) + f"<think><answer>{RIGHT}</answer></think>",
    "nested blocks": answered(f"<answer>{RIGHT}</answer>"),
    "an opening tag after the block": answered(RIGHT) + "<answer>",
    "a closing tag after the block": answered(RIGHT) + "</answer>",
    "a closing tag before the block": f"hm</think></answer><answer>{RIGHT}</answer>",
    "a block across the end of the thinking": f"hm<answer></think>{RIGHT}</answer>",
    "blanks in the tag": f"hm</think>< answer >{RIGHT}</ answer >",
    "right in the thinking, wrong after it": answered("79 + 60 + 17", f"<answer>{RIGHT}</answer>"),
    "wrong in the thinking, right after it": answered(RIGHT, "<answer>79 + 60 + 17</answer>"),
}


@pytest.mark.parametrize("text", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(text):
    assert score(text, PROBLEM) == Score(0.0, "malformed")


@pytest.mark.parametrize(
    "thoughts", ["it goes in <answer> tags", "ends with </answer>", "</answer> and <answer>"]
)
def test_a_lone_answer_tag_in_the_thinking_does_no_harm(thoughts):
    """It is talk about the format."""
    assert outcome(answered(RIGHT, thoughts)) == "correct"


@pytest.mark.parametrize(
    "after", [" I hope this helps.", "\n36", "<|im_end|>", "</think>", "<think>", "<answer"]
)
def test_text_after_the_block_does_not_change_the_verdict(after):
    assert outcome(answered(RIGHT) + after) == "correct"
    assert outcome(answered("36") + after) == "wrong"


def test_a_completion_that_opens_its_thinking_is_held_to_it():
    """It may do so at its beginning only."""
    thought = answered(RIGHT)
    block = f"<answer>{RIGHT}</answer>"
    assert outcome("\n<think>" + thought) == "correct"  # as some models do though the prompt has opened it
    for text in (block, f"{EQUATION} <answer>36</answer>", f"<think>{thought}", f"\t\r\n <think>{thought}"):
        assert outcome(text, thinking=False) == "correct"
    for text in (f"<think>{block}", "<think>" + answered(RIGHT, block), thought, f"Well. <think>{thought}"):
        assert outcome(text, thinking=False) == "malformed"


@pytest.mark.parametrize(
    "text",
    [
        "<answer>" * 12_500,
        "<think></think>" * 7_000,
        answered("(" * 100_000),
        answered("9" * 100_000),
        answered(" " * 100_000),
        "</think>" + "1+" * 50_000 + "1 = 36<answer>36</answer>",
        "</think>" + "1 \n" * 33_000 + "<answer>36</answer>",
    ],
    ids=range(7),
)
def test_spite_of_100_kilobytes_takes_no_time_and_earns_nothing(text):
    start = time.perf_counter()
    assert score(text, PROBLEM).reward <= 0.1
    assert time.perf_counter() - start < 1.0


def test_a_short_fuzz_finds_no_fault():
    """tests/fuzz_reward.py does the same with as many texts as one likes."""
    found = fuzz(3_000, seed=1)
    assert sum(found.values()) == 3_000
    assert min(found[outcome] for outcome in OUTCOMES) > 10

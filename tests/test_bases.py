"""What the bundled models' bases are trained on: attempts without a solution, derivations with mistakes."""

import functools
import itertools
import random
import re
from collections import Counter
from fractions import Fraction

import pytest

from data import Countdown, evaluate_expression
from data.calculus import differentiate, parse_polynomial, term_text, terms_of
from experiments.bases.attempts import (
    ATTEMPTS,
    BETWEEN,
    FIRST_RAMBLING,
    MORE_RAMBLING,
    RAMBLING,
    all_attempts,
    attempts_document,
    comparison_document,
    comparison_prompt,
    hopeless_problem,
)
from experiments.bases.attempts import WELL_FORMED_SHARE as TAGGED
from experiments.bases.derivations import (
    RIGHT_SHARE,
    WELL_FORMED_SHARE,
    derivation_document,
    right_step,
    wrong_steps,
)
from experiments.bases.train import TINY_CALCULUS
from lab.recipe import load_recipe
from model import Tokenizer
from model.weights import BUNDLED
from rl import score

STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")
SETTINGS = Countdown(max_number=20, max_target=50, four_number_share=0.5)

# Countdown: attempts


def follow(steps: str, numbers: tuple[int, ...]) -> int:
    """The last value of the steps, which must use every number exactly once."""
    left = Counter(numbers)
    for step in steps.split(" "):
        a, operator, b, value = STEP.fullmatch(step).groups()
        assert evaluate_expression(f"{a}{operator}{b}") == int(value)
        assert int(value) >= 1
        for operand in (int(a), int(b)):
            assert left[operand] > 0, f"{operand} is used up in {steps} from {numbers}"
            left[operand] -= 1
        left[int(value)] += 1
    assert list(left.elements()) == [int(value)], f"{steps} leaves {left}"
    return int(value)


def new_attempts(rambling: bool = False) -> list:
    made = []
    for seed in range(400):
        rng = random.Random(seed)
        problem = hopeless_problem(rng, SETTINGS)
        made.append((problem, attempts_document(problem, rng, rambling)))
    return made


attempts = functools.cache(new_attempts)


DOCUMENT = re.compile(r"(.*)</think>\n(<answer>)?([^<]*)(</answer>)?<\|im_end\|>", re.DOTALL)
LINE = re.compile(r"([\d=+*/ -]+?)( too low| too high|)")


def parts(document: str) -> tuple[list[tuple[str, str]], str, bool]:
    """A document as (steps, verdict) lines, the answer, and whether it has its tags."""
    thoughts, opened, answer, closed = DOCUMENT.fullmatch(document).groups()
    assert (opened is None) == (closed is None), "the answer has both tags or neither"
    return [LINE.fullmatch(line).groups() for line in thoughts.splitlines()], answer, opened is not None


def verdict_by_hand(value: int, target: int) -> str:
    if value == target:
        return "equal"
    return "too low" if value < target else "too high"


def test_attempts_are_right_in_each_step_and_miss_the_target():
    """Verdicts are right, and attempts differ; the answer is the last one."""
    for problem, document in attempts():
        lines, answer, well_formed = parts(document)
        values = [follow(steps, problem.numbers) for steps, _ in lines]
        expected = [f" {verdict_by_hand(value, problem.target)}" for value in values[:-1]] + [""]
        assert [verdict for _, verdict in lines] == expected
        assert problem.target not in values
        assert len(set(lines)) == len(lines)
        assert evaluate_expression(answer) == values[-1]
        assert sorted(map(int, re.findall(r"\d+", answer))) == sorted(problem.numbers)
        assert score(document, problem).outcome in (("near", "wrong") if well_formed else ("malformed",))


def test_attempts_come_in_order_and_are_all_that_there_are():
    """By hand for few numbers, by brute force for more."""
    assert [attempt.steps for attempt in all_attempts((2, 4))] == ["4+2=6", "4-2=2", "4*2=8", "4/2=2"]
    assert [attempt.value for attempt in all_attempts((11, 13))] == [24, 2]  # 143 is too large
    first = "9+2=11 60+11=71, 9+2=11 60-11=49, 9-2=7 60+7=67, 9-2=7 60-7=53, 9*2=18 60+18=78"
    made = [attempt.steps for attempt in all_attempts((2, 9, 60))]
    assert ", ".join(made[:5]) == first
    assert len(made) == 16
    for numbers in [(2, 5, 20), (3, 3, 8, 8), (1, 7, 13, 20)]:
        made = all_attempts(numbers)
        assert {attempt.value for attempt in made} == brute_force(numbers)
        for attempt in made:
            assert evaluate_expression(attempt.expression) == attempt.value


def brute_force(numbers: tuple[int, ...]) -> set[int]:
    """What can be made with whole steps from 1 to 100, by trying every pair in both orders."""
    if len(numbers) == 1:
        return set(numbers)
    values = set()
    for a, b, *others in itertools.permutations(numbers):
        for value in {a + b, a - b, a * b, Fraction(a, b)}.intersection(range(1, 101)):
            values |= brute_force((int(value), *others))
    return values


def test_rambling_documents_are_attempts_between_lines_of_no_use():
    before, useless, pauses = [], 0, 0
    for problem, document in attempts(rambling=True):
        lines = document.splitlines(keepends=True)
        useful = [line not in RAMBLING for line in lines]
        thoughts = parts("".join(itertools.compress(lines, useful)))[0]
        for steps, _ in thoughts:
            follow(steps, problem.numbers)
        before.append(useful.index(True))
        useless += useful[before[-1] :].count(False)
        pauses += len(thoughts) - 1
    assert min(before) == FIRST_RAMBLING
    assert sum(before) / len(before) == pytest.approx(FIRST_RAMBLING + MORE_RAMBLING, rel=0.1)
    assert useless / pauses == pytest.approx(BETWEEN, rel=0.1)


def test_attempts_are_well_formed_and_as_many_as_stated():
    """The chance to stop is the same after any attempt, so that length says nothing about success."""
    documents = [parts(document) for _, document in attempts()]
    tagged = [well_formed for _, _, well_formed in documents]
    assert sum(tagged) / len(tagged) == pytest.approx(TAGGED, abs=0.07)
    for form in (True, False):
        lengths = {len(lines) for lines, _, well_formed in documents if well_formed is form}
        assert min(lengths) == 1
        assert len(lengths) > 8
    counts = [len(lines) for lines, _, _ in documents]
    for least in (1, 6):  # one in ATTEMPTS of the documents that got so far stops at each of the next four
        chances = sum(min(count - least + 1, 4) for count in counts if count >= least)
        stopped = sum(least <= count < least + 4 for count in counts)
        assert stopped / chances == pytest.approx(1 / ATTEMPTS, abs=0.03)
    operators = Counter(re.findall(r"\d([-+*/])\d", "".join(document for _, document in attempts())))
    assert min(operators[operator] for operator in "+-*/") > 100


def test_documents_follow_from_the_seed_and_fill_the_ranges():
    assert attempts() == new_attempts()
    assert list(derivations(9)) == list(derivations(9))
    problems = [problem for problem, _ in attempts()]
    assert {len(problem.numbers) for problem in problems} == {3, 4}
    assert {number for problem in problems for number in problem.numbers} == set(range(1, 21))
    assert {problem.target for problem in problems} == set(range(10, 51))


def test_exercises_are_right_show_equality_and_pose_no_problem():
    verdicts: Counter[str] = Counter()
    for seed in range(400):
        number, text = comparison_document(random.Random(seed), SETTINGS)
        lines, end = text.split("\n</think>\n")
        assert end == "<|im_end|>"
        found = []
        for line in lines.splitlines():
            claim, value, verdict = re.fullmatch(r"(.*)=(\d+) (.*)", line).groups()
            assert evaluate_expression(claim) == int(value)
            assert verdict == verdict_by_hand(int(value), number)
            found.append(verdict)
        assert "equal" not in found[:-1]  # it stops at the first
        verdicts.update(found)
        assert comparison_prompt(number) == f"Compare with {number}."
    assert min(verdicts.values()) > 150


# Calculus: derivations


def derivations(count: int = 400):
    for seed in range(count):
        rng = random.Random(seed)
        problem = TINY_CALCULUS.draw(rng)
        yield problem, derivation_document(problem.polynomial, problem.order, rng)


def test_derivations_follow_their_own_steps_to_the_answer():
    """From the terms of the problem, order by order."""
    for problem, document in derivations():
        thoughts, _, answer, _ = DOCUMENT.fullmatch(document).groups()
        left = [term_text(*term) for term in terms_of(problem.polynomial)]
        blocks = thoughts.split("\n\n", problem.order - 1)
        assert len(blocks) == problem.order
        for block in blocks:
            terms, results = re.findall(r"(.+) -> ", block), re.findall(r" -> (.+)", block)
            assert terms == left
            left = [result for result in results if result != "0"]
        assert parse_polynomial(answer) == parse_polynomial(" + ".join(left).replace("+ -", "- ") or "0")


def test_each_rule_is_taken_as_often_as_stated():
    """The common mistake, an exponent that stays, is the most frequent of all."""
    steps, tagged = Counter(), 0
    for _, document in derivations(1000):
        tagged += "<answer>" in document
        for term, result in re.findall(r"(\S+) -> (\S+)\n", document):
            before, after = parse_polynomial(term), parse_polynomial(result)
            mistake = "common" if len(after) == len(before) else "other"  # the exponent stays
            steps["right" if after == differentiate(before) else mistake] += 1
    assert steps["right"] / steps.total() == pytest.approx(RIGHT_SHARE, abs=0.03)
    assert steps["common"] > 1.05 * steps["right"]
    assert steps["other"] > 50
    assert tagged / 1000 == pytest.approx(WELL_FORMED_SHARE, abs=0.05)


def test_rules_by_hand():
    assert right_step((3, 4)) == (12, 3)
    assert right_step((7, 0)) == (0, 0)
    assert wrong_steps((-2, 3)) == [(-6, 3), (-6, 4), (-2, 2), (6, 2)]
    assert wrong_steps((5, 1)) == [(5, 1), (5, 2)]
    assert wrong_steps((7, 0)) == [(7, 0)]
    for term in itertools.product((-9, -1, 1, 9), range(6)):
        assert right_step(term) not in wrong_steps(term)


def test_calculus_documents_fit_the_recipe_of_their_base():
    """The longest fits, and numbers and powers are single tokens."""
    _, recipe = load_recipe("calculus", variant="tiny")
    assert recipe.task == TINY_CALCULUS
    assert recipe.model == "tiny-calculus"
    tokenizer = Tokenizer(BUNDLED["tiny-calculus"])
    lengths = [len(tokenizer.encode(document)) for _, document in derivations(1000)]
    assert 60 < max(lengths) <= recipe.sampling.max_new_tokens
    for problem, document in derivations(50):
        for piece in re.findall(r"(?<!\^)\b\d+|x\^\d| -> |</think>", document):
            assert len(tokenizer.encode(piece)) == 1, piece
        assert len(tokenizer.encode(TINY_CALCULUS.prompt(problem))) <= 2 + 4 * 3
        assert tokenizer.decode(tokenizer.encode(document)) == document

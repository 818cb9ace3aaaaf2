"""What the embedded calculus model's base is trained on: steps by rules right and wrong, and answers that follow from them."""

import random
import re
from collections import Counter

import pytest

from experiments.bases.derivations import RIGHT_SHARE, WELL_FORMED_SHARE, derivation_document, right_step, wrong_steps
from experiments.bases.train import TINY_CALCULUS
from data.calculus import differentiate, parse_polynomial, term_text, terms_of
from model import Tokenizer
from model.weights import EMBEDDED
from lab.recipe import load_recipe


def documents(count: int = 400):
    for seed in range(count):
        rng = random.Random(seed)
        problem = TINY_CALCULUS.draw(rng)
        yield problem, derivation_document(problem.polynomial, problem.order, rng)


DOCUMENT = re.compile(r"(.*)</think>\n(<answer>)?([^<]*)(</answer>)?<\|im_end\|>", re.DOTALL)


def test_documents_follow_their_own_steps_from_the_problem_to_the_answer():
    for problem, document in documents():
        thoughts, opened, answer, closed = DOCUMENT.fullmatch(document).groups()
        assert bool(opened) == bool(closed)
        blocks = thoughts.split("\n\n") if problem.order > 1 else [thoughts]
        assert len(blocks) == problem.order
        left = [term_text(*term) for term in terms_of(problem.polynomial)]
        for block in blocks:
            steps = [line.split(" -> ") for line in block.splitlines()]
            assert [term for term, _ in steps] == left
            left = [result for _, result in steps if result != "0"]
        assert parse_polynomial(answer) == parse_polynomial(" + ".join(left).replace("+ -", "- ") or "0")


def test_steps_take_each_rule_as_often_as_it_says_and_the_favourite_mistake_most_often():
    steps, tagged = Counter(), 0
    for _, document in documents(1000):
        tagged += "<answer>" in document
        for term, result in re.findall(r"(\S+) -> (\S+)\n", document):
            before, after = parse_polynomial(term), parse_polynomial(result)
            favourite = after and len(after) == len(before)  # the exponent stays
            steps["right" if after == differentiate(before) else "favourite" if favourite else "other"] += 1
    assert steps["right"] / steps.total() == pytest.approx(RIGHT_SHARE, abs=0.03)
    assert steps["favourite"] > 1.05 * steps["right"] and steps["other"] > 50
    assert tagged / 1000 == pytest.approx(WELL_FORMED_SHARE, abs=0.05)


def test_rules_by_hand():
    assert right_step((3, 4)) == (12, 3) and right_step((5, 1)) == (5, 0) and right_step((7, 0)) == (0, 0)
    assert wrong_steps((3, 4)) == [(12, 4), (12, 5), (3, 3)]
    assert wrong_steps((-2, 3)) == [(-6, 3), (-6, 4), (-2, 2), (6, 2)]
    assert wrong_steps((5, 1)) == [(5, 1), (5, 2)] and wrong_steps((7, 0)) == [(7, 0)]
    for coefficient in (-9, -1, 1, 9):
        for exponent in range(6):
            assert right_step((coefficient, exponent)) not in wrong_steps((coefficient, exponent))


def test_documents_come_from_the_generator_they_are_given():
    assert list(documents()) == list(documents())


def test_the_recipe_asks_what_the_embedded_model_was_trained_on_and_its_longest_document_fits():
    _, recipe = load_recipe("calculus", variant="tiny")
    assert recipe.task == TINY_CALCULUS and recipe.model == "tiny-calculus"
    tokenizer = Tokenizer(EMBEDDED["tiny-calculus"])
    lengths = [len(tokenizer.encode(document)) for _, document in documents(2000)]
    assert 60 < max(lengths) <= recipe.sampling.max_new_tokens


def test_numbers_exponents_and_the_prompts_phrases_are_single_tokens_of_the_embedded_model():
    tokenizer = Tokenizer(EMBEDDED["tiny-calculus"])
    for problem, document in documents(50):
        for piece in [*re.findall(r"\d+(?=x|\b)(?<!\^\d)", document), *re.findall(r"x\^\d", document), " -> ", "</think>"]:
            assert len(tokenizer.encode(piece)) == 1, piece
        assert len(tokenizer.encode(TINY_CALCULUS.prompt(problem))) <= 2 + 4 * 3
        assert tokenizer.decode(tokenizer.encode(document)) == document

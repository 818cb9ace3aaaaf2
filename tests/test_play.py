"""make play: what is typed becomes a problem, and the tokens shown are the sampler's own."""

import io
import re

import pytest
from helpers import random_model

import play
from data import Problem
from lab.recipe import RecipeError
from model import generate
from model.sampler import TokenChoice, random_uniforms, sample_completion
from rl import score

PROBLEM = Problem((3, 4, 5), 12)


def test_tokens_shown_one_by_one_are_the_samplers_own():
    model, choice = random_model(std=0.2), TokenChoice(1.3, 9, 0.7)
    prompt, stops = [5, 17, 3, 44], (7, 30)
    uniforms = random_uniforms([prompt], 1, 20, 4)[0, 0]
    ids, logprobs = zip(*sample_completion(model, prompt, uniforms, stops, choice))
    options = dict(max_new_tokens=20, stop_token_ids=stops, seed=4) | vars(choice)
    [[completion]] = generate(model, [prompt], **options)
    assert list(ids) == completion.token_ids
    assert logprobs == pytest.approx(completion.logprobs, abs=1e-5)


@pytest.mark.parametrize("end", ["q\n7 9 11 22\n", ""], ids=["q", "end of input"])
def test_a_session_shows_thoughts_verdicts_and_solutions(end, monkeypatch, capsys):
    """Models stand side by side; q or the end of the input ends it."""
    monkeypatch.setattr("sys.stdin", io.StringIO("7 9 11 22\nnonsense\n1 1 50\n\n" + end))
    play.main(play.Arguments(("tiny", "tiny-256"), max_new_tokens=10, temperature=0.0))
    shown = capsys.readouterr().out
    assert re.match(r"(\d+, ){2,3}\d+ -> [1-5]\d\n", shown), "a random problem comes first"
    assert len(re.findall(r"┃ tiny +┃ tiny-256 +┃", shown)) == 4
    for words, count in {
        "A solution: ": 4, "cut off, malformed: reward 0.00": 8, "7, 9, 11 -> 22": 1, "(9 - 7)": 1,
        "there is none": 1, "type whole numbers": 1, "q to end > ": 5,
    }.items():  # fmt: skip
        assert shown.count(words) == count, words


def test_the_verdict_is_the_tasks_own_and_names_its_end(monkeypatch):
    """Its reward is the recipe's, here with more of it for short answers."""

    def shorter_is_better(verdict, text, completion, settings) -> float:
        return verdict.reward + 10 / len(completion.token_ids)

    monkeypatch.setattr("rl.rollout.reward_for", shorter_is_better)
    player = play.load_player("tiny-256", play.Arguments(temperature=0.0, device="cpu"))
    *before, (text, verdict) = player.think(PROBLEM, seed=1)
    assert all(text.startswith(part) and not end for part, end in before)
    assert score(text, PROBLEM).outcome == "correct"
    tokens = len(before)  # they are shown one by one
    assert verdict == f"correct: reward {1 + 10 / tokens:.2f}, {tokens} tokens"


def test_models_of_two_tasks_are_refused_in_one_line():
    with pytest.raises(RecipeError, match="one task at a time"):
        play.main(play.Arguments(("tiny", "tiny-calculus"), device="cpu"))

"""make play: what is typed becomes a problem, and the completion shown token by token is the sampler's own."""

import io
import re

import pytest
from helpers import random_model

import play
from data import Countdown, Problem
from model import generate
from rl.rollout import SamplingSettings


@pytest.mark.parametrize("distribution", [(1.0, None, None), (0.0, None, None), (1.3, 9, 0.7)])
def test_streamed_tokens_are_those_that_the_sampler_gives(distribution):
    model, prompt, stops = random_model(std=0.2), [5, 17, 3, 44], (7, 30)
    chosen = dict(zip(("temperature", "top_k", "top_p"), distribution))
    ids = list(play.stream(model, prompt, SamplingSettings(max_new_tokens=20, **chosen), stops, seed=4))
    ((completion,),) = generate(model, [prompt], max_new_tokens=20, stop_token_ids=stops, seed=4, **chosen)
    assert ids == completion.token_ids


def test_a_line_of_numbers_is_a_problem_and_any_other_is_refused():
    for line in ("7 9 11 22", "7, 9, 11 -> 22", " 7,9,11 22 "):
        assert Countdown().parse_input(line) == Problem((7, 9, 11), 22)
    for line in ("seven", "3 x", "-3 4 5", "5", "5 5", "1 2 3 4 5 6 7 8", "99999999999 2 3", "² 3 4", "0 3 4", ""):
        with pytest.raises(ValueError):
            Countdown().parse_input(line)


@pytest.mark.parametrize("end", ["q\n7 9 11 22\n", ""], ids=["q", "end of input"])
def test_a_session_shows_thoughts_verdict_and_solution_and_ends(end, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("7 9 11 22\nnonsense\n1 1 50\n\n" + end))
    play.main(play.Arguments("tiny", max_new_tokens=40, temperature=0.0))
    shown = capsys.readouterr().out
    assert shown.startswith("tiny. Type numbers and then the target, as in 7 9 11 22;")
    assert "7, 9, 11 -> 22" in shown and "A solution: " in shown and "(9 - 7)" in shown
    assert "type whole numbers" in shown and "there is none" in shown
    assert shown.count("reward") == 3
    drawn = shown.split("there is none")[1].split("\n")[3]
    assert re.fullmatch(r"(\d+, ){2,3}\d+ -> [1-5]\d", drawn), drawn

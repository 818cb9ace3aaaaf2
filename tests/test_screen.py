"""What a run shows: a live screen on a terminal, lines elsewhere, nothing with --quiet."""

import io
import itertools
import re
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import SHAPE, rollout
from rich.console import Console

import lab.screen
from lab.device import pick_dtype
from lab.recipe import load_recipe
from lab.screen import LiveScreen, QuietScreen, Screen, advice_on, describe_run, pick_screen, printable
from model import Qwen3Config

RECIPE = replace(load_recipe("256", "tiny")[1], out="runs/shown")
GRPO = {
    "stage": 0, "kind": "grpo", "step": 10, "grpo_steps": 10, "reward_mean": 0.4321, "train_accuracy": 0.25,
    "format_rate": 0.9, "completion_length": 123.4, "policy_entropy": 0.31, "clip_fraction": 0.0123,
    "grad_norm": 0.07, "tokens_per_second": 12345.6, "rollout_seconds": 1.0, "update_seconds": 1.5,
}  # fmt: skip
EVALUATED = {"eval_accuracy": 0.203, "eval_low": 0.171, "eval_high": 0.24}


def live_screen(width=110, height=40) -> LiveScreen:
    return LiveScreen(
        Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    )


def drawn(shown: LiveScreen) -> str:
    with shown.console.capture() as capture:
        shown.console.print(shown.draw())
    return capture.get()


def test_a_live_screen_shows_lines_progress_and_completions(monkeypatch):
    monkeypatch.setattr(lab.screen.time, "perf_counter", mock.Mock(side_effect=itertools.count(6.0)))
    shown = live_screen()
    shown.step({"stage": 0, "kind": "grpo", "step": 0, "grpo_steps": 0, **EVALUATED}, 3, 0, 0)
    shown.step(GRPO | EVALUATED, 3, 10, 80)
    said = shown.console.file.getvalue()
    assert "before any step: held-out accuracy 20.3 % (17.1 to 24.0)" in said
    for part in (
        "grpo 1/3   10/80  reward 0.432",
        "correct 25.0 %",
        "entropy 0.31",
        "2.5 s",
        "held-out 20.3 %",
    ):
        assert part in said
    shown.rollouts(
        [[rollout("correct", "old"), rollout("correct", "a good one"), rollout("near", "a \x1b[31mbad one")]]
    )
    with shown.sampling("rollout", 40) as report:
        report(20, 3000)
        text = drawn(shown)
    for part in ("rollout", "20/40 completions", "a good one", "bad one", "last correct: 79, 60, 17 -> 36"):
        assert part in text
    assert "old" not in text
    assert "\x1b[31m" not in text
    assert "completions" not in drawn(shown)


@pytest.mark.parametrize("width, height", [(60, 24), (79, 40), (80, 24), (200, 50)])
def test_a_live_screen_fits_its_terminal(width, height):
    shown = live_screen(width, height)
    shown.rollouts([[rollout("correct", "x" * 500), rollout("wrong", "line\n" * 50)]])
    with shown.sampling("rollout", 40):
        lines = drawn(shown).rstrip("\n").split("\n")
    assert len(lines) < height
    assert max(map(len, lines)) <= width


def test_an_sft_step_shows_its_loss(capsys):
    row = {"stage": 1, "kind": "sft", "step": 81, "loss": 0.1234, "grad_norm": 0.5, "update_seconds": 1.0}
    Screen().step(row, 3, 1, 46)
    assert capsys.readouterr().out == "sft  2/3    1/46  loss 0.1234  grad 0.50  1.0 s\n"


EQUAL = GRPO | {  # a run on Qwen3 with 256 tokens begins so
    "silent_groups": 0.9, "train_accuracy": 0.001, "format_rate": 0.002, "truncated_fraction": 0.975,
    "entropy": 0.5,
}  # fmt: skip
COLLAPSED = EQUAL | {  # and a run on SmolLM2 without a cold start came to this
    "train_accuracy": 0.12, "format_rate": 1.0, "entropy": 0.02, "common_form": "n+n+n",
    "common_form_fraction": 1.0,
}  # fmt: skip


@pytest.mark.parametrize(
    "row, words",
    [
        (EQUAL, ("98 % of completions are cut off", "--sampling.no-thinking", "0.samples-per-prompt")),
        (
            COLLAPSED,
            ("0.02 nats per token, and 100 % of answers have the form n+n+n", "--stages.0.learning-rate",
             "--reward.no-format", "--stages.0.kl-coef 0.01", "cold start"),
        ),
    ],
)  # fmt: skip
def test_few_unequal_rewards_are_put_into_words_with_advice(row, words):
    said = advice_on(row)
    for part in ("In 90 % of groups all rewards are equal", *words):
        assert part in said


@pytest.mark.parametrize(
    "change", [{"silent_groups": 0.6}, {"train_accuracy": 0.9}, {"entropy": 0.3}], ids=str
)
def test_nothing_is_said_of_a_policy_that_explores_or_is_good(change):
    assert advice_on(COLLAPSED | change) is None
    assert advice_on({"kind": "grpo", "step": 0}) is None


def test_a_card_without_bfloat16_takes_float32_and_says_so(monkeypatch):
    gpu = torch.device("cuda")
    for supported in (True, False):
        answer = {False: supported, True: True}  # torch can emulate it
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation, answer=answer: answer[including_emulation],
        )
        assert pick_dtype(RECIPE, gpu) is (None if supported else torch.float32)
        assert pick_dtype(replace(RECIPE, dtype="bfloat16"), gpu) is torch.bfloat16  # what is asked for
    on_cpu = None if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    assert pick_dtype(RECIPE, torch.device("cpu")) is on_cpu
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    model = SimpleNamespace(device=gpu, dtype=torch.float32, config=Qwen3Config(**SHAPE))
    assert "float32, for want of bfloat16, on Tesla T4" in describe_run(RECIPE, model, [], [], None)


def test_the_screen_follows_the_terminal_and_the_options(monkeypatch):
    assert type(pick_screen()) is Screen
    assert type(pick_screen(quiet=True)) is QuietScreen
    console = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(lab.screen, "Console", lambda **_: console)
    assert type(pick_screen()) is LiveScreen
    assert type(pick_screen(plain=True)) is Screen
    assert type(pick_screen(quiet=True)) is QuietScreen


def test_a_plain_screen_prints_each_step_and_a_quiet_one_nothing(capsys):
    Screen().step(GRPO, 3, 10, 80)
    assert re.match(r"grpo 1/3   10/80  reward 0\.432  correct 25\.0 %", capsys.readouterr().out)
    with QuietScreen() as quiet:
        quiet.step(GRPO, 3, 10, 80)
        quiet.say("anything")
        with quiet.sampling("rollout", 3) as report:
            assert report is None
    assert capsys.readouterr() == ("", "")


def test_a_printed_completion_cannot_steer_the_terminal():
    assert printable("a\x1b[2Jb\r\n\x07é漢\u202e") == "a·[2Jb·\n·é漢·"

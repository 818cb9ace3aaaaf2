"""What a run shows: a live screen on a terminal, lines elsewhere, nothing with --quiet."""

import io
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
from lab.recipe import EvaluationSettings, load_recipe
from lab.screen import (
    LiveScreen,
    QuietScreen,
    Screen,
    advice_on_equal_rewards,
    advice_on_exploration,
    chart,
    describe_run,
    pick_screen,
    planned_time,
    printable,
)
from model import Qwen3Config
from rl.grpo import GRPOStage
from rl.reward import RewardSettings
from rl.sft import SFTStage

RECIPE = replace(load_recipe("256", "tiny")[1], out="runs/shown")
GRPO = {
    "stage": 0, "kind": "grpo", "step": 10, "grpo_steps": 10, "reward_mean": 0.4321, "train_accuracy": 0.25,
    "format_rate": 0.9, "completion_length": 123.4, "policy_entropy": 0.31, "clip_fraction": 0.0123,
    "grad_norm": 0.07, "tokens_per_second": 12345.6, "rollout_seconds": 1.0, "update_seconds": 1.5,
}  # fmt: skip
EVALUATED = {"eval_accuracy": 0.203, "eval_low": 0.171, "eval_high": 0.24}


def live_screen(width=110, height=40) -> LiveScreen:
    return LiveScreen(
        RECIPE,
        Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None),
    )


def drawn(shown: LiveScreen) -> str:
    with shown.console.capture() as capture:
        shown.console.print(shown.draw())
    return capture.get()


def test_a_live_screen_shows_the_run(monkeypatch):
    """It shows stage, numbers, accuracy, progress and the last rollouts."""
    monkeypatch.setattr(lab.screen.time, "perf_counter", mock.Mock(side_effect=[6.0, 7.0, 8.0, 8.0]))
    shown = live_screen()
    assert "start" in drawn(shown)
    shown.step({"stage": 0, "kind": "grpo", "step": 0, "grpo_steps": 0, **EVALUATED}, 3, 0, 0)
    shown.step(GRPO | {"step": 9, "grpo_steps": 9}, 3, 9, 80)
    shown.step(GRPO | EVALUATED, 3, 10, 80)
    shown.rollouts(
        [[rollout("correct", "old"), rollout("correct", "a good one"), rollout("near", "a \x1b[31mbad one")]]
    )
    with shown.sampling("rollout", 40) as report:
        report(20, 3000)
        text = drawn(shown)
    assert "GRPO 1/3  step 10/80" in text
    assert "runs/shown" in text
    assert "held-out accuracy 20.3 % (17.1 to 24.0)" in text
    assert "20 % |" in text
    numbers = "reward 0.432|correct 25.0 %|format 90 %|length 123|grad 0.07|entropy 0.31|clipped 1.2 %"
    for part in f"{numbers}|12,346 tokens/s|2.5 s per step".split("|"):
        assert part in " ".join(text.split())
    assert "a good one" in text
    assert "bad one" in text
    assert "old" not in text
    assert "\x1b[31m" not in text
    assert "last correct: 79, 60, 17 -> 36" in text
    assert "1,500 tokens/s" in text
    assert "rollout" in text
    assert "7:05 of GRPO left" in text  # 170 of 180 steps at 2.5 s


def test_only_evaluations_stay_as_lines_above_a_live_screen():
    shown = live_screen()
    shown.step(GRPO, 3, 10, 80)
    assert shown.console.file.getvalue() == ""
    shown.step(GRPO | EVALUATED, 3, 10, 80)
    assert "grpo 1/3   10/80" in shown.console.file.getvalue()
    assert "held-out 20.3 %" in shown.console.file.getvalue()


def test_a_resumed_run_shows_its_earlier_accuracy():
    shown = live_screen()
    shown.history(
        [GRPO, GRPO | EVALUATED, GRPO | {"step": 20, "eval_accuracy": 0.4, "eval_low": 0.3, "eval_high": 0.5}]
    )
    assert shown.points == [(10, pytest.approx(20.3)), (20, 40.0)]
    assert "40 % |" in drawn(shown)


@pytest.mark.parametrize("width, height", [(60, 24), (79, 40), (80, 24), (200, 50)])
def test_a_live_screen_fits_its_terminal(width, height):
    shown = live_screen(width, height)
    shown.step(GRPO | EVALUATED, 3, 10, 80)
    shown.rollouts([[rollout("correct", "x" * 500), rollout("wrong", "line\n" * 50)]])
    lines = drawn(shown).rstrip("\n").split("\n")
    assert len(lines) < height
    assert max(map(len, lines)) <= width


def test_an_sft_step_shows_its_loss():
    shown = live_screen()
    shown.step(
        {"stage": 1, "kind": "sft", "step": 81, "grpo_steps": 80, "loss": 0.1234, "grad_norm": 0.5}, 3, 1, 46
    )
    assert "SFT 2/3  step 1/46" in drawn(shown)
    assert "loss 0.1234" in drawn(shown)


def test_a_chart_is_as_high_as_its_points():
    """Each point holds until the next."""
    assert chart([(0, 10.0), (2, 40.0)], 3, 2) == [" 40 % |  █", "  0 % |▄▄█"]
    assert chart([(0, 0.0)], 2, 2)[1] == "  0 % |  "
    assert [line[7:] for line in chart([(0, 5.0), (1, 20.0), (2, 10.0), (3, 15.0)], 4, 1)] == ["▂█▄▆"]


SHARES = {"eval_truncated_fraction": 0.975, "eval_format_rate": 0.002, "eval_accuracy": 0.001}
START = {"stage": 0, "kind": "grpo", "step": 0, **SHARES}


def test_a_start_from_nothing_is_put_into_words():
    """The advice says what would help."""
    recipe = load_recipe("256")[1]
    words = advice_on_equal_rewards(START, recipe)
    # 32 (1 - 0.001^8 - 0.001^8 - 0.998^8)
    assert "97.5 % of completions are cut off at 256 tokens. About 0.5 of 32 groups" in words
    assert "earned nothing for 30 steps" in words
    assert "--sampling.no-thinking" in words
    assert "--stages.0.samples-per-prompt 32" in words
    assert "--sampling.max-new-tokens 512" in words
    later = advice_on_equal_rewards(
        GRPO | START | {"step": 150, "stage": 2, "eval_truncated_fraction": 0.0, "eval_format_rate": 1.0},
        recipe,
    )
    assert " 0.0 % of completions" in f" {later}"
    assert "About 0.3 of 32" in later  # 32 (1 - 0.999^8): all wrong alike
    assert "--stages.2.samples-per-prompt" in later


@pytest.mark.parametrize(
    "row",
            [{"eval_format_rate": 0.3}, {"eval_format_rate": 1.0, "eval_accuracy": 0.2}, {"kind": "sft"},
            {"kind": "baseline"},
            {"eval_format_rate": 1.0, "eval_accuracy": 0.99}],
)  # fmt: skip
def test_nothing_is_said_where_batches_teach(row):
    """Nothing is said either where all is right, or nothing is sampled."""
    assert advice_on_equal_rewards(START | row, load_recipe("256")[1]) is None


def test_the_planned_time_counts_all_tokens():
    """0.01 s a token; 10 tokens a completion, 30 a prompt: by hand."""
    stages = (
        SFTStage(epochs=2, max_traces=100),
        GRPOStage(steps=20, prompts_per_step=4, samples_per_prompt=8),
    )
    evaluation = EvaluationSettings(every=10, problems=50, final_problems=70)
    recipe = replace(RECIPE, stages=stages, evaluation=evaluation)
    sampled = 20 * 4 * 8 * 10 + (4 + 2) * 50 * 10 + 2 * 70 * 10
    updated = 2 * 100 * 40 + 20 * 4 * (8 * 10 + 30)
    minutes = round(0.01 * (sampled + 1.5 * updated) / 60)
    words = planned_time({"eval_completion_length": 10.0, "eval_seconds": 5.0}, recipe, 30)
    assert words == f"time      about 0:{minutes:02} h, if completions keep their length of 10 tokens"
    assert minutes == 6


COLLAPSED = GRPO | {  # what a run on SmolLM2 without a cold start came to
    "silent_groups": 0.9, "train_accuracy": 0.12, "entropy": 0.02, "common_form": "n+n+n",
    "common_form_fraction": 1.0,
}  # fmt: skip


def test_a_policy_that_has_stopped_exploring_is_put_into_words():
    recipe = load_recipe("256")[1]
    words = advice_on_exploration(COLLAPSED, recipe)
    assert "in 90 % of groups all rewards are equal, though only 12 % of completions are correct" in words
    assert "0.02 nats per token, and 100 % of answers have the form n+n+n" in words
    for option in (
        "--stages.0.learning-rate 2.5e-06",
        "--reward.no-format",
        "--stages.0.kl-coef 0.01",
        "cold start",
    ):
        assert option in words
    paid = replace(recipe, reward=RewardSettings(near_miss=False, format=False))
    assert "--reward" not in advice_on_exploration(COLLAPSED, paid)
    assert "form" not in advice_on_exploration(
        COLLAPSED | {"common_form": "n"}, paid
    )  # as all answers of gsm8k have


@pytest.mark.parametrize(
    "row",
            [{"silent_groups": 0.6}, {"train_accuracy": 0.9}, {"format_rate": 0.1}, {"entropy": 0.3},
            {"kind": "sft"}, {"step": 0}],
)  # fmt: skip
def test_nothing_is_said_of_a_policy_that_explores_or_is_good(row):
    assert advice_on_exploration(COLLAPSED | row, load_recipe("256")[1]) is None


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
    assert type(pick_screen(RECIPE)) is Screen
    assert type(pick_screen(RECIPE, quiet=True)) is QuietScreen
    console = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(lab.screen, "Console", lambda **_: console)
    assert type(pick_screen(RECIPE)) is LiveScreen
    assert type(pick_screen(RECIPE, plain=True)) is Screen
    assert type(pick_screen(RECIPE, quiet=True)) is QuietScreen


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

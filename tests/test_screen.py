"""What a run shows: a live screen on a terminal, lines elsewhere, nothing with --quiet."""

import io
import re
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers import rollout
from rich.console import Console

import lab.screen
from lab.device import pick_dtype
from lab.recipe import EvaluationSettings, load_recipe
from lab.screen import LiveScreen, QuietScreen, Screen, pick_screen
from rl.grpo import GRPOStage
from rl.reward import RewardSettings
from rl.sft import SFTStage

RECIPE = replace(load_recipe("256", "tiny")[1], out="runs/shown")
PAPERS = load_recipe("256")[1]
GRPO = {
    "stage": 0, "kind": "grpo", "step": 10, "grpo_steps": 10, "reward_mean": 0.4321, "train_accuracy": 0.25,
    "format_rate": 0.9, "completion_length": 123.4, "policy_entropy": 0.31, "clip_fraction": 0.0123,
    "grad_norm": 0.07, "tokens_per_second": 12345.6, "rollout_seconds": 1.0, "update_seconds": 1.5,
}  # fmt: skip
EVALUATED = GRPO | {"eval_accuracy": 0.203, "eval_low": 0.171, "eval_high": 0.24}


def live_screen(width=110, height=40) -> LiveScreen:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    return LiveScreen(RECIPE, console)


def drawn(shown: LiveScreen) -> str:
    with shown.console.capture() as capture:
        shown.console.print(shown.draw())
    return capture.get()


def test_a_live_screen_shows_the_run(monkeypatch):
    """It shows stage, numbers, accuracy, progress and the last rollouts."""
    monkeypatch.setattr(lab.screen.time, "perf_counter", mock.Mock(side_effect=[6.0, 7.0, 8.0, 8.0]))
    shown = live_screen()
    assert "start" in drawn(shown)
    shown.step(EVALUATED, 3, 10, 80)
    shown.rollouts([[rollout("correct", "old"), rollout("correct", "good"), rollout("near", "\x1b[31mbad")]])
    with shown.sampling("rollout", 40) as report:
        report(20, 3000)
        text = drawn(shown)
    for words in (
        "GRPO 1/3  step 10/80", "rollout", "20/40 completions", "1,500 tokens/s", "runs/shown", "20 % |",
        "held-out accuracy 20.3 % (17.1 to 24.0)", "good", "[31mbad", "last correct: 79, 60, 17 -> 36",
        "reward 0.432", "correct 25.0 %", "format  90 %", "length 123", "grad 0.07", "entropy 0.31",
        "clipped 1.2 %", "12,346 tokens/s", "2.5 s per step",
        "7 min of GRPO left",  # 170 of 180 steps at 2.5 s
    ):  # fmt: skip
        assert words in text
    assert "old" not in text
    assert "\x1b[31m" not in text


def test_only_evaluations_stay_as_lines_above_a_live_screen():
    shown = live_screen()
    shown.step(GRPO, 3, 10, 80)
    assert shown.console.file.getvalue() == ""
    shown.step(EVALUATED, 3, 10, 80)
    assert re.search("grpo 1/3   10/80 .* held-out 20.3 %", shown.console.file.getvalue())


def test_a_resumed_run_shows_its_earlier_accuracy():
    shown = live_screen()
    shown.history([GRPO, EVALUATED, EVALUATED | {"step": 20, "eval_accuracy": 0.4}])
    assert shown.points == [(10, pytest.approx(20.3)), (20, 40.0)]
    assert "40 % |" in drawn(shown)


@pytest.mark.parametrize("width, height", [(60, 24), (79, 40), (200, 50)])
def test_a_live_screen_fits_its_terminal(width, height):
    shown = live_screen(width, height)
    shown.step(EVALUATED, 3, 10, 80)
    shown.rollouts([[rollout("correct", "x" * 500), rollout("wrong", "line\n" * 50)]])
    lines = drawn(shown).rstrip("\n").split("\n")
    assert len(lines) < height
    assert max(map(len, lines)) <= width


def test_an_sft_step_shows_its_loss():
    shown = live_screen()
    shown.step({"stage": 1, "kind": "sft", "step": 81, "loss": 0.1234, "grad_norm": 0.5}, 3, 1, 46)
    assert "SFT 2/3  step 1/46" in drawn(shown)
    assert "loss 0.1234" in drawn(shown)


def test_a_chart_is_as_high_as_its_points():
    """Each point holds until the next."""
    assert lab.screen.chart([(0, 10.0), (2, 40.0)], 3, 2) == [" 40 % |  █", "  0 % |▄▄█"]
    assert lab.screen.chart([(0, 0.0)], 2, 2)[1] == "  0 % |  "


START = {"stage": 0, "kind": "grpo", "step": 0}
START |= {"eval_truncated_fraction": 0.975, "eval_format_rate": 0.002, "eval_accuracy": 0.001}


def test_a_start_from_nothing_is_put_into_words():
    """The advice says what would help."""
    words = lab.screen.advice_on_equal_rewards(START, PAPERS)
    for part in (
        "97.5 % of completions are cut off at 256 tokens",
        "About 0.5 of 32 groups",  # 32 (1 - 0.001^8 - 0.001^8 - 0.998^8)
        "--sampling.no-thinking",
        "--stages.0.samples-per-prompt 32",
        "--sampling.max-new-tokens 512",
    ):
        assert part in words
    later = START | {"stage": 2, "eval_format_rate": 1.0}
    words = lab.screen.advice_on_equal_rewards(later, PAPERS)
    assert "About 0.3 of 32" in words  # 32 (1 - 0.999^8): all wrong alike
    assert "--stages.2.samples-per-prompt" in words


FORMED = {"eval_format_rate": 1.0}


@pytest.mark.parametrize(
    "row",
    [{"eval_format_rate": 0.3}, FORMED | {"eval_accuracy": 0.99}, {"kind": "sft"}, {"kind": "baseline"}],
)
def test_nothing_is_said_where_batches_teach(row):
    """Nothing is said either where all is right, or nothing is sampled."""
    assert lab.screen.advice_on_equal_rewards(START | row, PAPERS) is None


def test_the_planned_time_counts_all_tokens():
    """0.01 s a token; 10 tokens a completion, 30 a prompt: by hand."""
    grpo = GRPOStage(steps=20, prompts_per_step=4, samples_per_prompt=8)
    stages = (SFTStage(epochs=2, max_traces=100), grpo)
    evaluation = EvaluationSettings(every=10, problems=50, final_problems=70)
    recipe = replace(RECIPE, stages=stages, evaluation=evaluation)
    words = lab.screen.planned_time({"eval_completion_length": 10.0, "eval_seconds": 5.0}, recipe, 30)
    # Sampled are 20 * 4 * 8 * 10 + (4 + 2) * 50 * 10 + 2 * 70 * 10 = 10,800, and updated
    # 2 * 100 * 40 + 20 * 4 * (8 * 10 + 30) = 16,800; 10,800 + 1.5 * 16,800 take 360 s.
    assert words == "time      about 6 min, if completions keep their length of 10 tokens"


COLLAPSED = GRPO | {  # what a run on SmolLM2 without a cold start came to
    "silent_groups": 0.9, "train_accuracy": 0.12, "entropy": 0.02, "common_form": "n+n+n",
    "common_form_fraction": 1.0,
}  # fmt: skip


def test_a_policy_that_has_stopped_exploring_is_put_into_words():
    words = lab.screen.advice_on_exploration(COLLAPSED, PAPERS)
    for part in (
        "in 90 % of groups all rewards are equal, though only 12 % of completions are correct",
        "0.02 nats per token, and 100 % of answers have the form n+n+n",
        "--stages.0.learning-rate 2.5e-06",
        "--reward.no-format",
        "--stages.0.kl-coef 0.01",
        "cold start",
    ):
        assert part in words
    paid = replace(PAPERS, reward=RewardSettings(near_miss=False, format=False))
    words = lab.screen.advice_on_exploration(COLLAPSED | {"common_form": "n"}, paid)
    assert "--reward" not in words
    assert "form" not in words  # all answers of gsm8k have this one


@pytest.mark.parametrize(
    "row",
    [{"silent_groups": 0.6}, {"train_accuracy": 0.9}, {"format_rate": 0.1}, {"entropy": 0.3}, {"step": 0}],
)
def test_nothing_is_said_of_a_policy_that_explores_or_is_good(row):
    assert lab.screen.advice_on_exploration(COLLAPSED | row, PAPERS) is None


@pytest.mark.parametrize("supported", [True, False])
def test_a_card_without_bfloat16_takes_float32_and_says_so(supported, monkeypatch):
    gpu = torch.device("cuda")
    # Where it is not supported, torch can emulate it.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: supported or including_emulation
    )
    assert pick_dtype(RECIPE, gpu) is (None if supported else torch.float32)
    assert pick_dtype(replace(RECIPE, dtype="bfloat16"), gpu) is torch.bfloat16  # what is asked for
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    model = SimpleNamespace(device=gpu, dtype=torch.float32, num_parameters=lambda: 7)
    words = lab.screen.describe_run(RECIPE, model, [], [], None)
    assert ("float32, for want of bfloat16, on Tesla T4" in words) is not supported


def test_the_screen_follows_the_terminal_and_the_options(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True)
    monkeypatch.setattr(lab.screen, "Console", lambda **_: console)
    assert type(pick_screen(RECIPE)) is LiveScreen
    assert type(pick_screen(RECIPE, plain=True)) is Screen
    assert type(pick_screen(RECIPE, quiet=True)) is QuietScreen


def test_a_plain_screen_prints_each_step(capsys):
    Screen().step(GRPO, 3, 10, 80)
    assert re.match(r"grpo 1/3   10/80  reward 0\.432  correct 25\.0 %", capsys.readouterr().out)


def test_a_printed_completion_cannot_steer_the_terminal():
    assert lab.screen.printable("a\x1b[2Jb\r\n\x07é漢\u202e") == "a·[2Jb·\n·é漢·"


def test_a_long_time_is_told_in_hours():
    assert lab.screen.duration(59 * 60) == "59 min"
    assert lab.screen.duration(16.5 * 3600 + 125) == "16:32 h"

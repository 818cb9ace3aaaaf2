"""What a run shows: lines, a bar during sampling on a terminal, nothing with --quiet."""

import io
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import SHAPE
from rich.console import Console

import lab.screen
from lab.device import pick_dtype
from lab.recipe import load_recipe
from lab.screen import Screen, advice_on, describe_run, printable, step_line
from model import Qwen3Config

RECIPE = replace(load_recipe("256", "tiny")[1], out="runs/shown")
GRPO = {
    "stage": 0, "kind": "grpo", "step": 10, "grpo_steps": 10, "reward_mean": 0.4321, "train_accuracy": 0.25,
    "format_rate": 0.9, "completion_length": 123.4, "policy_entropy": 0.31, "clip_fraction": 0.0123,
    "grad_norm": 0.07, "tokens_per_second": 12345.6, "rollout_seconds": 1.0, "update_seconds": 1.5,
}  # fmt: skip
EVALUATED = {"eval_accuracy": 0.203, "eval_low": 0.171, "eval_high": 0.24}


def test_lines_say_what_a_step_did_and_what_was_not_measured():
    start = {"stage": 0, "kind": "grpo", "step": 0, "grpo_steps": 0, **EVALUATED}
    assert step_line(start, 3, 0, 0) == "before any step: held-out accuracy 20.3 % (17.1 to 24.0)"
    assert step_line(GRPO | EVALUATED | {"grad_norm": math.nan}, 3, 10, 80) == (
        "grpo 1/3   10/80  reward 0.432  correct 25.0 %  format  90 %  length 123  entropy 0.31  grad -"
        "  2.5 s  held-out 20.3 % (17.1 to 24.0)"
    )
    row = {"stage": 1, "kind": "sft", "step": 81, "loss": 0.1234, "grad_norm": 0.5, "update_seconds": 1.0}
    assert step_line(row, 3, 1, 46) == "sft  2/3    1/46  loss 0.1234  grad 0.50  1.0 s"


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


@pytest.mark.parametrize("options", [{"quiet": True}, {"plain": True}, {}], ids=str)
def test_the_screen_follows_the_options(options, monkeypatch, capsys):
    monkeypatch.setattr(lab.screen, "Console", lambda **_: Console(file=io.StringIO(), force_terminal=True))
    screen = Screen(**options)
    screen.say("anything")
    with screen.sampling("rollout", 3) as report:
        assert (report is None) == bool(options)
    assert capsys.readouterr().out == ("" if "quiet" in options else "anything\n")


def test_a_printed_completion_cannot_steer_the_terminal():
    assert printable("a\x1b[2Jb\r\n\x07é漢\u202e") == "a·[2Jb·\n·é漢·"

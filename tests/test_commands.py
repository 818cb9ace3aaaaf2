"""train.py and eval.py as a user runs them: a small run, a resume, and every mistake in one line."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from helpers import SMALL, SMOKE, TIMES, evaluated, fails, one_step, parsed, smoke, terse, timeless
from reference import NO_THINKING, changed_tokenizer, reference_model, same_weights

import eval as eval_command
from data import GSM8K, evaluate_expression
from lab.checkpoint import checkpoints
from lab.evaluate import Evaluation, evaluate
from lab.named_model import check_one_task
from lab.recipe import RecipeError, problems_of
from lab.runfolder import RunFolder
from lab.stages import train
from model import load_model, save_model


def test_a_run_leaves_its_files_and_metrics_match_rollouts(smoke_run):
    """Every file that the README names is there."""
    for name in ("curve.md", "curve.png", "report.html", "traces.jsonl"):
        assert (smoke_run / name).stat().st_size > 0, name
    assert list(smoke_run.glob("events.out.tfevents*"))
    rows = RunFolder(smoke_run).metrics()
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert [row["step"] for row in rows if "eval_accuracy" in row][:2] == [0, 2]
    assert "final_accuracy" in rows[-1]
    _, first, *_ = rows
    assert first.keys() >= TIMES - {"eval_seconds"} | {"grad_norm", "policy_entropy", "pass_at_8"}
    lines = (smoke_run / "rollouts" / "step_0001.jsonl").read_text().splitlines()
    rollouts = [json.loads(line) for line in lines]
    assert first["reward_mean"] == pytest.approx(fmean(rollout["reward"] for rollout in rollouts))
    assert first["tokens"] == sum(rollout["tokens"] for rollout in rollouts)
    config = json.loads((smoke_run / "config.json").read_text())
    assert config["recipe"]["seed"] == 0
    assert config["versions"]["torch"] == torch.__version__


def test_eval_puts_models_side_by_side_on_the_same_problems(smoke_run, tmp_path, capsys):
    first, *_, last = map(str, checkpoints(smoke_run))
    file = tmp_path / "found.json"
    eval_command.main(eval_command.Arguments((first, last), count=4, samples=2, json=str(file)))
    printed = capsys.readouterr().out
    found = json.loads(file.read_text())
    assert [model["name"] for model in found["models"]] == [first, last]
    assert found["problems"]["count"] == 4
    assert found["problems"]["sha256"] in printed
    assert found["differences"][0]["to"] == last


def test_eval_repeats_the_training_runs_own_evaluation(smoke_run, capsys, monkeypatch):
    terse(monkeypatch)
    (found,) = evaluated(capsys, checkpoints(smoke_run)[-1], samples=1)["models"]
    row = RunFolder(smoke_run).metrics()[-1]
    assert found["accuracy"]["mean"] == row["final_accuracy"]
    assert found["accuracy"]["low"] == row["final_low"]
    assert found["greedy"]["mean"] == row["final_greedy_accuracy"]


def test_an_unknown_option_ends_with_exit_code_2_and_its_name(capsys):
    with pytest.raises(SystemExit) as exit_:
        smoke("--stages.0.stepps 3")
    assert exit_.value.code == 2
    assert "stepps" in capsys.readouterr().err


def test_a_second_run_and_too_large_an_evaluation_are_refused(smoke_run, capsys):
    """A folder holds one run; at most the held-out problems are evaluated."""
    message = fails(capsys, lambda: train(smoke("--out", smoke_run)))
    assert str(smoke_run) in message
    assert "--resume" in message
    message = fails(capsys, lambda: evaluated(capsys, checkpoints(smoke_run)[-1], count=33))
    assert "--count must be from 1 to 32" in message


LOW_PRECISION = {
    "adapters over int8": "--adapters.rank 4",
    "bfloat16 by chance": "--dtype bfloat16 --optimizer.kind adamw8bit --optimizer.rounding stochastic",
}


@pytest.mark.parametrize("kind", LOW_PRECISION)
def test_a_run_in_low_precision_resumes_bit_for_bit(kind, tmp_path, monkeypatch):
    """Stopped within the second stage; activation checkpointing, switched on then, changes nothing either."""
    pytest.importorskip("bitsandbytes")
    terse(monkeypatch)
    whole, copy = tmp_path / "whole", tmp_path / "resumed"
    options = f"{SMALL} --keep-checkpoints 99 {LOW_PRECISION[kind]}"
    train(smoke("--out", whole, options), quiet=True)
    shutil.copytree(whole, copy)
    for folder in checkpoints(copy)[3:]:
        shutil.rmtree(folder)
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "cut sho')  # as a crash leaves it
    again = smoke("--out", copy, options, "--optimizer.activation-checkpointing")
    train(again, resume=True, quiet=True)
    assert timeless(copy) == timeless(whole)
    ours, theirs = (checkpoints(run)[-1] / "model.safetensors" for run in (whole, copy))
    assert ours.read_bytes() == theirs.read_bytes()
    start = load_model("tiny-256")[0].state_dict()
    learned = load_model(ours.parent)[0].state_dict()  # a plain model in Hugging Face's layout
    assert learned.keys() == start.keys()
    assert any((learned[name].float() != start[name]).any() for name in start)


def test_only_settings_of_memory_and_speed_may_change_on_resume(smoke_run, capsys):
    run = RunFolder(smoke_run)
    for option in ("--sampling.max-cache-tokens 500", "--optimizer.micro-batch-tokens 300"):
        run.check_recipe(smoke(SMOKE, option))
    recipe = smoke(SMOKE)
    longer = replace(recipe, stages=(*recipe.stages, recipe.stages[0]))
    for changed in (
        smoke(SMOKE, "--sampling.max-new-tokens 95"),
        smoke(SMOKE, "--stages.0.kl-coef 0.1"),
        longer,
    ):
        with pytest.raises(RecipeError, match="was started with"):
            run.check_recipe(changed)
    assert "seed = 0" in fails(capsys, lambda: train(smoke(SMOKE, "--seed 5 --out", smoke_run), resume=True))


def test_a_mistake_is_one_line_that_names_it_and_leaves_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # an empty cache; the tests run offline
    (tmp_path / "empty.jsonl").write_text("")
    for options, words in (
        ("--model nobody/no-such-model", "nobody/no-such-model.* tiny"),  # which works without a network
        (f"--problems {tmp_path}/empty.jsonl", "empty.jsonl"),
        ("--device cuda:7", "cuda:7"),
        ("--stages.0.steps 0", "stages.0.steps.*greater than or equal to 1"),
        (f"--out {tmp_path}/empty.jsonl/run", "run folder"),
    ):
        message = fails(capsys, lambda: train(smoke("--out", tmp_path / "run", options)))  # noqa: B023
        assert re.search(words, message), message
    assert "no recipe" in fails(capsys, lambda: parsed("no-such-recipe"))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def qwen2(tmp_path) -> Path:
    """A random Qwen2 whose tokenizer knows no `<think>`, as a folder."""
    tokenizer = changed_tokenizer(tmp_path / "tokenizer", NO_THINKING)
    shape = dict(hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    reference = reference_model(family="qwen2", vocab_size=len(tokenizer), **shape)
    save_model(tmp_path / "qwen2", same_weights(reference), tokenizer)
    return tmp_path / "qwen2"


def options_for(folder: Path) -> str:
    """Train the model in `folder`, in a run beside it."""
    return f"--model {folder} --out {folder.parent}/run --problems generated"


def test_a_model_without_thinking_trains_and_evaluates(qwen2, tmp_path, capsys):
    message = fails(capsys, lambda: train(one_step(options_for(qwen2)), plain=True))
    assert "no <think>" in message
    assert "--sampling.no-thinking" in message
    train(one_step(options_for(qwen2), "--sampling.no-thinking"), quiet=True)
    (trained,) = checkpoints(tmp_path / "run")
    assert json.loads((trained / "config.json").read_text())["model_type"] == "qwen2"
    found = evaluated(capsys, trained, qwen2, samples=1)["models"]
    assert [model["name"] for model in found] == [str(trained), str(qwen2)]
    assert [model["max_new_tokens"] for model in found] == [4, 4]  # as the trained one was asked
    options = dict(recipe="smoke", problems="generated", thinking=True)
    assert "--thinking False" in fails(capsys, lambda: evaluated(capsys, qwen2, **options))


def test_a_run_says_that_its_model_has_no_chat_template(qwen2, capsys):
    (qwen2 / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    recipe = one_step(options_for(qwen2), "--sampling.no-thinking")
    train(replace(recipe, stages=()), plain=True)
    assert "prompts   ChatML, since the model comes without a chat template" in capsys.readouterr().out


def test_a_run_without_room_does_not_block_the_corrected_one(tmp_path, capsys):
    out = f"--out {tmp_path}/run --sampling.max-cache-tokens"
    assert "room for 10 tokens" in fails(capsys, lambda: train(smoke(out, 10)))
    assert "no run to resume" in fails(capsys, lambda: train(smoke(out, 10), resume=True))
    train(one_step(out, 2000), quiet=True)
    assert [row["step"] for row in RunFolder(tmp_path / "run").metrics()] == [0, 1]


def test_the_base_calculates_and_what_is_trained_from_it_solves():
    """The base rarely ends within 256 tokens."""
    recipe = parsed("256 --model tiny").recipe
    problems = problems_of(recipe)[1][:24]

    def evaluated(name: str, tokens: int) -> Evaluation:
        sampling = replace(recipe.sampling, max_new_tokens=tokens)
        options = dict(sampling=sampling, num_samples=1, seed=1)
        return evaluate(*load_model(name), recipe.task, problems, **options)

    assert evaluated("tiny-256", 256).accuracy > 0.5
    base = evaluated("tiny", 512)
    assert base.accuracy < 0.1
    assert sum(len(rollout.completion.token_ids) <= 256 for [rollout] in base.groups) < 4
    assert base.truncated_fraction < 0.8
    text = "\n".join(rollout.text for [rollout] in base.groups)
    steps = re.findall(r"(\d+[-+*/]\d+)=(\d+)", text)
    right = [evaluate_expression(claim) == int(value) for claim, value in steps]
    assert len(right) > 100
    assert sum(right) / len(right) > 0.9


@pytest.mark.parametrize(
    "words, cuda, model, out",
    [
        ("calculus", False, "tiny-calculus", "runs/calculus-tiny"),
        ("calculus --model auto", False, "tiny-calculus", "runs/calculus-tiny"),
        ("256-tiny --model auto", True, "Qwen/Qwen3-1.7B", "runs/256-tiny"),
        ("256 --model tiny-calculus --model tiny", False, "tiny", "runs/256-tiny"),
        ("256 --model=Qwen/Qwen3-0.6B", False, "Qwen/Qwen3-0.6B", "runs/256"),
        ("256 --model=", False, "", "runs/256"),
    ],
)
def test_the_last_model_named_counts_and_auto_is_the_tasks_own(monkeypatch, words, cuda, model, out):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    recipe = parsed(words, "--quiet").recipe
    assert (recipe.model, recipe.out) == (model, out)


def test_models_of_different_tasks_are_not_compared(qwen2):
    """A model from elsewhere is asked as the other one is."""
    recipe = parsed("256 --model tiny").recipe
    with pytest.raises(RecipeError, match="runs/a is for countdown and runs/b is for gsm8k"):
        check_one_task({"runs/a": recipe, "runs/b": replace(recipe, task=GSM8K())})
    models = (str(qwen2), "tiny-calculus")
    kinds = [eval_command.model_of(name, eval_command.Arguments(models)).recipe.task.kind for name in models]
    assert kinds == ["calculus", "calculus"]

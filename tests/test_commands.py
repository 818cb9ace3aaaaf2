"""train.py and eval.py as a user runs them: a small run, a resume, and every mistake in one line."""

import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import ROOT, TIMES, evaluated, fails, parsed, run_command, smoke, timeless
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
from rl.rollout import SamplingSettings


def test_a_run_leaves_its_files_and_metrics_match_rollouts(smoke_run):
    """Every file that the README names is there."""
    for name in (
        "config.json",
        "curve.md",
        "curve.png",
        "report.html",
        "traces.jsonl",
        "rollouts/step_0001.jsonl",
    ):
        assert (smoke_run / name).stat().st_size > 0, name
    assert list(smoke_run.glob("events.out.tfevents*"))
    rows = RunFolder(smoke_run).metrics()
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert list(dict.fromkeys(row["kind"] for row in rows)) == ["grpo", "sft"]
    assert all("eval_accuracy" in row for row in (rows[0], rows[2], rows[-1]))
    rollouts = [
        json.loads(line) for line in (smoke_run / "rollouts" / "step_0001.jsonl").read_text().splitlines()
    ]
    assert rows[1]["reward_mean"] == pytest.approx(
        sum(rollout["reward"] for rollout in rollouts) / len(rollouts)
    )
    assert rows[1]["tokens"] == sum(rollout["tokens"] for rollout in rollouts)
    assert rows[1].keys() >= TIMES - {"eval_seconds"} | {"grad_norm", "policy_entropy", "pass_at_8"}
    assert not [path for path in smoke_run.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
    config = json.loads((smoke_run / "config.json").read_text())
    assert config["recipe"]["seed"] == 0
    assert config["versions"]["torch"] == torch.__version__


def test_eval_puts_models_side_by_side_on_the_same_problems(smoke_run, tmp_path, capsys):
    first, *_, last = checkpoints(smoke_run)
    finished = run_command(
        "eval.py", first, last, "--count", 8, "--samples", 2, "--json", tmp_path / "found.json"
    )
    assert finished.returncode == 0, finished.stderr
    for word in (
        "accuracy, sampled",
        "pass@2",
        "malformed",
        "numbers, ",
        "sampled, against the first",
        "greedy, against the first",
    ):
        assert word in finished.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert [model["name"] for model in found["models"]] == [str(first), str(last)]
    assert found["problems"]["count"] == 8
    assert found["problems"]["sha256"] in finished.stdout
    assert found["differences"][0]["to"] == str(last)
    assert evaluated(capsys, first, last, count=8, samples=2) == found


def test_eval_repeats_the_training_runs_own_evaluation(smoke_run, capsys):
    (found,) = evaluated(capsys, checkpoints(smoke_run)[-1], samples=1)["models"]
    row = RunFolder(smoke_run).metrics()[-1]
    assert (found["accuracy"]["mean"], found["accuracy"]["low"]) == (row["final_accuracy"], row["final_low"])
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
def test_a_run_in_low_precision_resumes_bit_for_bit(kind, tmp_path):
    """Stopped within the second stage; activation checkpointing, switched on then, changes nothing either."""
    pytest.importorskip("bitsandbytes")
    options = f"{LOW_PRECISION[kind]} --keep-checkpoints 99 --stages.0.prompts-per-step 2"
    # Little of everything: bfloat16 is slow where it is emulated.
    options += " --stages.2.prompts-per-step 2 --evaluation.problems 2 --evaluation.final-problems 2"
    train(smoke("--out", tmp_path / "whole", options), quiet=True)
    whole = checkpoints(tmp_path / "whole")
    copy = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", copy)
    for folder in checkpoints(copy)[3:]:
        shutil.rmtree(folder)
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "cut sho')  # as a crash leaves it
    again = smoke("--out", copy, options, "--optimizer.activation-checkpointing")
    train(again, resume=True, quiet=True)
    ours, theirs = (
        safetensors.torch.load_file(run / "model.safetensors") for run in (whole[-1], checkpoints(copy)[-1])
    )
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert timeless(copy) == timeless(tmp_path / "whole")
    start = load_model("tiny-256")[0].state_dict()
    saved = load_model(whole[-1])[0]  # a plain model in Hugging Face's layout, which has learned something
    assert saved.state_dict().keys() == start.keys()
    assert any(
        not torch.equal(tensor, start[name].to(tensor.dtype)) for name, tensor in saved.state_dict().items()
    )


def test_only_settings_of_memory_and_speed_may_change_on_resume(smoke_run, capsys):
    run = RunFolder(smoke_run)
    for option in ("--sampling.max-cache-tokens 500", "--optimizer.micro-batch-tokens 300"):
        run.check_recipe(smoke("--keep-checkpoints 99", option))
    for option in ("--sampling.max-new-tokens 95", "--stages.0.kl-coef 0.1"):
        with pytest.raises(RecipeError, match="was started with"):
            run.check_recipe(smoke("--keep-checkpoints 99", option))
    recipe = smoke("--keep-checkpoints 99")
    with pytest.raises(RecipeError, match="was started with stages.3"):
        run.check_recipe(replace(recipe, stages=(*recipe.stages, recipe.stages[0])))
    message = fails(capsys, lambda: train(smoke("--seed 5 --out", smoke_run), resume=True))
    assert "seed = 0" in message


def test_a_mistake_is_one_line_that_names_it_and_leaves_no_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # an empty cache; the tests run offline
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    cut = shutil.copytree(ROOT / "model" / "tiny", tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:100_000])
    for options, words in (
        ("--model ./no-such/folder", "no-such/folder"),
        ("--model nobody/no-such-model", "nobody/no-such-model.* tiny"),  # which works without a network
        (f"--model {tmp_path}", "mistral"),
        (f"--model {tmp_path}/cut", "model.safetensors"),
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
    shape = dict(
        vocab_size=len(tokenizer), hidden_size=16, num_attention_heads=2, num_key_value_heads=1, head_dim=8
    )
    save_model(tmp_path / "qwen2", same_weights(reference_model(family="qwen2", **shape)), tokenizer)
    return tmp_path / "qwen2"


def test_a_model_without_thinking_trains_and_evaluates(qwen2, tmp_path, capsys):
    options = f"--model {qwen2} --problems generated --sampling.max-new-tokens 8 --out {tmp_path}/run"
    message = fails(capsys, lambda: train(smoke(options), plain=True))
    assert "no <think>" in message
    assert "--sampling.no-thinking" in message
    train(smoke(options, "--sampling.no-thinking"), quiet=True)
    trained = checkpoints(tmp_path / "run")[-1]
    assert json.loads((trained / "config.json").read_text())["model_type"] == "qwen2"
    found = evaluated(capsys, trained, qwen2, count=4, samples=1)
    assert [model["name"] for model in found["models"]] == [str(trained), str(qwen2)]
    assert [model["max_new_tokens"] for model in found["models"]] == [8, 8]  # as the trained one was asked
    message = fails(capsys, lambda: evaluated(capsys, qwen2, count=4, problems="generated", thinking=True))
    assert "--thinking False" in message


def test_a_run_says_that_its_model_has_no_chat_template(qwen2, tmp_path, capsys):
    path = qwen2 / "tokenizer_config.json"
    path.write_text(json.dumps({"eos_token": "<|im_end|>"}))
    options = f"--model {qwen2} --problems generated --sampling.max-new-tokens 8 --sampling.no-thinking"
    train(replace(smoke(options, "--out", tmp_path / "run"), stages=()), plain=True)
    assert "prompts   ChatML, since the model comes without a chat template" in capsys.readouterr().out


def test_a_hostile_chat_template_is_one_line(qwen2, tmp_path, capsys):
    (qwen2 / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    options = f"--model {qwen2} --problems generated --sampling.no-thinking --out {tmp_path}/run"
    assert "template" in fails(capsys, lambda: train(smoke(options)))
    assert "template" in fails(capsys, lambda: evaluated(capsys, qwen2, count=4, problems="generated"))


def test_eval_takes_settings_of_sampling_that_exist():
    settings = {field.name for field in fields(SamplingSettings)}
    options = {field.name for field in fields(eval_command.Arguments)}
    assert set(eval_command.SAMPLING) <= settings & options


def test_a_run_without_room_does_not_block_the_corrected_one(tmp_path, capsys):
    out = f"--out {tmp_path}/run --sampling.max-cache-tokens"
    assert "room for 10 tokens" in fails(capsys, lambda: train(smoke(out, 10)))
    assert "no run to resume" in fails(capsys, lambda: train(smoke(out, 10), resume=True))
    train(smoke(out, 2000), quiet=True)
    assert [row["step"] for row in RunFolder(tmp_path / "run").metrics()][:3] == [0, 1, 2]


def test_the_base_calculates_and_what_is_trained_from_it_solves():
    """The base rarely ends within 256 tokens."""
    recipe = parsed("256 --model tiny").recipe
    problems = problems_of(recipe)[1]

    def evaluated(name: str, count: int, tokens: int) -> Evaluation:
        sampling = replace(recipe.sampling, max_new_tokens=tokens)
        return evaluate(
            *load_model(name), recipe.task, problems[:count], sampling=sampling, num_samples=1, seed=1
        )

    short, long, trained = (
        evaluated("tiny", 256, 256),
        evaluated("tiny", 96, 1024),
        evaluated("tiny-256", 128, 256),
    )
    assert short.accuracy < 0.015
    assert short.truncated_fraction > 0.85
    assert long.truncated_fraction < 0.4
    assert trained.accuracy > 0.5
    steps = [step for [rollout] in long.groups for step in re.findall(r"(\d+[-+*/]\d+)=(\d+)", rollout.text)]
    right = [evaluate_expression(claim) == int(value) for claim, value in steps]
    assert len(right) > 1000
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

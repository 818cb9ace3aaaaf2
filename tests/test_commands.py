"""train.py and eval.py as a user runs them: a whole small run, a resume that changes nothing, and every mistake in one line."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

import eval as eval_command
import train as train_command
from data import GSM8K, Problem
from lab.checkpoint import checkpoints
from lab.errors import user_errors
from lab.evaluate import evaluate
from lab.recipe import RecipeError, problems_of
from lab.runfolder import RunFolder
from lab.stages import train
from model import load_model
from rl import score

ROOT = Path(__file__).parent.parent
METRICS = {
    "stage", "step", "reward_mean", "train_accuracy", "format_rate", "entropy", "clip_fraction", "grad_norm", "lr",
    "completion_length", "truncated_fraction", "tokens", "rollout_seconds", "update_seconds", "tokens_per_second",
    "peak_memory_bytes", "near_fraction", "non_latin_fraction", "pass_at_2", "pass_at_8", "policy_entropy",
}  # fmt: skip
TIMES = {"rollout_seconds", "update_seconds", "tokens_per_second", "peak_memory_bytes", "eval_seconds"}


def run_command(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, **options)


def smoke(*overrides):
    """Parsed arguments of the smoke recipe."""
    return train_command.parse(["smoke", "--model", "tiny", *map(str, overrides)])


def timeless(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in RunFolder(run).metrics()]


@pytest.fixture(scope="module")
def smoke_run(tmp_path_factory) -> Path:
    """One run of the smoke recipe through the command line; all checkpoints kept."""
    out = tmp_path_factory.mktemp("runs") / "smoke"
    finished = run_command("train.py", "smoke", "--model", "tiny", "--out", out, "--keep-checkpoints", 99)
    assert finished.returncode == 0, finished.stderr
    assert "held-out" in finished.stdout and "done" in finished.stdout
    return out


def test_a_run_leaves_what_the_readme_says(smoke_run):
    for name in (
        "config.json",
        "metrics.jsonl",
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
    assert all(row.keys() >= METRICS for row in rows[1:] if row["kind"] == "grpo")
    assert all("eval_accuracy" in row for row in (rows[0], rows[2], rows[-1]))
    assert not [path for path in smoke_run.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl")]
    config = json.loads((smoke_run / "config.json").read_text())
    assert config["recipe"]["seed"] == 0 and config["versions"]["torch"] == torch.__version__


def test_curated_traces_are_correct_and_not_held_out(smoke_run):
    rows = [json.loads(line) for line in (smoke_run / "traces.jsonl").read_text().splitlines()]
    _, held_out = problems_of(smoke().recipe)
    for row in rows:
        problem = Problem(row["numbers"], row["target"])
        assert score(row["completion"], problem).outcome == "correct"
        assert problem.key not in {other.key for other in held_out}


def test_metrics_agree_with_the_saved_rollouts(smoke_run):
    for row in RunFolder(smoke_run).metrics():
        if row["step"] and row["kind"] == "grpo":
            path = smoke_run / "rollouts" / f"step_{row['step']:04d}.jsonl"
            rollouts = [json.loads(line) for line in path.read_text().splitlines()]
            rewards = [rollout["reward"] for rollout in rollouts]
            assert row["reward_mean"] == pytest.approx(sum(rewards) / len(rewards))
            assert row["tokens"] == sum(rollout["tokens"] for rollout in rollouts)
            assert row["truncated_fraction"] == sum(not r["finished"] for r in rollouts) / len(rollouts)


def test_a_checkpoint_loads_in_transformers_with_the_same_logits(smoke_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = checkpoints(smoke_run)[-1]
    ours, tokenizer = load_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    text = "<|im_start|>user\n3+4=7 too low\n</think>"
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode(text)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_old_checkpoints_are_pruned_but_stage_ends_are_kept(tmp_path):
    train(smoke("--out", tmp_path / "run", "--keep-checkpoints", 1, "--stages.0.steps", 3).recipe, quiet=True)
    names = [folder.name for folder in checkpoints(tmp_path / "run")]
    assert names[0] == "step_0003" and len(names) == 3


def test_eval_puts_models_side_by_side_on_the_same_problems(smoke_run, tmp_path):
    first, last = checkpoints(smoke_run)[0], checkpoints(smoke_run)[-1]
    finished = run_command("eval.py", first, last, "--count", 8, "--samples", 2, "--json", tmp_path / "found.json")
    assert finished.returncode == 0, finished.stderr
    for word in ("accuracy, sampled", "accuracy, greedy", "pass@2", "majority of 2", "correct", "near", "wrong", "malformed",
                 "length, tokens", "numbers, ", "against the first", "greedy: gained"):  # fmt: skip
        assert word in finished.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert [model["name"] for model in found["models"]] == [str(first), str(last)]
    assert found["problems"]["count"] == 8 and found["problems"]["sha256"] in finished.stdout
    assert found["differences"][0]["to"] == str(last)
    again = run_command("eval.py", first, last, "--count", 8, "--samples", 2, "--json", "-")
    assert json.loads(again.stdout) == found


def test_eval_repeats_the_training_runs_own_evaluation(smoke_run, capsys):
    eval_command.main(eval_command.Arguments((str(checkpoints(smoke_run)[-1]),), samples=1, json="-"))
    (found,) = json.loads(capsys.readouterr().out)["models"]
    row = RunFolder(smoke_run).metrics()[-1]
    assert (found["accuracy"]["mean"], found["accuracy"]["low"]) == (row["final_accuracy"], row["final_low"])
    assert found["greedy"]["mean"] == row["final_greedy_accuracy"]


def test_eval_scores_completions_made_elsewhere_beside_a_model(smoke_run, tmp_path, capsys):
    rollouts = RunFolder(smoke_run).rollout_files()[0]
    eval_command.main(eval_command.Arguments((str(rollouts), "tiny"), samples=2, json="-"))
    found = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in rollouts.read_text().splitlines()]
    scored, sampled = found["models"]
    assert scored["outcomes"]["malformed"] == sum(row["outcome"] == "malformed" for row in rows) / len(rows)
    assert scored["completion_length"] == pytest.approx(sum(row["tokens"] for row in rows) / len(rows))
    assert "greedy" not in scored and "greedy" in sampled and sampled["samples"] == 2
    assert found["problems"]["count"] == len({(row["target"], *sorted(row["numbers"])) for row in rows})
    one = tmp_path / "one.jsonl"
    one.write_text('{"numbers": [5, 6], "target": 11, "completion": "x</think><answer>5+6</answer>"}')
    message = fails(capsys, lambda: eval_command.main(eval_command.Arguments((str(rollouts), str(one)))))
    assert "one.jsonl has no completion of" in message
    eval_command.main(eval_command.Arguments((str(one),), json="-"))
    (model,) = json.loads(capsys.readouterr().out)["models"]
    assert model["accuracy"]["mean"] == 1.0 and "completion_length" not in model


def test_eval_leaves_out_what_another_of_the_models_was_trained_on(smoke_run, tmp_path, capsys):
    """Another seed holds out other problems, many of which the first run trained on."""
    train(smoke("--out", tmp_path / "run", "--seed", 1, "--stages.0.steps", 1, "--stages.2.steps", 1).recipe, quiet=True)
    others = [str(checkpoints(run)[-1]) for run in (smoke_run, tmp_path / "run")]
    recipes = [eval_command.model_of(source, eval_command.Arguments(())).recipe for source in others]
    (_train_0, held_0), (train_1, _held_1) = map(problems_of, recipes)
    models = [eval_command.model_of(source, eval_command.Arguments(())) for source in others]
    try:
        chosen = eval_command.problems_for(models, eval_command.Arguments(()))
    except RecipeError as error:
        chosen = []
        assert "trained on by one of the models" in str(error)
    seen = {problem.key for problem in train_1}
    assert chosen == [problem for problem in held_0 if problem.key not in seen]
    assert len(chosen) == len(held_0) or f"{len(held_0) - len(chosen)} of {len(held_0)}" in capsys.readouterr().err


def test_help_lists_every_field_with_its_default():
    finished = run_command("train.py", "256", "--help")
    assert finished.returncode == 0
    for option in ("--stages.0.steps", "--stages.1.epochs", "--stages.2.steps", "--sampling.max-new-tokens",
                   "--optimizer.micro-batch-tokens", "--task.max-number", "--out", "--resume"):  # fmt: skip
        assert option in finished.stdout
    assert run_command("eval.py", "--help").returncode == 0


def fails(capsys, action) -> str:
    """The one line of an action that a user's mistake ends, with exit code 2."""
    with pytest.raises(SystemExit) as exit_, user_errors():
        action()
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and message.startswith("error: ")
    return message


def test_a_second_run_in_the_same_folder_is_refused(smoke_run, capsys):
    message = fails(capsys, lambda: train(smoke("--out", smoke_run).recipe))
    assert str(smoke_run) in message and "--resume" in message


def test_an_evaluation_never_takes_problems_that_its_checkpoint_was_trained_on(smoke_run, capsys):
    checkpoint = str(checkpoints(smoke_run)[-1])
    message = fails(capsys, lambda: eval_command.main(eval_command.Arguments((checkpoint,), count=33)))
    assert "--count must be from 1 to 32" in message


def test_resuming_with_another_recipe_is_refused(smoke_run, capsys):
    message = fails(capsys, lambda: train(smoke("--out", smoke_run, "--seed", 5).recipe, resume=True))
    assert "seed = 0" in message


LOW_PRECISION = {
    "adapters over int8": ["--adapters.rank", 4],
    "bfloat16 by chance": ["--dtype", "bfloat16", "--optimizer.kind", "adamw8bit", "--optimizer.rounding", "stochastic"],
}


@pytest.mark.parametrize("kind", LOW_PRECISION)
def test_a_run_in_low_precision_resumes_bit_for_bit_and_leaves_plain_checkpoints(kind, tmp_path):
    """Stopped within the second stage; activation checkpointing, switched on then, changes nothing either."""
    pytest.importorskip("bitsandbytes")
    options = [*LOW_PRECISION[kind], "--keep-checkpoints", 99]
    train(smoke("--out", tmp_path / "whole", *options).recipe, quiet=True)
    whole = checkpoints(tmp_path / "whole")
    copy = tmp_path / "resumed"
    shutil.copytree(tmp_path / "whole", copy)
    for folder in checkpoints(copy)[3:]:
        shutil.rmtree(folder)
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 99, "cut sho')  # as a crash leaves it
    again = smoke("--out", copy, *options, "--optimizer.activation-checkpointing")
    train(again.recipe, resume=True, quiet=True)
    ours, theirs = (safetensors.torch.load_file(run / "model.safetensors") for run in (whole[-1], checkpoints(copy)[-1]))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert timeless(copy) == timeless(tmp_path / "whole")
    start = load_model("tiny")[0].state_dict()
    saved = load_model(whole[-1])[0]  # a plain model in Hugging Face's layout, which has learned something
    assert saved.state_dict().keys() == start.keys()
    assert any(not torch.equal(tensor, start[name].to(tensor.dtype)) for name, tensor in saved.state_dict().items())


def test_a_run_that_cannot_fit_is_refused_with_advice_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lab.setup.free_memory", lambda device: 10_000_000)
    message = fails(capsys, lambda: train(smoke("--out", tmp_path / "run", "--optimizer.micro-batch-tokens", 3000).recipe))
    assert "10 MB are free" in message and "--optimizer.activation-checkpointing saves" in message
    assert not (tmp_path / "run").exists()


def test_settings_of_memory_and_speed_may_change_on_resume_and_no_others(smoke_run):
    for overrides in (("--sampling.max-cache-tokens", 500), ("--optimizer.micro-batch-tokens", 300)):
        RunFolder(smoke_run).check_recipe(smoke("--keep-checkpoints", 99, *overrides).recipe)
    for overrides in (("--sampling.max-new-tokens", 95), ("--stages.0.kl-coef", 0.1)):
        with pytest.raises(RecipeError, match="was started with"):
            RunFolder(smoke_run).check_recipe(smoke("--keep-checkpoints", 99, *overrides).recipe)


def test_stages_cannot_be_added_on_resume(smoke_run):
    recipe = smoke("--keep-checkpoints", 99).recipe
    with pytest.raises(RecipeError, match="was started with stages.3"):
        RunFolder(smoke_run).check_recipe(replace(recipe, stages=(*recipe.stages, recipe.stages[0])))


def test_resuming_nothing_is_refused(tmp_path, capsys):
    assert "no run to resume" in fails(capsys, lambda: train(smoke("--out", tmp_path).recipe, resume=True))


def test_bad_names_end_in_one_line(tmp_path, capsys, monkeypatch):
    def recipe(*overrides):
        return smoke("--out", tmp_path / "run", *overrides).recipe

    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert "no recipe" in fails(capsys, lambda: train_command.parse(["no-such-recipe"]))
    assert "no-such/folder" in fails(capsys, lambda: train(recipe("--model", "./no-such/folder")))
    assert "empty.jsonl" in fails(capsys, lambda: train(recipe("--problems", empty)))
    assert "cuda:7" in fails(capsys, lambda: train(recipe("--device", "cuda:7")))
    assert "from 1 to 1,000,000" in fails(capsys, lambda: recipe("--stages.0.steps", 0))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_a_qwen3_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    run = tmp_path / "run"
    assert "llama" in fails(capsys, lambda: train(smoke("--model", tmp_path, "--out", run).recipe))


def test_truncated_weights_are_refused(tmp_path, capsys):
    shutil.copytree(ROOT / "model" / "tiny", tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    action = lambda: train(smoke("--model", tmp_path / "cut", "--out", tmp_path / "run").recipe)  # noqa: E731
    assert "model.safetensors" in fails(capsys, action)


def test_no_network_is_said_in_one_line(tmp_path, capsys, monkeypatch):
    """The hub is unreachable (the tests run offline): the line names the model and what works without a network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    message = fails(capsys, lambda: train(smoke("--model", "nobody/no-such-model", "--out", tmp_path / "run").recipe))
    assert "nobody/no-such-model" in message and "tiny" in message


def test_a_run_without_room_is_not_in_the_way_of_the_corrected_one(tmp_path, capsys):
    out = ("--out", tmp_path / "run", "--sampling.max-cache-tokens")
    assert "room for 10 tokens" in fails(capsys, lambda: train(smoke(*out, 10).recipe))
    assert "no run to resume" in fails(capsys, lambda: train(smoke(*out, 10).recipe, resume=True))
    train(smoke(*out, 2000).recipe, quiet=True)
    assert [row["step"] for row in RunFolder(tmp_path / "run").metrics()][:3] == [0, 1, 2]


def test_an_unwritable_run_folder_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert "run folder" in fails(capsys, lambda: train(smoke("--out", tmp_path / "file" / "run").recipe))


def test_unknown_options_end_with_exit_code_2():
    finished = run_command("train.py", "smoke", "--stages.0.stepps", 3)
    assert finished.returncode == 2 and "stepps" in finished.stderr + finished.stdout
    assert "Traceback" not in finished.stderr


def test_the_embedded_model_calculates_but_does_not_solve():
    """What its base training promises: nearly every step right as arithmetic, almost no problem solved."""
    recipe = train_command.parse(["256", "--model", "tiny"]).recipe
    model, tokenizer = load_model("tiny")
    problems = problems_of(recipe)[1][:256]
    result = evaluate(model, tokenizer, recipe.task, problems, sampling=recipe.sampling, num_samples=1, seed=1)
    assert result.accuracy < 0.08
    steps = [step for [rollout] in result.groups for step in re.findall(r"(\d+)([-+*/])(\d+)=(\d+)", rollout.text)]
    right = [
        int(value) == {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b), "/": int(a) / max(1, int(b))}[op]
        for a, op, b, value in steps
    ]
    assert len(right) > 1000 and sum(right) / len(right) > 0.9


@pytest.mark.parametrize(
    "arguments, cuda, model, out",
    [
        (["calculus"], False, "tiny-calculus", "runs/calculus-tiny"),
        (["calculus", "--model", "auto"], False, "tiny-calculus", "runs/calculus-tiny"),
        (["calculus", "--model", "auto"], True, "Qwen/Qwen3-1.7B", "runs/calculus"),
        (["256-tiny", "--model", "auto"], True, "Qwen/Qwen3-1.7B", "runs/256-tiny"),
        (["256", "--model", "tiny-calculus", "--model", "tiny"], False, "tiny", "runs/256-tiny"),
        (["256", "--model=Qwen/Qwen3-0.6B"], False, "Qwen/Qwen3-0.6B", "runs/256"),
        (["256", "--model", ""], False, "", "runs/256"),
    ],
)
def test_the_last_model_named_counts_and_auto_is_the_one_that_the_task_has(monkeypatch, arguments, cuda, model, out):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    recipe = train_command.parse([*arguments, "--quiet"]).recipe
    assert (recipe.model, recipe.out) == (model, out)


def test_models_of_different_tasks_are_not_compared_and_those_from_elsewhere_take_the_others_task():
    recipe = train_command.parse(["256", "--model", "tiny"]).recipe
    countdown = eval_command.Model("runs/a", recipe, trained=True)
    words = eval_command.Model("runs/b", replace(recipe, task=GSM8K()), trained=True)
    elsewhere = eval_command.Model("Qwen/Qwen3-1.7B", recipe, trained=False)
    with pytest.raises(RecipeError, match="runs/a is for countdown and runs/b for gsm8k"):
        eval_command.of_one_task([countdown, words])
    assert [model.recipe.task for model in eval_command.of_one_task([elsewhere, words])] == [GSM8K(), GSM8K()]
    assert eval_command.of_one_task([elsewhere, elsewhere]) == [elsewhere, elsewhere]

"""Files and places as people have them: what other tools leave behind, and what a run does with it."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from helpers import PROBLEM, largest_gap, random_model, weights
from reference import ROOT, TINY
from test_commands import smoke

import eval as eval_command
import play as play_command
import train as train_command
from data import score
from data.gsm8k import WordProblem
from data.traces import Trace, save_traces
from lab.boards import Boards
from lab.checkpoint import TrainState, checkpoints, prune_checkpoints
from lab.comparison import Candidate, comparison_table, measures
from lab.device import pick_device
from lab.evaluate import Evaluation
from lab.recipe import RecipeError, load_recipe, problems_of
from lab.runfolder import RunFolder
from lab.screen import LiveScreen, plain_console, progress_bar
from lab.setup import load_policy, set_up, stage_start_model
from lab.stages import train
from model import Completion, Qwen3Config, Tokenizer, generate, load_model, save_model
from model.sampler import TokenChoice, random_uniforms, sample_completion
from rl.batch import Sample, logprobs_and_entropy, make_batch
from rl.rollout import Rollout

CPU = torch.device("cpu")


def copied(tmp_path, **files):
    """The embedded model's folder with other contents of some files, given by name without .json."""
    folder = shutil.copytree(TINY, tmp_path / "model")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_truncation_and_padding_in_a_tokenizers_file_are_not_heeded_as_in_transformers(tmp_path):
    stored = json.loads((TINY / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None}
    stored["padding"] = padding | {"pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    folder = copied(tmp_path, tokenizer=stored)
    text = "79 - 60 + 17 = 36 " * 9
    ids = Tokenizer(folder).encode(text)
    assert ids == Tokenizer(TINY).encode(text) == transformers.AutoTokenizer.from_pretrained(folder).encode(text)


def test_a_chat_template_stays_with_the_checkpoints(tmp_path):
    folder = copied(tmp_path)
    (folder / "chat_template.jinja").write_text("{% for message in messages %}<{{ message.content }}>{% endfor %}")
    save_model(tmp_path / "saved", *load_model(folder))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.apply_chat_template([{"role": "user", "content": "hm"}], tokenize=False) == "<hm>"


def test_a_whole_file_counts_beside_the_index_of_an_earlier_save(tmp_path):
    folder = copied(tmp_path)
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert largest_gap(weights(load_model(folder)[0]), weights(load_model("tiny")[0])) == 0
    transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("scaling", [{"rope_type": "default", "rope_theta": 1e6}, {"type": "default"}, {}, None])
def test_the_plain_rope_by_its_name_is_the_plain_rope(scaling):
    stored = json.loads((TINY / "config.json").read_text())
    plain = Qwen3Config.from_hf(stored)
    theta = (scaling or {}).get("rope_theta", plain.rope_theta)
    assert Qwen3Config.from_hf(stored | {"rope_scaling": scaling}) == replace(plain, rope_theta=theta)


def test_a_model_of_any_precision_is_sampled_and_scored():
    model = random_model(dtype=torch.float64, std=0.2)
    options = dict(num_samples=2, max_new_tokens=6, seed=3)
    ((first, _),) = generate(model, [[5, 17, 3]], **options)
    uniforms = random_uniforms([[5, 17, 3]], 2, 6, seed=3)[0, 0]
    ids, logprobs = zip(*sample_completion(model, [5, 17, 3], uniforms, (), TokenChoice()))
    assert first.token_ids == list(ids) and np.allclose(first.logprobs, logprobs, rtol=1e-12)
    assert first.logprobs != np.float32(first.logprobs).tolist()  # none is rounded
    batch = make_batch([Sample([5, 17, 3], first.token_ids, first.logprobs, 1.0)])
    scored = logprobs_and_entropy(model, batch).logprobs[0].tolist()
    assert np.allclose(scored, first.logprobs, rtol=1e-10)


def test_a_notebooks_backend_that_is_not_installed_ends_no_run(tmp_path):
    code = "from lab.plots import plot_curve; plot_curve([dict(step=0, stage=0, kind='grpo', grpo_steps=0, eval_accuracy=0.1, "
    code += f"eval_low=0, eval_high=1)], [], '{tmp_path}/curve.png')"
    environment = os.environ | {"MPLBACKEND": "module://not_installed_here.backend_inline"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)
    assert (tmp_path / "curve.png").exists()


THOUGHT = "so 79 - 60 = 19\n</think>\n<answer>79 - 60 + 17</answer>"


def test_a_completion_may_open_the_thinking_that_the_prompt_has_opened_once_at_its_start():
    for thinking in (True, False):
        assert score(f" \n<think>\n{THOUGHT}", PROBLEM, thinking).outcome == "correct"
        assert score(f"<think><think>{THOUGHT}", PROBLEM, thinking).outcome == "malformed"
        assert score(f"hm <think>{THOUGHT}", PROBLEM, thinking).outcome == "malformed"


def test_traces_of_a_server_are_learned_as_if_the_prompt_had_opened_the_tag(tmp_path, monkeypatch):
    learned = []
    monkeypatch.setattr("lab.stages.sft_schedule", lambda samples, *_: learned.append(samples) or [])
    recipe = smoke("--stages.1.traces", tmp_path / "mine.jsonl", "--evaluation.problems", 4).recipe
    recipe = replace(recipe, stages=recipe.stages[1:2])
    problem = problems_of(recipe)[0][0]
    solved = f"so</think><answer>{recipe.task.solution(problem)}</answer>"
    for number, text in enumerate((solved, f"<think>{solved}")):
        save_traces(tmp_path / "mine.jsonl", [Trace(problem, text)])
        train(replace(recipe, out=str(tmp_path / str(number))), quiet=True)
    assert learned[0] == learned[1] and learned[0][0].completion_ids


def test_a_last_sft_stage_without_traces_still_ends_in_the_final_evaluation(tmp_path):
    recipe = smoke("--evaluation.problems", 4, "--evaluation.final-problems", 6, "--out", tmp_path / "run").recipe
    grpo = replace(recipe.stages[0], steps=1, prompts_per_step=1, samples_per_prompt=2, updates_per_step=1)
    recipe = replace(recipe, sampling=replace(recipe.sampling, max_new_tokens=2), stages=(grpo, recipe.stages[1]))
    train(recipe, quiet=True)
    rows = RunFolder(tmp_path / "run").metrics()
    assert [row["step"] for row in rows] == [0, 1, 1] and rows[-1]["final_accuracy"] == 0.0
    # Nobody has an advantage, so there is no update to measure.
    unmeasured = ("loss", "grad_norm", "clip_fraction", "policy_entropy", "log_ratio_mean", "log_ratio_std")
    assert all(math.isnan(rows[1][name]) for name in unmeasured)
    assert '"grad_norm": null' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_the_best_checkpoint_is_one_that_was_evaluated(tmp_path):
    for step in range(1, 6):
        folder = tmp_path / "checkpoints" / f"step_{step:04d}"
        folder.mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"stage_step": step, "step": step}))
    prune_checkpoints(tmp_path, 2, {3: 0.0})
    assert [folder.name[-1] for folder in checkpoints(tmp_path)] == ["3", "4", "5"]
    prune_checkpoints(tmp_path, 1, {})
    assert [folder.name[-1] for folder in checkpoints(tmp_path)] == ["5"]


@pytest.mark.parametrize("module", ["Kernel Module  470.57.02  Tue Jul", "Open Kernel Module for x86_64  545.23.08  Mon"])
def test_a_card_that_this_torch_cannot_use_is_an_error_with_both_versions_and_the_way_out(module, monkeypatch):
    monkeypatch.setattr("lab.device.read", lambda path: f"NVRM version: NVIDIA UNIX {module}" if "nvidia" in path else "")
    monkeypatch.setattr("lab.device.CARD", ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(RecipeError, match=r"(470.57.02|545.23.08).*CUDA 13.0.*--model tiny or --device"):
        train_command.parse(["256"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert train_command.parse(["256"]).recipe.model == "tiny"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert train_command.parse(["256", "--device", "cpu"]).recipe.model == "tiny"
    assert train_command.parse(["256", "--model", "tiny"]).recipe.model == "tiny"


def test_the_device_of_a_recipe_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    for name in ("cuda:1", "cuda", "cpu"):
        assert pick_device(replace(smoke().recipe, device=name)) == torch.device(name)
    assert current == ["cuda:1"]


def test_a_new_run_in_a_folder_of_the_same_name_is_another_run_to_wandb(tmp_path, monkeypatch):
    ids = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: ids.append(options["id"])))
    for _ in range(2):
        (tmp_path / "run").mkdir()
        Boards(tmp_path / "run").start_wandb({})
        Boards(tmp_path / "run").start_wandb({})  # as a resumed run does
        shutil.rmtree(tmp_path / "run")
    assert ids[0] == ids[1] != ids[2] == ids[3]


def test_the_reference_of_a_policy_with_adapters_has_its_base_and_what_is_evaluated_is_what_was_trained(tmp_path):
    pytest.importorskip("bitsandbytes")
    options = ["--adapters.rank", 4, "--stages.0.learning-rate", 1e-2, "--dtype", "bfloat16", "--evaluation.problems", 4]
    recipe = smoke("--out", tmp_path / "run", *options).recipe
    policy, *_ = set_up(recipe, None, TrainState())
    reference = stage_start_model(policy, recipe, RunFolder(tmp_path / "run"), TrainState())
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        assert torch.equal(policy(ids), reference(ids)) and not any(p.requires_grad for p in reference.parameters())
        assert not torch.equal(policy(ids), load_model("tiny-256", CPU, torch.bfloat16)[0](ids))  # the base is in int8
    grpo = replace(recipe.stages[0], steps=1, prompts_per_step=2, samples_per_prompt=4, updates_per_step=1)
    train(replace(recipe, stages=(grpo,)), quiet=True)
    (folder,) = checkpoints(tmp_path / "run")
    loaded, _ = load_policy(eval_command.model_of(str(folder), eval_command.Arguments((str(folder),))).recipe, folder, CPU)
    later = stage_start_model(policy, recipe, RunFolder(tmp_path / "run"), TrainState(stage=1))
    with torch.no_grad():
        assert torch.equal(loaded(ids), later(ids)) and not torch.equal(loaded(ids), policy(ids))


HOSTILE = "a [/INST] [bold]b[/bold] :smile: [/x]"


def test_texts_from_outside_are_shown_as_they_are_on_the_live_screen(monkeypatch):
    """In a run's path, a problem, a completion, and whatever is said: none of it is markup, none is an emoji."""
    recipe = replace(load_recipe("256", "tiny")[1], out=f"runs/{HOSTILE}")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("LINES", "60")
    shown = LiveScreen(recipe, plain_console())
    problem = WordProblem(HOSTILE, "#### 1")
    shown.rollouts([[Rollout(problem, [1], Completion([5], [-0.5], True), HOSTILE, "correct", 1.0)]])
    with shown.console.capture() as capture:
        shown.console.print(shown.draw())
        shown.say(HOSTILE)
    assert capture.get().count(HOSTILE) == 4


def test_texts_from_outside_are_shown_as_they_are_in_eval_play_and_progress_bars(capsys, monkeypatch):
    problem = WordProblem(HOSTILE, "#### 1")
    group = [Rollout(problem, [1], Completion([5], [-0.5], True), HOSTILE, "correct", 1.0)]
    recipe = replace(load_recipe("gsm8k")[1], model=HOSTILE)
    candidate = Candidate(HOSTILE, recipe, Evaluation.of([group]), Evaluation.of([group]))
    monkeypatch.setenv("COLUMNS", "200")
    console = plain_console()
    console.print(comparison_table(HOSTILE, [measures(candidate)], []))
    eval_command.print_examples(candidate, 1, console)
    player = play_command.Player(HOSTILE, recipe, None, None)
    console.print(play_command.side_by_side([player], [(HOSTILE, HOSTILE)]))
    assert capsys.readouterr().out.count(HOSTILE) == 2 + 3 + 3
    monkeypatch.setattr("lab.screen.can_draw", lambda stream: True)
    with progress_bar(HOSTILE, 3) as show:
        show(1, 10)
    assert HOSTILE in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)

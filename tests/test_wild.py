"""Files and places as people have them: what other tools leave behind, and what a run does with it."""

import errno
import itertools
import json
import os
import re
import shutil
import stat
import sys
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from helpers import (
    PROBLEM,
    QUICK,
    Hub,
    evaluated,
    fails,
    largest_gap,
    one_step,
    parsed,
    random_model,
    rollout,
    smoke,
    weights,
    write_jsonl,
)
from reference import ROOT, TINY, TINY_TOKENS

import eval as eval_command
import play as play_command
from data import DataError, Problem, load_problems
from data.gsm8k import WordProblem
from data.traces import Trace, save_traces
from lab.boards import Boards
from lab.checkpoint import TrainState, checkpoints, load_state, saved_recipe, seen_by
from lab.comparison import Candidate, comparison_table, measures
from lab.device import pick_device
from lab.evaluate import Evaluation, problems_hash
from lab.recipe import EvaluationSettings, RecipeError, load_recipe, problems_of, recipe_for
from lab.runfolder import RunFolder, sync
from lab.screen import LiveScreen, plain_console, progress_bar
from lab.setup import load_policy, set_up, stage_start_model
from lab.stages import train
from model import ModelError, Qwen3, Qwen3Config, Tokenizer, generate, load_model, save_model
from model.sampler import TokenChoice, sample_completion
from model.weights import is_bundled
from rl.batch import Sample, logprobs_and_entropy, make_batch

CONFIG = json.loads((TINY / "config.json").read_text())
CPU = torch.device("cpu")


def copied(tmp_path, **files):
    """The bundled model's folder with other contents of some files, given by name without .json."""
    folder = shutil.copytree(TINY, tmp_path / "model")
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def change_weights(folder, change) -> None:
    """Save a model's weights again, each as `change` makes it."""
    path = folder / "model.safetensors"
    state = {name: change(weight) for name, weight in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(state, path)


def split_weights(folder) -> list[str]:
    """Divide a model's weights into two files."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for start, name in enumerate(names):
        part = dict(list(state.items())[start::2])
        safetensors.torch.save_file(part, folder / name)
    (folder / "model.safetensors").unlink()
    return names


def is_tiny(model: Qwen3) -> bool:
    return largest_gap(weights(model), weights(load_model("tiny")[0])) == 0


def test_truncation_and_padding_of_a_tokenizer_are_not_heeded(tmp_path):
    """Transformers does not heed them either."""
    stored = json.loads((TINY / "tokenizer.json").read_text())
    stored["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    stored["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    folder = copied(tmp_path, tokenizer=stored)
    text = "79 - 60 + 17 = 36 " * 9
    ids = Tokenizer(folder).encode(text)
    assert ids == Tokenizer(TINY).encode(text)
    assert ids == transformers.AutoTokenizer.from_pretrained(folder).encode(text)


def test_a_chat_template_stays_with_the_checkpoints(tmp_path):
    folder = copied(tmp_path)
    template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    save_model(tmp_path / "saved", *load_model(folder))
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.apply_chat_template([{"role": "user", "content": "hm"}], tokenize=False) == "<hm>"


@pytest.mark.parametrize("scaling", [{"rope_type": "default", "rope_theta": 1e6}, {"type": "default"}, {}])
def test_the_plain_rope_by_its_name_is_the_plain_rope(scaling):
    plain = Qwen3Config.from_hf(CONFIG)
    theta = scaling.get("rope_theta", plain.rope_theta)
    assert Qwen3Config.from_hf(CONFIG | {"rope_scaling": scaling}) == replace(plain, rope_theta=theta)


def test_a_model_of_any_precision_is_sampled_and_scored():
    model = random_model(dtype=torch.float64, std=0.2)
    [[sampled]] = generate(model, [[5, 17, 3]], max_new_tokens=6)
    assert sampled.logprobs != np.float32(sampled.logprobs).tolist()  # none is rounded
    batch = make_batch([Sample([5, 17, 3], sampled.token_ids, sampled.logprobs, 1.0)])
    scored = logprobs_and_entropy(model, batch).logprobs[0].tolist()
    assert np.allclose(scored, sampled.logprobs, rtol=1e-10)


def test_traces_of_a_server_are_learned_like_our_own(tmp_path, monkeypatch):
    """They are learned as if the prompt had opened the tag."""
    schedule = mock.Mock(return_value=[])
    monkeypatch.setattr("lab.stages.sft_schedule", schedule)
    recipe = smoke(QUICK, f"--stages.1.traces {tmp_path}/mine.jsonl")
    recipe = replace(recipe, stages=recipe.stages[1:2])
    problem = problems_of(recipe)[0][0]
    solved = f"so</think><answer>{recipe.task.solution(problem)}</answer>"
    for text in (solved, f"<think>{solved}"):
        save_traces(tmp_path / "mine.jsonl", [Trace(problem, text)])
        train(replace(recipe, out=str(tmp_path / str(len(text)))), quiet=True)
    first, second = (call.args[0] for call in schedule.call_args_list)
    assert first == second
    assert first[0].completion_ids


def test_a_last_sft_stage_without_traces_is_still_evaluated(tmp_path):
    recipe = smoke(QUICK, f"--evaluation.final-problems 6 --out {tmp_path}/run")
    train(replace(recipe, stages=recipe.stages[:2]), quiet=True)
    rows = RunFolder(tmp_path / "run").metrics()
    assert [row["step"] for row in rows] == [0, 1]
    assert rows[-1]["final_accuracy"] == 0.0
    # Nobody has an advantage, so there is no update to measure.
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    for name in ("loss", "grad_norm", "clip_fraction", "policy_entropy", "log_ratio_mean", "log_ratio_std"):
        assert f'"{name}": null' in text


@pytest.mark.parametrize(
    "version", ["Module  470.57.02  Tue", "Open Kernel Module for x86_64  545.23.08  Mon"]
)
def test_a_card_that_torch_cannot_use_names_versions_and_way_out(version, monkeypatch):
    monkeypatch.setattr("lab.device.read", lambda path: f"NVRM version: NVIDIA UNIX {version}")
    monkeypatch.setattr("lab.device.CARD", ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(RecipeError, match=r"(470.57.02|545.23.08).*CUDA 13.0.*--model tiny or --device"):
        parsed("256")
    assert parsed("256 --device cpu").recipe.model == "tiny"
    assert parsed("256 --model tiny").recipe.model == "tiny"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert parsed("256").recipe.model == "tiny"


def test_the_device_of_a_recipe_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "empty", lambda *_, device: None)
    for name in ("cuda:1", "cuda", "cpu"):
        assert pick_device(replace(smoke(), device=name)) == torch.device(name)
    assert current == ["cuda:1"]


def test_a_new_run_under_an_old_name_is_another_to_wandb(tmp_path, monkeypatch):
    wandb = mock.Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    Boards(tmp_path).start_wandb({})
    Boards(tmp_path).start_wandb({})  # as a resumed run does
    (tmp_path / "wandb_id").unlink()
    Boards(tmp_path).start_wandb({})
    first, resumed, other = (call.kwargs["id"] for call in wandb.init.call_args_list)
    assert first == resumed
    assert first != other


@torch.no_grad()
def logits(model) -> list:
    return model(torch.arange(40, 60)[None]).tolist()


def test_the_reference_of_adapters_has_their_base(tmp_path, monkeypatch):
    """What is evaluated is what was trained."""
    pytest.importorskip("bitsandbytes")
    rewards = mock.Mock(side_effect=itertools.count())  # no two are equal
    monkeypatch.setattr("rl.rollout.reward_for", rewards)
    options = "--adapters.rank 4 --stages.0.learning-rate 1e-2 --dtype bfloat16"
    recipe = one_step("--out", tmp_path / "run", options)
    policy, *_ = set_up(recipe, None, TrainState())
    reference = stage_start_model(policy, recipe, RunFolder(recipe.out), TrainState())
    assert logits(policy) == logits(reference)
    assert logits(policy) != logits(load_model("tiny-256", CPU, torch.bfloat16)[0])  # the base is in int8
    train(recipe, quiet=True)
    (folder,) = map(str, checkpoints(tmp_path / "run"))
    model = eval_command.model_of(folder, eval_command.Arguments((folder,)))
    loaded, _ = load_policy(model.recipe, model.checkpoint, CPU)
    later = stage_start_model(policy, recipe, RunFolder(recipe.out), TrainState(stage=1, step=1))
    assert logits(loaded) == logits(later)
    assert logits(loaded) != logits(policy)


HOSTILE = "a [/INST] [bold]b[/bold] :smile: [/x]"
GROUP = [rollout("correct", HOSTILE, WordProblem(HOSTILE, "#### 1"))]


def test_texts_from_outside_are_shown_as_they_are_live(monkeypatch):
    """Of a run's path, a problem, a completion and what is said, nothing is markup or an emoji."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("LINES", "60")
    shown = LiveScreen(replace(smoke(), out=f"runs/{HOSTILE}"), plain_console())
    shown.rollouts([GROUP])
    with shown.console.capture() as capture:
        shown.console.print(shown.draw())
        shown.say(HOSTILE)
    assert capture.get().count(HOSTILE) == 4


def test_texts_from_outside_are_shown_as_they_are_elsewhere(capsys, monkeypatch):
    """These places are eval, play and progress bars."""
    recipe = replace(load_recipe("gsm8k")[1], model=HOSTILE)
    candidate = Candidate(HOSTILE, recipe, Evaluation.of([GROUP]), Evaluation.of([GROUP]))
    monkeypatch.setenv("COLUMNS", "200")
    console = plain_console()
    console.print(comparison_table(HOSTILE, [measures(candidate)], []))
    eval_command.print_completions(candidate, 1, console)
    player = play_command.Player(HOSTILE, recipe, None, None)
    console.print(play_command.side_by_side([player], [(HOSTILE, HOSTILE)]))
    assert capsys.readouterr().out.count(HOSTILE) == 2 + 3 + 3
    monkeypatch.setattr("lab.screen.can_draw", lambda stream: True)
    with progress_bar(HOSTILE, 3) as show:
        show(1, 10)
    assert HOSTILE in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 11422654\n"
ENCODINGS = pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])


@ENCODINGS
def test_a_model_is_read_in_the_encodings_that_editors_save(encoding, tmp_path):
    """With a byte-order mark, with Windows' line ends, as UTF-16; what is saved from it is plain again."""
    folder = copied(tmp_path)
    for path in folder.glob("*.json"):
        path.write_bytes(path.read_text(encoding="utf-8").replace("\n", "\r\n").encode(encoding))
    model, tokenizer = load_model(folder)
    assert is_tiny(model)
    assert tokenizer.encode("79 - 60 = 19 é") == Tokenizer(TINY).encode("79 - 60 = 19 é")
    save_model(tmp_path / "saved", model, tokenizer)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")


@ENCODINGS
def test_recipes_and_notes_are_read_as_editors_save_them(encoding, tmp_path, monkeypatch):
    """Problems too, in the encodings that editors use."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, content in {
        "mine.toml": f'# a recipe – mine\nextends = "{ROOT}/recipes/smoke.toml"\nseed = 7\n',
        "mine.jsonl": '{"numbers": [79, 60, 17], "target": 36, "note": "é"}\n\n' * 2,
        "trainer_state.json": '{"step": 3, "seen": ["é"]}',
    }.items():
        (tmp_path / name).write_bytes(content.replace("\n", "\r\n").encode(encoding))
    assert load_recipe("~/mine.toml")[1] == replace(load_recipe("smoke")[1], seed=7)
    assert load_problems("~/mine.jsonl") == [PROBLEM, PROBLEM]
    assert load_state(tmp_path) == TrainState(step=3, seen=["é"])


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "a.jsonl", "a.parquet"],
)
def test_a_pointer_of_git_lfs_is_named_with_the_way_out(name, tmp_path):
    folder = copied(tmp_path)
    (folder / name).write_text(POINTER)
    with pytest.raises((ModelError, DataError), match=rf"{name}\b.*pointer of git-lfs.*git lfs pull"):
        load_problems(folder / name) if name.startswith("a.") else load_model(folder)


@pytest.mark.parametrize("read", [load_model, saved_recipe, seen_by])
@pytest.mark.parametrize(
    "name, message",
    [
        ("peft", "peft holds adapters, not a model: merge them"),
        ("run", "run holds checkpoints: name one of them, such as run.*step_0080"),
        ("run/checkpoints/step_9999", "no such model folder: run/checkpoints/step_9999"),
        ("run/step_9999", "run/step_9999 is no folder here"),
    ],
)
def test_what_is_no_model_says_what_it_is(name, message, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step_0080").mkdir(parents=True)
    (tmp_path / "peft").mkdir()
    for file in ("peft/adapter_config.json", "peft/adapter_model.safetensors", "run/config.json"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(ModelError, match=message):
        read(name)


def test_shards_without_their_index_are_put_together(tmp_path):
    folder = copied(tmp_path)
    names = split_weights(folder)
    assert is_tiny(load_model(folder)[0])
    (folder / names[-1]).unlink()
    with pytest.raises(ModelError, match=f"{folder}: weight .* missing"):
        load_model(folder)


def test_weights_keep_their_dtype_where_the_config_names_none(tmp_path):
    config = {name: value for name, value in CONFIG.items() if "dtype" not in name}
    folder = copied(tmp_path, config=config)
    assert load_model(folder)[0].dtype == torch.float32
    change_weights(folder, lambda weight: weight.bfloat16() if weight.dim() > 1 else weight)
    assert {parameter.dtype for parameter in load_model(folder)[0].parameters()} == {torch.bfloat16}


def test_quantized_weights_are_refused_by_name(tmp_path):
    folder = copied(tmp_path, config=CONFIG | {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(ModelError, match="quantization_config .*fp8.* is not supported"):
        load_model(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    change_weights(folder, lambda weight: weight.to(torch.float8_e4m3fn) if weight.dim() > 1 else weight)
    with pytest.raises(ModelError, match="is in torch.float8_e4m3fn: .*unquantized"):
        load_model(folder)


def short(tmp_path, positions: int):
    """The bundled model with few positions, as a folder."""
    return copied(tmp_path, config=CONFIG | {"max_position_embeddings": positions})


def test_more_tokens_than_positions_are_refused_before_any_work(tmp_path, monkeypatch, capsys):
    folder = short(tmp_path, 200)
    for work in ("lab.run.evaluate", "eval.evaluate", "lab.setup.check_decoding"):
        monkeypatch.setattr(work, None)
    options = f"--model {folder} --problems generated --sampling.max-new-tokens 180 --out {tmp_path}/run"
    for action in (
        lambda: train(smoke(options), quiet=True),
        lambda: evaluated(capsys, "tiny", folder, count=2, max_new_tokens=180),
    ):
        message = fails(capsys, action)
        assert f"{folder} has 200 positions" in message
        assert "lower max_new_tokens" in message
    model, _ = load_model(folder)
    with pytest.raises(ModelError, match="a prompt of 3 tokens and 198 new ones need 201"):
        generate(model, [[1], [1, 2, 3]], max_new_tokens=198)
    with pytest.raises(ModelError, match="200 positions"):
        next(sample_completion(model, [1, 2, 3], torch.rand(198), (), TokenChoice()))
    assert generate(model, [[1, 2, 3]], max_new_tokens=197, stop_token_ids=range(TINY_TOKENS))


def test_the_longest_training_prompt_counts_too(tmp_path):
    questions = ["How many? " * 60] + [f"How many? {number}" for number in range(8)]
    rows = [{"question": question, "answer": "#### 1"} for question in questions]
    recipe = replace(
        load_recipe("gsm8k")[1],
        problems=write_jsonl(tmp_path / "mine.jsonl", rows),
        evaluation=EvaluationSettings(problems=1),
        model=str(short(tmp_path, 400)),
    )
    recipe = replace(recipe, sampling=replace(recipe.sampling, max_new_tokens=100))
    (held_out,) = problems_of(recipe)[1]
    assert len(held_out.question) < 50
    with pytest.raises(ModelError, match="400 positions"):
        set_up(recipe, None, TrainState())


def test_a_problem_that_a_file_repeats_counts_once(tmp_path, capsys):
    """The command says so."""
    numbers = ([79, 60, 17], [17, 79, 60], [2, 3, 31])
    rows = [{"numbers": some, "target": 36} for some in numbers]
    problems = write_jsonl(tmp_path / "mine.jsonl", rows * 40)
    arguments = eval_command.Arguments(("tiny",), problems=problems, samples=1, max_new_tokens=4, json="-")
    eval_command.main(arguments)
    printed = capsys.readouterr()
    found = json.loads(printed.out)["problems"]
    assert found == {"count": 2, "sha256": problems_hash([PROBLEM, Problem((2, 3, 31), 36)])}
    assert "118 of 120 problems left out: they repeat another" in printed.err


@pytest.mark.parametrize("ending", ["", "<|im_end|>\n", "<|im_end|><|endoftext|>", "<|endoftext|>"])
def test_an_answer_ends_once_whatever_its_trace_ends_in(ending):
    tokenizer = Tokenizer(TINY)
    for text in ("so 1 + 2\n", "<|im_end|> so"):
        expected = [*tokenizer.encode(text), tokenizer.end_of_turn_id]
        assert tokenizer.encode_answer(text + ending) == expected


def test_a_file_of_traces_is_read_before_any_work(tmp_path):
    wrong = {"numbers": [79, 60, 17], "target": 36, "completion": "</think><answer>1</answer>"}
    recipe = smoke("--stages.1.traces", write_jsonl(tmp_path / "mine.jsonl", [wrong]))
    with pytest.raises(DataError, match=r"mine.jsonl, line 1: does not solve"):
        set_up(recipe, None, TrainState())


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_folders_will_do(number, tmp_path, monkeypatch):
    """It can hold checkpoints. A file that is not on the disk is another matter."""
    real, fails_for = os.fsync, stat.S_ISDIR

    def fsync(descriptor):
        if fails_for(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    sync(tmp_path)
    (tmp_path / "file").write_text("")
    fails_for = stat.S_ISREG
    with pytest.raises(OSError):
        sync(tmp_path / "file")


def test_adapters_go_on_only_over_their_own_weights(tmp_path, capsys):
    """These are the weights that they began with."""
    base = copied(tmp_path)
    options = f"--model {base} --problems generated --adapters.rank 2 --adapters.no-int8"
    recipe = one_step(options, "--out", tmp_path / "run")
    train(recipe, quiet=True)
    (checkpoint,) = checkpoints(tmp_path / "run")
    model, state = load_model("tiny")[0], TrainState(stage=1, step=1)
    actions = [
        lambda: train(recipe, resume=True, quiet=True),
        lambda: evaluated(capsys, checkpoint, samples=1),
        lambda: play_command.load_player(str(checkpoint), play_command.Arguments()),
        lambda: stage_start_model(model, recipe, RunFolder(recipe.out), state),
    ]
    change_weights(base, lambda weight: weight.roll(1, 0))
    changed = f"the weights in {base} are not those that {checkpoint} began with: put them back"
    for action in actions:
        assert changed in fails(capsys, action)
    change_weights(base, lambda weight: weight.roll(-1, 0))
    split_weights(base)  # the same weights in other files
    for action in actions:
        action()
    shutil.rmtree(base)
    lost = f"{checkpoint}: its adapters need the model they were trained over: no such model folder: {base}"
    for action in actions:
        assert lost in fails(capsys, action)


def test_the_reference_of_a_run_is_the_model_that_it_began_with(tmp_path):
    base = copied(tmp_path)
    options = f"--model {base} --problems generated --stages.0.kl-coef 0.1 --out {tmp_path}/run"
    recipe, state = one_step(options), TrainState()
    model, *_ = set_up(recipe, None, state)
    reference = stage_start_model(model, recipe, RunFolder(recipe.out), state)
    assert largest_gap(weights(reference), weights(model)) == 0
    change_weights(base, lambda weight: weight + 1)
    with pytest.raises(RecipeError, match=f"{base} are not those that {tmp_path / 'run'} began with"):
        stage_start_model(model, recipe, RunFolder(recipe.out), state)


def test_a_model_from_elsewhere_has_its_own_revision(tmp_path, monkeypatch):
    """It does not take that of the model beside it."""
    folder = copied(tmp_path, recipe={"revision": "abc"})
    models = (str(folder), "Qwen/Qwen3-1.7B")
    Hub(TINY).put_in_place(monkeypatch)
    assert eval_command.model_of(models[1], eval_command.Arguments(models)).recipe.revision is None


def test_a_bundled_model_is_known_by_its_folder_too(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert is_bundled("model/tiny")
    assert is_bundled(TINY)
    assert not is_bundled("tiny-")
    assert not is_bundled(ROOT)
    assert recipe_for("./model/tiny") == recipe_for("tiny")


def test_a_model_trained_here_that_lost_its_notes_is_refused(tmp_path):
    folder = shutil.copytree(TINY.parent / "tiny-256", tmp_path / "model")
    (folder / "trainer_state.json").unlink()
    with pytest.raises(RecipeError, match=f"{folder}: no trainer_state.json"):
        seen_by(folder)


def test_a_home_that_nobody_knows_is_no_traceback(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("os.path.expanduser", str)  # what it does where there is no home
    message = fails(capsys, lambda: train(smoke("--model", "~/model", "--out", tmp_path / "run"), quiet=True))
    assert "~/model" in message

"""The runs of a real model: weights from a GGUF file, arms, report, and parity with transformers."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from helpers import assert_close, changed_fields
from reference import FAMILIES, TINY_TOKENS, copy_tokenizer, reference_model, smollm2_folder

from data import Problem
from experiments.real.report import floors
from experiments.real.run import Arguments, main
from experiments.real.weights import halves, name_of
from experiments.study.run import load_arms
from lab.recipe import RECIPES, build_recipe, load_recipe
from model import generate, load_model, prompt_ids, save_model

ARMS = RECIPES / "study" / "smollm2.toml"


def test_query_rows_come_back_in_the_order_of_hugging_face():
    """llama.cpp writes row (half, pair) of a head as (pair, half)."""
    weight = np.arange(24.0).reshape(12, 2)  # two heads of 6
    interleaved = np.concatenate([weight[start + np.array([0, 3, 1, 4, 2, 5])] for start in (0, 6)])
    assert np.array_equal(halves(interleaved, heads=2), weight)


def test_names_of_a_gguf_file_become_those_of_hugging_face():
    assert name_of("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert name_of("token_embd.weight") == "model.embed_tokens.weight"
    assert name_of("output_norm.weight") == "model.norm.weight"


def test_floors_by_hand():
    found = {name: hits(Problem((7, 9, 11), 9)) for name, hits in floors().items()}
    assert found["a + b + c"] == 0
    assert found["a - b + c"] == 1
    assert 0 < found["random whole steps"] < 1
    assert floors()["a + b + c"](Problem((7, 9, 11), 27)) == 1


def test_every_ablation_changes_one_thing():
    """All begin with the same cold start."""
    arms = [arm for arm in load_arms(ARMS) if not arm.is_main]
    base, changed = changed_fields(arms, ARMS, "GRPO")
    assert base["model"] == "cold start"
    assert len(changed) == 9
    for name, fields in changed.items():
        assert len(fields) == 1 or fields == {"prompts_per_step", "samples_per_prompt"}, name


def test_the_main_arms_are_the_recipe_and_as_long_as_it():
    recipe = load_recipe("smollm2")[1]
    arms = {arm.name: build_recipe(arm.tables, ARMS) for arm in load_arms(ARMS) if arm.is_main}
    assert replace(arms["whole"], device=recipe.device) == recipe
    steps = sum(stage.steps for stage in recipe.stages if stage.kind == "grpo")
    for name in ("GRPO from the cold start", "GRPO without a cold start"):
        assert sum(stage.steps for stage in arms[name].stages) == steps
    assert arms["cold start"].stages == recipe.stages[:1]


def test_the_report_says_what_its_results_hold(tmp_path):
    evaluation = {
        "stage": 0,
        "kind": "grpo",
        "step": 80,
        "grpo_steps": 80,
        "eval_accuracy": 0.25,
        "generated_tokens": 9,
    }
    evaluations = [evaluation | {"step": 0, "grpo_steps": 0, "generated_tokens": 0}, evaluation]
    steps = {"pass_at_8": [0.0] * 30 + [0.5] * 10, "format_rate": [1.0] * 40}
    (tmp_path / "runs").mkdir()
    for seed, accuracy in enumerate((0.25, 0.35)):
        for arm, less in (("whole", 0.0), ("cold start", 0.2)):
            result = {
                "arm": arm, "seed": seed, "evaluations": evaluations,
                "steps": steps if arm == "whole" else {},
                "final": {"final_accuracy": accuracy - less, "final_greedy_accuracy": 0.5},
                "recipe": {}, "seconds": 600, "seconds_per_step": 20.0, "peak_memory_bytes": 5.5e9,
            }  # fmt: skip
            (tmp_path / "runs" / f"{arm.replace(' ', '-')}.{seed}.json").write_text(json.dumps(result))
    main(Arguments(results=tmp_path, report_only=True))
    lines = [line.strip("| ").split(" | ") for line in (tmp_path / "results.md").read_text().splitlines()]
    whole, cold = (next(line for line in lines if line[0] == arm) for arm in ("whole", "cold start"))
    assert whole[1:3] == ["2", "30.0 ± 63.5"]
    assert whole[4:7] == ["50.0 ± 0.0", "50.0", "100.0"]
    assert cold[2:4] == ["10.0 ± 63.5", "-20.0 (-20.0 to -20.0)"]
    assert cold[-3:] == ["20", "10", "5.5"]
    assert "nan" not in (tmp_path / "results.md").read_text()
    assert (tmp_path / "accuracy.png").exists()


def greedy_texts(folder: Path, questions: list[str], new_tokens: int) -> tuple[list[str], list[str]]:
    """Ours and transformers' greedy completions of questions in the model's chat format."""
    model, tokenizer = load_model(folder, dtype=torch.float32)
    prompts = [prompt_ids(tokenizer, question, thinking=False) for question in questions]
    options = dict(max_new_tokens=new_tokens, temperature=0.0, stop_token_ids=tokenizer.stop_token_ids)
    ours = [tokenizer.decode(completion.token_ids) for [completion] in generate(model, prompts, **options)]
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = reference.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False
        )
        theirs.append(tokenizer.decode(out[0, len(prompt) :].tolist()))
    return ours, theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_generates_the_same_in_transformers(family, tmp_path):
    """The greedy text is the same."""
    shape = {"vocab_size": TINY_TOKENS, "hidden_size": 24}
    reference_model(family=family, **shape).save_pretrained(copy_tokenizer(tmp_path / "theirs"))
    save_model(tmp_path / "ours", *load_model(tmp_path / "theirs"))
    rng = random.Random(0)
    questions = [f"Make {rng.randrange(99)} of 1 and 2." for _ in range(4)]
    ours, theirs = greedy_texts(tmp_path / "ours", questions, 40)
    assert ours == theirs
    assert len(set(ours)) > 1


def test_smollm2_gives_the_same_as_in_transformers():
    """Logits and greedy text are the same."""
    folder = smollm2_folder()
    model, tokenizer = load_model(folder, dtype=torch.float32)
    prompt = prompt_ids(tokenizer, "What is 7 plus 8, and what is twice that?", thinking=False)
    options = dict(dtype=torch.float32, attn_implementation="eager")
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        assert_close(model(ids), reference(ids).logits, atol=1e-3)
    ours, theirs = greedy_texts(folder, ["What is 7 plus 8?", "Name three colours of the rainbow."], 24)
    assert ours == theirs

"""The runs of a real model: weights from a GGUF file, arms, report, and parity with transformers."""

from dataclasses import asdict, replace

import numpy as np
import torch
import transformers
from helpers import assert_close, changed_fields, made_up, write_jsonl
from reference import smollm2_folder

from data import Problem
from experiments.real.report import floors
from experiments.real.run import Arguments, main
from experiments.real.weights import halves, name_of
from experiments.study.run import load_arms
from lab.recipe import RECIPES, build_recipe, load_recipe
from model import generate, load_model, prompt_ids

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
    a_plus_b, a_minus_b, random_steps = floors().values()
    assert a_plus_b(Problem((7, 9, 11), 27)) == a_minus_b(Problem((7, 9, 11), 9)) == 1
    assert a_plus_b(Problem((7, 9, 11), 9)) == 0
    assert 0 < random_steps(Problem((7, 9, 11), 9)) < 1


def test_every_ablation_changes_one_thing():
    """All begin with the same cold start."""
    arms = [arm for arm in load_arms(ARMS) if not arm.is_main]
    base, changed = changed_fields(arms, ARMS, "GRPO")
    assert base["model"] == "cold start"
    for fields in changed.values():
        assert len(fields) == 1 or fields == {"prompts_per_step", "samples_per_prompt"}


def test_the_main_arms_are_the_recipe_and_as_long_as_it():
    recipe = load_recipe("smollm2")[1]
    arms = {arm.name: build_recipe(arm.tables, ARMS) for arm in load_arms(ARMS) if arm.is_main}
    assert replace(arms["whole"], device=recipe.device) == recipe
    steps = sum(stage.steps for stage in recipe.stages if stage.kind == "grpo")
    for name in ("GRPO from the cold start", "GRPO without a cold start"):
        assert sum(stage.steps for stage in arms[name].stages) == steps
    assert arms["cold start"].stages == recipe.stages[:1]


def test_the_report_says_what_its_results_hold(tmp_path):
    (tmp_path / "runs").mkdir()
    for seed, final in ((0, 25.0), (1, 35.0)):
        whole = made_up("whole", seed, {0: 0.0, 80: 25.0}, final=final)
        whole = replace(whole, seconds=600, seconds_per_step=20.0, peak_memory_bytes=5.5e9)
        steps = {"pass_at_8": [0.0] * 30 + [0.5] * 10, "format_rate": [1.0] * 40}
        cold = replace(whole, arm="cold start", final=dict.fromkeys(whole.final, 0.1))
        for run in (replace(whole, steps=steps), cold):
            path = tmp_path / "runs" / f"{run.arm}.{seed}.json"
            write_jsonl(path, [asdict(run) | {"recipe": {}}])
    main(Arguments(results=tmp_path, report_only=True))
    text = (tmp_path / "results.md").read_text()
    whole = "| whole | 2 | 30.0 ± 63.5 |  | 60.0 ± 127.1 | 50.0 | 100.0 |  |  | 20 | 10 | 5.5 |"
    assert whole in text
    assert "| cold start | 2 | 10.0 ± 0.0 | -20.0 (-83.5 to +43.5) | 10.0 ± 0.0 |" in text
    assert "nan" not in text
    assert (tmp_path / "accuracy.png").exists()


def test_smollm2_gives_the_same_as_in_transformers():
    """Logits and greedy text are the same."""
    folder = smollm2_folder()
    model, tokenizer = load_model(folder, dtype=torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    for question in ("What is 7 plus 8?", "Name three colours of the rainbow."):
        prompt = prompt_ids(tokenizer, question, thinking=False)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            assert_close(model(ids), reference(ids).logits, atol=1e-3)
        [[ours]] = generate(
            model, [prompt], max_new_tokens=24, temperature=0.0, stop_token_ids=tokenizer.stop_token_ids
        )
        [theirs] = reference.generate(ids, max_new_tokens=24, do_sample=False)
        assert ours.token_ids == theirs[len(prompt) :].tolist()

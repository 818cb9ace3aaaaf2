"""The plan says what autograd really keeps, fits micro-batches to the memory, and refuses a run with what would help."""

from dataclasses import replace

import pytest
import torch
from helpers import random_model
from test_batch import grouped_samples

import model.logprobs
import lab.lab
from model import ModelError, Qwen3, Qwen3Config, add_adapters
from rl.batch import make_batch
from lab.memory_plan import activation_bytes, check_plan, plan_memory, work_of
from lab.recipe import EvaluationSettings, GRPOStage, OptimizerSettings, ParallelSettings, Recipe, SamplingSettings, SFTStage
from lab.recipe import load_recipe
from lab.runfolder import RunFolder
from lab.sharding import Sharding
from lab.screen import Quiet

RECIPE = Recipe(
    sampling=SamplingSettings(max_new_tokens=60),
    evaluation=EvaluationSettings(problems=50),
    stages=(GRPOStage(prompts_per_step=8, samples_per_prompt=16, updates_per_step=2), SFTStage(batch_size=5)),
)
WORK = work_of(RECIPE, prompt_length=140)
SETTINGS = OptimizerSettings(micro_batch_tokens=2000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 300, 4, 2, 32), (256, 256, 8, 2, 64), (128, 512, 4, 4, 16)])
def test_activations_are_those_that_autograd_keeps(shape, dtype):
    """Bytes of all storages kept for backward, the weights' excepted, of four layers less those of two."""
    hidden, inner, heads, kv_heads, head_dim = shape
    batch = make_batch(grouped_samples([(140, [60] * 16)]))
    tokens = batch.input_ids.shape[1]

    def kept(layers: int) -> int:
        model = Qwen3(Qwen3Config(48, hidden, inner, layers, heads, kv_heads, head_dim)).to(dtype).init_weights(0)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        alive = {}

        def keep(tensor):
            alive[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.model(batch.input_ids, batch.layout)
        return sum(t.untyped_storage().nbytes() for at, t in alive.items() if at not in weights)

    measured = (kept(4) - kept(2)) / 2 / tokens
    config = Qwen3Config(48, hidden, inner, 2, heads, kv_heads, head_dim)
    assert activation_bytes(config, dtype.itemsize, 16 * 200 / (140 + 16 * 60)) == pytest.approx(measured, rel=0.06)


def test_work_by_hand():
    assert WORK.sample_tokens == 200 and WORK.group_tokens == 140 + 16 * 60 and WORK.update_tokens == 4 * (140 + 16 * 60)
    assert (WORK.rows, WORK.prompts) == (128, 50) and WORK.cache_tokens == max(8 * (140 + 16 * 60), 50 * 200)
    assert WORK.expanded == pytest.approx(16 * 200 / (140 + 16 * 60)) and not WORK.has_reference
    assert work_of(replace(RECIPE, stages=()), 140).update_tokens == 0
    assert work_of(replace(RECIPE, sampling=SamplingSettings(max_cache_tokens=700)), 140).cache_tokens == 700
    assert work_of(replace(RECIPE, stages=(GRPOStage(kl_coef=0.1),)), 140).has_reference


def test_lasting_bytes_by_hand():
    model = random_model(dtype=torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    plan = plan_memory(model, SETTINGS, WORK, free=10**9, process=7)
    assert (plan.process, plan.weights, plan.masters, plan.moments, plan.gradients) == (
        7,
        2 * count,
        4 * count,
        8 * count,
        2 * count,
    )
    plan = plan_memory(model, replace(SETTINGS, kind="adamw8bit", rounding="stochastic"), WORK, free=10**9)
    assert (plan.masters, plan.moments, plan.reference) == (0, 2 * count, 0)
    assert plan_memory(random_model(), SETTINGS, replace(WORK, has_reference=True), 10**9).masters == 0
    assert plan_memory(random_model(), SETTINGS, replace(WORK, has_reference=True), 10**9).reference == 4 * count
    adapted = add_adapters(random_model(dtype=torch.bfloat16), 2, 4.0, int8=False)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    plan = plan_memory(adapted, SETTINGS, WORK, free=10**9)
    assert (plan.weights, plan.masters, plan.moments) == (2 * count + 4 * trained, 0, 8 * trained)
    plan = plan_memory(model, SETTINGS, work_of(replace(RECIPE, stages=()), 140), free=10**9)
    assert plan.peak == plan.weights + plan.sampling and "updating" not in str(plan)


def test_a_large_head_is_the_highest_point_where_the_embeddings_backward_ends(monkeypatch):
    """Few tokens, few logits and small pieces: gradients, and the head's as often as it is there beside them."""
    monkeypatch.setattr("lab.memory_plan.PIECE", 1000)
    monkeypatch.setitem(model.logprobs.CHUNK_LOGITS, "cpu", 4000)
    small = replace(RECIPE, sampling=SamplingSettings(max_new_tokens=3))
    for tied, budget, times in ((True, 5, 2), (True, 10**6, 1), (False, 5, 1)):
        policy = random_model(vocab_size=4000, hidden_size=512, num_hidden_layers=1, tie_word_embeddings=tied)
        settings = replace(SETTINGS, micro_batch_tokens=budget)
        work = replace(work_of(small, 2), update_tokens=10)
        plan = plan_memory(policy, settings, work, free=10**12)
        head, gradients = 4 * 4000 * 512, plan.gradients
        assert plan.updating == max(
            gradients + times * head, (gradients if budget == 5 else 0) + plan.activations + plan.output_head
        )
        assert tied is False or plan.updating == gradients + times * head


def test_the_highest_point_of_an_update_by_hand():
    """Where the layers' backward begins, or where the embedding's ends; gradients are there from the second micro-batch on."""
    wide = {"vocab_size": 4000, "hidden_size": 64}
    for tied in (True, False):
        model = random_model(**wide, tie_word_embeddings=tied)
        head, count = 4 * 4000 * 64, sum(p.numel() for p in model.parameters())
        for budget, checkpointing in ((10**6, False), (10**6, True), (200, False)):
            settings = replace(SETTINGS, micro_batch_tokens=budget, activation_checkpointing=checkpointing)
            plan = plan_memory(model, settings, WORK, free=10**12)
            several = budget < WORK.update_tokens
            begin = plan.activations + plan.output_head + (4 * count if several or checkpointing else 0)
            end = 4 * count + head * several + head * tied
            step = 4 * count + 20 * 4000 * 64
            assert plan.updating == max(begin, end, step)
            assert plan.output_head > head


def test_groups_that_fit_are_not_divided():
    model = random_model()
    per_token = plan_memory(model, replace(SETTINGS, micro_batch_tokens=1), replace(WORK, sample_tokens=1), 10**9).activations
    for budget, tokens in ((2000, 1100), (1100, 1100), (1000, 1000), (2200, 2200), (10**6, 4400)):
        plan = plan_memory(model, replace(SETTINGS, micro_batch_tokens=budget), WORK, 10**9)
        assert plan.activations == tokens * per_token


def test_auto_takes_what_is_left_and_no_less_than_the_longest_sample():
    model = random_model()
    auto = OptimizerSettings(micro_batch_tokens="auto")

    def tokens(free: int) -> int:
        return plan_memory(model, auto, WORK, free).micro_batch_tokens

    assert tokens(10**12) == WORK.update_tokens
    assert plan_memory(model, replace(SETTINGS, micro_batch_tokens=7), WORK, 10**9).micro_batch_tokens == 7  # as asked
    assert tokens(10) == WORK.sample_tokens
    fits = {free: plan_memory(model, auto, WORK, free) for free in range(2_000_000, 20_000_000, 1_000_000)}
    for free, plan in fits.items():
        assert plan.micro_batch_tokens == WORK.sample_tokens or plan.peak <= free
    assert len({plan.micro_batch_tokens for plan in fits.values()}) > 5
    lean = replace(auto, activation_checkpointing=True)
    deep = random_model(num_hidden_layers=8)
    assert (
        plan_memory(deep, lean, WORK, 6_000_000).micro_batch_tokens
        > 1.5 * plan_memory(deep, auto, WORK, 6_000_000).micro_batch_tokens
    )


def test_a_run_that_cannot_fit_is_refused_with_what_would_help():
    model = random_model(dtype=torch.bfloat16, num_hidden_layers=8)
    plan = plan_memory(model, SETTINGS, WORK, free=10**9)
    check_plan(plan, model, SETTINGS, WORK, free=plan.peak)
    with pytest.raises(ModelError) as caught:
        check_plan(plan, model, SETTINGS, WORK, free=plan.peak - 1)
    message = str(caught.value)
    for option in ("activation-checkpointing saves", "kind adamw8bit saves", "rounding stochastic saves"):
        assert f"--optimizer.{option}" in message
    assert "smaller --model" not in message
    with pytest.raises(ModelError, match="not enough: try --adapters.rank 16 or a smaller --model"):
        check_plan(plan, model, SETTINGS, WORK, free=1000)


@pytest.mark.parametrize(
    "asked, room, whole", [("auto", 1, True), ("auto", 0, False), ("whole", 0, True), ("layers", 1, False)]
)
def test_a_divided_model_is_sampled_whole_where_the_plan_has_room_or_as_asked(tmp_path, monkeypatch, asked, room, whole):
    real = lab.lab.plan_memory
    monkeypatch.setattr(lab.lab, "plan_memory", lambda *arguments: replace(real(*arguments), whole_copy=room))
    monkeypatch.setattr(lab.lab, "sharding_of", lambda model: Sharding(torch.float32))
    recipe = replace(load_recipe("smoke")[1], parallel=ParallelSettings(sampling=asked))
    lab, *_ = lab.lab.set_up(recipe, RunFolder(tmp_path), resume=False, view=Quiet())
    assert lab.model.sharding.whole_to_sample == whole

"""The plan says what autograd keeps, fits micro-batches to the memory, and refuses with what would help."""

from dataclasses import replace

import pytest
import torch
from helpers import random_model

import model.logprobs
from experiments.bases.weights import init_weights
from lab.memory_plan import activation_bytes, check_plan, plan_memory, work_of
from lab.recipe import EvaluationSettings, Recipe
from model import ModelError, Qwen3, Qwen3Config, add_adapters
from rl.batch import Sample, make_batch
from rl.grpo import GRPOStage
from rl.optimizer import OptimizerSettings
from rl.rollout import SamplingSettings
from rl.sft import SFTStage

RECIPE = Recipe(
    sampling=SamplingSettings(max_new_tokens=60),
    evaluation=EvaluationSettings(problems=50),
    stages=(GRPOStage(prompts_per_step=8, samples_per_prompt=16, updates_per_step=2), SFTStage(batch_size=5)),
)
GROUP = 140 + 16 * 60
WORK = work_of(RECIPE, prompt_length=140)
SETTINGS = OptimizerSettings(micro_batch_tokens=2000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 300, 4, 2, 32), (128, 512, 4, 4, 16)])
def test_activations_are_those_that_autograd_keeps(shape, dtype):
    """Bytes of all storages kept for backward, the weights' excepted, of four layers less those of two."""
    hidden, inner, heads, kv_heads, head_dim = shape
    batch = make_batch([Sample([7] * 140, [number] * 60, [-1.0] * 60, 1.0) for number in range(16)])

    def kept(layers: int) -> int:
        config = Qwen3Config(48, hidden, inner, layers, heads, kv_heads, head_dim)
        model = init_weights(Qwen3(config).to(dtype), 0)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        alive = {}

        def keep(tensor):
            alive[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.model(batch.input_ids, batch.layout)
        return sum(t.untyped_storage().nbytes() for at, t in alive.items() if at not in weights)

    measured = (kept(4) - kept(2)) / 2 / batch.input_ids.shape[1]
    config = Qwen3Config(48, hidden, inner, 2, heads, kv_heads, head_dim)
    assert activation_bytes(config, dtype.itemsize, 16 * 200 / GROUP) == pytest.approx(measured, rel=0.06)


def test_work_by_hand():
    assert WORK.sample_tokens == 200
    assert WORK.group_tokens == GROUP
    assert WORK.update_tokens == 4 * GROUP
    assert (WORK.rows, WORK.prefill_tokens) == (128, 50 * 140)
    assert WORK.cache_tokens == max(8 * GROUP, 50 * 200)
    assert WORK.key_copies == pytest.approx(16 * 200 / GROUP)
    assert not WORK.has_reference
    of_three = work_of(RECIPE, 140, processes=3)
    assert (of_three.rows, of_three.prefill_tokens, of_three.update_tokens) == (3 * 16, 17 * 140, 2 * GROUP)
    assert work_of(replace(RECIPE, stages=()), 140).update_tokens == 0
    assert work_of(replace(RECIPE, sampling=SamplingSettings(max_cache_tokens=700)), 140).cache_tokens == 700
    assert work_of(replace(RECIPE, stages=(GRPOStage(kl_coef=0.1),)), 140).has_reference


def test_lasting_bytes_by_hand():
    model = random_model(dtype=torch.bfloat16)
    count = sum(p.numel() for p in model.parameters())
    plan = plan_memory(model, SETTINGS, WORK, free=10**9)
    assert (plan.weights, plan.masters) == (2 * count, 4 * count)
    assert (plan.moments, plan.gradients) == (8 * count, 2 * count)
    plan = plan_memory(model, replace(SETTINGS, kind="adamw8bit", rounding="stochastic"), WORK, free=10**9)
    assert (plan.masters, plan.moments, plan.reference) == (0, 2 * count, 0)
    plan = plan_memory(random_model(), SETTINGS, replace(WORK, has_reference=True), 10**9)
    assert (plan.masters, plan.reference) == (0, 4 * count)
    adapted = add_adapters(random_model(dtype=torch.bfloat16), 2, 4.0, int8=False)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    plan = plan_memory(adapted, SETTINGS, WORK, free=10**9)
    assert (plan.weights, plan.masters, plan.moments) == (2 * count + 4 * trained, 0, 8 * trained)
    plan = plan_memory(model, SETTINGS, work_of(replace(RECIPE, stages=()), 140), free=10**9)
    assert plan.peak == plan.weights + plan.sampling
    assert "updating" not in str(plan)


def test_the_highest_point_of_an_update_by_hand(monkeypatch):
    """Where the layers' backward begins, where the embedding's ends, or in the optimizer's step."""
    small = replace(
        work_of(replace(RECIPE, sampling=SamplingSettings(max_new_tokens=3)), 2), update_tokens=10
    )
    cases = [
        (WORK, 64, budget, checkpointing)
        for budget, checkpointing in ((10**6, False), (10**6, True), (200, False))
    ]
    cases += [(small, 512, 5, False), (small, 512, 10**6, False)]  # few tokens, a large head
    highest = set()
    for work, hidden, budget, checkpointing in cases:
        if work is small:
            monkeypatch.setattr("lab.memory_plan.PIECE", 1000)
            monkeypatch.setitem(model.logprobs.CHUNK_LOGITS, "cpu", 4000)
        for tied in (True, False):
            policy = random_model(
                vocab_size=4000, hidden_size=hidden, num_hidden_layers=1, tie_word_embeddings=tied
            )
            settings = replace(SETTINGS, micro_batch_tokens=budget, activation_checkpointing=checkpointing)
            plan = plan_memory(policy, settings, work, free=10**12)
            several = budget < work.update_tokens
            head, gradients = 4 * 4000 * hidden, 4 * sum(p.numel() for p in policy.parameters())
            points = {
                "begin": plan.activations + plan.output_head + gradients * (several or checkpointing),
                "end": gradients + head * (several + tied),
                "step": gradients + 20 * (1000 if work is small else 4000 * hidden),
            }
            assert plan.updating == max(points.values())
            assert plan.output_head > head
            highest.add(max(points, key=points.get))
    assert highest >= {"begin", "end"}


def test_groups_that_fit_are_not_divided():
    model = random_model()
    per_token = plan_memory(
        model, replace(SETTINGS, micro_batch_tokens=1), replace(WORK, sample_tokens=1), 10**9
    ).activations
    for budget, tokens in ((2000, 1100), (1100, 1100), (1000, 1000), (2200, 2200), (10**6, 4400)):
        plan = plan_memory(model, replace(SETTINGS, micro_batch_tokens=budget), WORK, 10**9)
        assert plan.activations == tokens * per_token


def test_auto_takes_what_is_left_but_at_least_a_sample():
    """At least the longest sample."""
    model = random_model()
    auto = OptimizerSettings(micro_batch_tokens="auto")

    def tokens(free: int, policy: Qwen3 = model, settings: OptimizerSettings = auto) -> int:
        return plan_memory(policy, settings, WORK, free).micro_batch_tokens

    assert tokens(10**12) == WORK.update_tokens
    assert tokens(10) == WORK.sample_tokens
    assert tokens(10**9, settings=replace(SETTINGS, micro_batch_tokens=7)) == 7  # a number is taken as it is
    fits = {free: plan_memory(model, auto, WORK, free) for free in range(2_000_000, 20_000_000, 1_000_000)}
    for free, plan in fits.items():
        assert plan.micro_batch_tokens == WORK.sample_tokens or plan.peak <= free
    assert len({plan.micro_batch_tokens for plan in fits.values()}) > 5
    deep = random_model(num_hidden_layers=8)
    lean = replace(auto, activation_checkpointing=True)
    assert tokens(6_000_000, deep, lean) > 1.5 * tokens(6_000_000, deep)


def test_a_run_that_cannot_fit_is_refused_with_what_would_help():
    model = random_model(dtype=torch.bfloat16, num_hidden_layers=8)
    plan = plan_memory(model, SETTINGS, WORK, free=10**9)
    check_plan(plan, free=plan.peak)
    with pytest.raises(ModelError, match="activation-checkpointing.*smaller --model"):
        check_plan(plan, free=plan.peak - 1)

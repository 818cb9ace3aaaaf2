"""The plan says what autograd keeps, fits micro-batches to the memory, and refuses with what would help."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import kept_for_backward, random_model

import model.logprobs
from experiments.bases.weights import init_weights
from lab.memory_plan import Work, activation_bytes, check_plan, plan_memory, work_of
from lab.recipe import EvaluationSettings, Recipe
from model import ModelError, Qwen3, Qwen3Config, add_adapters
from model.quantize import adapter_state
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
WITHOUT_STAGES = work_of(replace(RECIPE, stages=()), 140)
SETTINGS = OptimizerSettings(micro_batch_tokens=2000)


def size_of(policy):
    return sum(parameter.numel() for parameter in policy.parameters())


def plan_of(policy, work=WORK, free=10**9, **changes):
    return plan_memory(policy, replace(SETTINGS, **changes), work, free)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 300, 4, 2, 32), (128, 512, 4, 4, 16)])
def test_activations_are_those_that_autograd_keeps(shape, dtype):
    """Bytes of all storages kept for backward, the weights' excepted, of two layers less those of one."""
    hidden, inner, *heads = shape
    batch = make_batch([Sample([7] * 140, [number] * 60) for number in range(16)])

    def kept(layers):
        policy = init_weights(Qwen3(Qwen3Config(48, hidden, inner, layers, *heads)).to(dtype), 0)
        storages = kept_for_backward(partial(policy.model, batch.input_ids, batch.layout))
        for parameter in policy.parameters():
            storages.pop(parameter.untyped_storage().data_ptr(), None)
        return sum(storages.values())

    measured = (kept(2) - kept(1)) / batch.input_ids.shape[1]
    planned = activation_bytes(Qwen3Config(48, hidden, inner, 2, *heads), dtype.itemsize, 16 * 200 / GROUP)
    assert planned == pytest.approx(measured, rel=0.06)


def test_work_by_hand():
    expected = Work(
        sample_tokens=200,
        group_tokens=GROUP,
        key_copies=16 * 200 / GROUP,
        update_tokens=4 * GROUP,
        rows=128,
        prefill_tokens=50 * 140,
        cache_tokens=50 * 200,
        has_reference=False,
    )
    assert expected == WORK
    of_three = work_of(RECIPE, 140, processes=3)
    assert (of_three.rows, of_three.prefill_tokens, of_three.update_tokens) == (3 * 16, 17 * 140, 2 * GROUP)
    assert WITHOUT_STAGES.update_tokens == 0
    assert work_of(replace(RECIPE, sampling=SamplingSettings(max_cache_tokens=700)), 140).cache_tokens == 700
    assert work_of(replace(RECIPE, stages=(GRPOStage(kl_coef=0.1),)), 140).has_reference


def test_lasting_bytes_by_hand():
    low = random_model(dtype=torch.bfloat16)
    count = size_of(low)
    plan = plan_of(low)
    assert (plan.weights, plan.masters) == (2 * count, 4 * count)
    assert (plan.moments, plan.gradients) == (8 * count, 2 * count)
    plan = plan_of(low, kind="adamw8bit", rounding="stochastic")
    assert (plan.masters, plan.moments, plan.reference) == (0, 2 * count, 0)
    plan = plan_of(random_model(), replace(WORK, has_reference=True))
    assert (plan.masters, plan.reference) == (0, 4 * count)


def test_lasting_bytes_of_adapters_by_hand():
    adapted = add_adapters(random_model(dtype=torch.bfloat16), 2, 4.0, int8=False)
    trained = sum(matrix.numel() for matrix in adapter_state(adapted).values())
    plan = plan_of(adapted)
    assert plan.weights == 2 * (size_of(adapted) - trained) + 4 * trained
    assert (plan.masters, plan.moments) == (0, 8 * trained)


def test_without_stages_nothing_is_planned_for_updates():
    plan = plan_of(random_model(), WITHOUT_STAGES)
    assert plan.peak == plan.weights + plan.sampling
    assert "updating" not in str(plan)


FEW = replace(work_of(replace(RECIPE, sampling=SamplingSettings(max_new_tokens=3)), 2), update_tokens=10)


@pytest.mark.parametrize(
    ("work", "hidden", "budget", "checkpointing", "tied", "highest"),
    [
        (WORK, 64, 10**6, False, True, "begin"),
        (WORK, 64, 10**6, True, False, "begin"),
        (WORK, 64, 200, False, True, "begin"),
        (FEW, 512, 5, False, True, "end"),  # few tokens, a large head
        (FEW, 512, 10**6, False, True, "end"),
        (FEW, 512, 10**6, False, False, "step"),
    ],
)
def test_the_highest_point_of_an_update_by_hand(
    work, hidden, budget, checkpointing, tied, highest, monkeypatch
):
    """Where the layers' backward begins, where the embedding's ends, or in the optimizer's step."""
    monkeypatch.setattr("lab.memory_plan.PIECE", 1000)
    monkeypatch.setitem(model.logprobs.CHUNK_LOGITS, "cpu", 4000)
    shape = {"vocab_size": 4000, "hidden_size": hidden, "num_hidden_layers": 1}
    policy = random_model(**shape, tie_word_embeddings=tied)
    plan = plan_of(policy, work, micro_batch_tokens=budget, activation_checkpointing=checkpointing)
    several = budget < work.update_tokens
    head, gradients = 4 * 4000 * hidden, 4 * size_of(policy)
    points = {
        "begin": plan.activations + plan.output_head + gradients * (several or checkpointing),
        "end": gradients + head * (several + tied),
        "step": gradients + 20 * 1000,
    }
    assert plan.updating == points[highest] == max(points.values())
    assert plan.output_head > head


@pytest.mark.parametrize(
    ("budget", "tokens"), [(2000, 1100), (1100, 1100), (1000, 1000), (2200, 2200), (10**6, 4400)]
)
def test_groups_that_fit_are_not_divided(budget, tokens):
    policy = random_model()
    one = plan_of(policy, replace(WORK, sample_tokens=1), micro_batch_tokens=1)
    plan = plan_of(policy, micro_batch_tokens=budget)
    assert plan.activations == tokens * one.activations
    assert plan.micro_batch_tokens == budget


def test_auto_takes_what_is_left_but_at_least_a_sample():
    """At least the longest sample."""
    auto = partial(plan_of, random_model(), micro_batch_tokens="auto")
    assert auto(free=10**12).micro_batch_tokens == WORK.update_tokens
    assert auto(free=10).micro_batch_tokens == WORK.sample_tokens
    found = set()
    for free in range(2_000_000, 20_000_000, 1_000_000):
        plan = auto(free=free)
        found.add(plan.micro_batch_tokens)
        assert plan.micro_batch_tokens == WORK.sample_tokens or plan.peak <= free
    assert len(found) > 5


def test_auto_takes_more_with_activation_checkpointing():
    auto = partial(plan_of, random_model(num_hidden_layers=8), free=6_000_000, micro_batch_tokens="auto")
    assert auto(activation_checkpointing=True).micro_batch_tokens > 1.5 * auto().micro_batch_tokens


def test_a_run_that_cannot_fit_is_refused_with_what_would_help():
    plan = plan_of(random_model(dtype=torch.bfloat16))
    check_plan(plan, free=plan.peak)
    with pytest.raises(ModelError, match=r"activation-checkpointing.*smaller --model"):
        check_plan(plan, free=plan.peak - 1)

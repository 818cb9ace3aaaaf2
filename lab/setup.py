"""What a run needs before its first step: where it stands, its model, and whether it fits into memory."""

from dataclasses import replace
from pathlib import Path

import torch

from lab.checkpoint import TrainState, checkpoints, load_adapters, load_state, newest_checkpoint
from lab.device import held_memory, pick_device, pick_dtype, return_freed_blocks
from lab.memory_plan import check_plan, gb, plan_memory, work_of
from lab.recipe import Recipe, RecipeError, problems_of
from lab.runfolder import RunFolder
from lab.sharding import shard
from model import Qwen3, Tokenizer, add_adapters, load_model, prompt_ids
from model.memory import free_memory
from rl.distributed import any_rank, broadcast, is_main, world_size


def find_state(recipe: Recipe, run: RunFolder, resume: bool, screen) -> tuple[TrainState, Path | None]:
    """The state of a run, and the checkpoint to resume from, if there is one.

    Raises:
        RecipeError: the run cannot start or resume here, or an SFT stage has nothing to learn from.
    """
    before = None
    for number, stage in enumerate(recipe.stages):
        if stage.kind == "sft" and stage.traces is None and before != "grpo":
            raise RecipeError(f"stages.{number}: an sft stage needs a grpo stage right before it, or traces")
        before = stage.kind
    if not resume:
        if is_main():
            run.check_free()
        return TrainState(), None
    run.check_recipe(recipe)
    checkpoint = broadcast(newest_checkpoint(run.path, screen.say) if is_main() else None)
    return load_state(checkpoint) if checkpoint else TrainState(), checkpoint


def set_up(recipe: Recipe, checkpoint: Path | None) -> tuple[Qwen3, Tokenizer, list, list, int, str]:
    """Load what a run works with, and see whether it fits into memory.

    Returns:
        The model to train; its tokenizer; problems to train on, and held-out ones; the tokens of a
        micro-batch; a line on what memory will hold.

    Raises:
        ModelError, DataError: the model or the problems cannot be loaded, or the run does not fit into
            memory.
    """
    return_freed_blocks()
    device = torch.device(pick_device(recipe))
    free, process = free_memory(device), held_memory(device)
    adapted = recipe.adapters.rank > 0
    # A checkpoint holds adapters merged and rounded; to resume bit for bit they are put on the base again.
    source = recipe.model if adapted or checkpoint is None else checkpoint
    sharded = recipe.parallel.kind == "shard" and world_size() > 1
    model, tokenizer = load_model(source, "cpu" if sharded else device, pick_dtype(recipe), recipe.revision)
    if sharded:
        shard(model, device)
    if adapted:
        add_adapters(model, recipe.adapters.rank, recipe.adapters.alpha, recipe.adapters.int8, recipe.seed)
        if checkpoint is not None:
            load_adapters(checkpoint, model)
    model.model.checkpoint_activations = recipe.optimizer.activation_checkpointing
    problems, held_out = problems_of(recipe)
    thinking = recipe.sampling.thinking
    longest = max(len(prompt_ids(tokenizer, recipe.task.prompt(problem), thinking)) for problem in held_out)
    work = work_of(recipe, longest, world_size())
    plan = plan_memory(model, recipe.optimizer, work, free, process)
    check_plan(plan, free)
    if sharding := model.sharding:
        full = {"auto": plan.whole_copy > 0, "whole": True, "layers": False}[recipe.parallel.sampling]
        model.sharding = replace(sharding, full_to_sample=not any_rank(not full))
    memory = f"memory    {gb(plan.peak - process)} of {gb(free)} free: {plan}"
    return model, tokenizer, problems, held_out, plan.micro_batch_tokens, memory


def stage_start_model(model: Qwen3, recipe: Recipe, run: RunFolder, state: TrainState) -> Qwen3:
    """The reference of the KL penalty: a frozen copy of the policy as it was when the stage began."""
    source = recipe.model
    for folder in checkpoints(run.path):
        saved = load_state(folder)
        if (saved.stage, saved.stage_step) == (state.stage, 0):
            source = folder
    sharded = bool(model.sharding)
    reference, _ = load_model(source, "cpu" if sharded else model.device, model.dtype, recipe.revision)
    reference.requires_grad_(False)
    return shard(reference, model.device) if sharded else reference

"""What every stage of a run works with, and how it comes to be: model, problems, memory, and where the run stands."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from model import Qwen3, Tokenizer, add_adapters, load_model
from model.memory import free_memory, held_memory, return_freed_blocks
from rl.checkpoint import Progress, load_adapters, load_progress, newest_checkpoint
from rl.console import describe_run
from rl.device import pick_device, pick_dtype
from rl.interruption import Stop
from rl.memory_plan import check_plan, gb, plan_memory, work_of
from rl.problems import problems_of
from rl.recipe import Recipe
from rl.rollout import Actor
from rl.runfolder import RunFolder
from rl.sharding import shard, sharding_of
from rl.view import Lines, Quiet
from rl.workers import ALONE, Workers
from tasks import Problem


@dataclass
class Lab:
    """Everything a stage works with."""

    recipe: Recipe
    model: Qwen3
    tokenizer: Tokenizer
    train: list[Problem]
    held_out: list[Problem]
    run: RunFolder
    micro_batch_tokens: int
    view: Lines = field(default_factory=Quiet)
    stop: Stop = field(default_factory=Stop)
    workers: Workers = ALONE

    @property
    def actor(self) -> Actor:
        return Actor(self.model, self.tokenizer, self.recipe.task, self.recipe.sampling)


def set_up(
    recipe: Recipe, run: RunFolder, resume: bool, view: Lines, workers: Workers = ALONE
) -> tuple[Lab, Progress, Path | None]:
    """Everything a run needs before its first step, where it stands, and the checkpoint it goes on from, if any."""
    progress, checkpoint = Progress(), None
    if workers.leads and not resume:
        run.check_free()
    if resume:
        run.check_recipe(recipe)
        checkpoint = workers.lead(newest_checkpoint(run.path, view.say) if workers.leads else None)
        progress = load_progress(checkpoint) if checkpoint else progress
    return_freed_blocks()
    device = torch.device(pick_device(recipe))
    free, process = free_memory(device), held_memory(device)
    model, tokenizer = load_policy(recipe, device, checkpoint, workers)
    train_problems, held_out = problems_of(recipe)
    actor = Actor(model, tokenizer, recipe.task, recipe.sampling)
    longest = max(len(actor.prompt_ids(problem)) for problem in held_out)
    work = work_of(recipe, longest, workers.size)
    plan = plan_memory(model, recipe.optimizer, work, free, process)
    check_plan(plan, model, recipe.optimizer, work, free)
    if sharding := sharding_of(model):
        whole = {"auto": plan.whole_copy > 0, "whole": True, "layers": False}[recipe.parallel.sampling]
        model.sharding = replace(sharding, whole_to_sample=not workers.any(not whole))
    if resume and workers.leads:
        run.rewind(progress.step if checkpoint else -1)
    view.say(describe_run(recipe, model, train_problems, held_out, progress.step if resume else None))
    view.say(f"memory    {gb(plan.peak - process)} of {gb(free)} free: {plan}")
    view.history(run.metrics())
    lab = Lab(recipe, model, tokenizer, train_problems, held_out, run, plan.micro_batch_tokens, view, workers=workers)
    return lab, progress, checkpoint


def load_policy(
    recipe: Recipe, device: torch.device, checkpoint: Path | None, workers: Workers = ALONE
) -> tuple[Qwen3, Tokenizer]:
    """The model that a run trains, from its recipe or from a checkpoint of the run, divided where the recipe says so."""
    # A checkpoint holds adapters merged and rounded; to go on bit for bit they are put on the base again.
    adapted = recipe.adapters.rank > 0
    source = recipe.model if adapted or checkpoint is None else checkpoint
    divide = recipe.parallel.kind == "shard" and workers.size > 1
    model, tokenizer = load_model(source, "cpu" if divide else device, pick_dtype(recipe), recipe.revision)
    if divide:
        shard(model, workers, device)
    if adapted:
        add_adapters(model, recipe.adapters.rank, recipe.adapters.alpha, recipe.adapters.int8, recipe.seed)
        if checkpoint is not None:
            load_adapters(checkpoint, model)
    model.model.checkpoint_activations = recipe.optimizer.activation_checkpointing
    return model, tokenizer

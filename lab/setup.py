"""Set up a run: its progress, its model, and a check that it fits into memory."""

from pathlib import Path

import torch

from data.task import AnyProblem
from data.traces import Trace, load_traces, worked_traces
from lab.checkpoint import (
    TrainState,
    base_digest,
    check_base,
    damage,
    load_adapters,
    load_state,
    newest_checkpoint,
    seen_by,
)
from lab.decoding import check_decoding
from lab.device import pick_device, pick_dtype, return_freed_blocks
from lab.evaluate import problems_hash
from lab.memory_plan import check_plan, gb, plan_memory, work_of
from lab.recipe import Recipe, RecipeError, problems_of
from lab.runfolder import RunFolder
from model import ModelError, Qwen3, Tokenizer, add_adapters
from model.chat import PLAIN
from model.memory import free_memory
from model.weights import ModelFolder, load_weights, open_model
from rl.distributed import broadcast, is_main, world_size
from rl.rollout import prompt_for
from rl.sft import WORKED


def find_state(recipe: Recipe, run: RunFolder, resume: bool, screen) -> tuple[TrainState, Path | None]:
    """The state of a run, and the checkpoint to resume from. RecipeError: it cannot start or resume."""
    before = None
    for number, stage in enumerate(recipe.stages):
        if stage.kind == "sft" and stage.traces is None and before != "grpo":
            raise RecipeError(f"stages.{number}: an sft stage needs a grpo stage right before it, or traces")
        before = stage.kind
    checkpoint = None
    if resume:
        run.check_recipe(recipe)
        checkpoint = broadcast(newest_checkpoint(run.path, screen.say) if is_main() else None)
    elif is_main():
        run.check_free()
    if checkpoint:
        return load_state(checkpoint), checkpoint
    return TrainState(seen=seen_by(recipe.model, recipe.revision)), None


def set_up(
    recipe: Recipe, checkpoint: Path | None, state: TrainState
) -> tuple[Qwen3, Tokenizer, list[AnyProblem], list[AnyProblem], int, str]:
    """Load what a run works with, see whether it fits and decodes, and note in `state` which problems it has.

    Returns model, tokenizer, problems to train on, held-out ones, tokens of a micro-batch, and lines on
    that. ModelError, DataError, RecipeError: the run cannot be loaded, or does not fit into memory.
    """
    return_freed_blocks()
    device = pick_device(recipe)
    free = free_memory(device)
    model, tokenizer = load_policy(recipe, checkpoint, device)
    penalty = any(stage.kl_coef for stage in recipe.stages if stage.kind == "grpo")
    if not state.base and (penalty or recipe.adapters.rank > 0):  # it comes back to these weights
        state.base = base_digest(recipe)
    problems, held_out = problems_of(recipe, state.seen)
    state.problems = {"train": problems_hash(problems), "held_out": problems_hash(held_out)}
    for number, stage in enumerate(recipe.stages):
        if stage.kind == "sft" and stage.traces and number >= state.stage:
            check_traces(recipe, number, problems)
    longest = longest_prompt(recipe, tokenizer, [*problems, *held_out])
    model.config.check_positions(longest, recipe.sampling.max_new_tokens, recipe.model)
    plan = plan_memory(model, recipe.optimizer, work_of(recipe, longest, world_size()), free)
    check_plan(plan, free)
    prompts = [prompt_for(tokenizer, recipe.task, problem, recipe.sampling) for problem in held_out[:4]]
    lines = [
        "" if tokenizer.has_template else f"prompts   {prompt_form(tokenizer)}",
        f"memory    {gb(plan.peak)} of {gb(free)} free: {plan}",
        check_decoding(model, prompts),
    ]
    return model, tokenizer, problems, held_out, plan.micro_batch_tokens, "\n".join(filter(None, lines))


def longest_prompt(recipe: Recipe, tokenizer: Tokenizer, problems: list[AnyProblem]) -> int:
    """Tokens of the prompt with the longest text."""
    longest = max(problems, key=lambda problem: len(recipe.task.prompt(problem)))
    return len(prompt_for(tokenizer, recipe.task, longest, recipe.sampling))


def check_traces(recipe: Recipe, number: int, problems: list[AnyProblem]) -> None:
    """RecipeError, DataError: stage `number` cannot learn from the traces that it names."""
    stage = recipe.stages[number]
    if stage.traces != WORKED:
        read_traces(recipe, stage.traces)
        return
    try:
        worked_traces(recipe.task, problems, 1, recipe.sampling.thinking, recipe.seed)
    except ValueError as error:
        raise RecipeError(f"stages.{number}.traces: {error}") from None


def read_traces(recipe: Recipe, path: str | Path) -> list[Trace]:
    """The traces in a file, each verified. DataError names a bad line."""
    task, thinking = recipe.task, recipe.sampling.thinking

    def is_correct(text: str, problem: AnyProblem) -> bool:
        return task.score(text, problem, thinking).outcome == "correct"

    return load_traces(path, task.problem_from_row, is_correct)


def prompt_form(tokenizer: Tokenizer) -> str:
    """The form of the prompts for a model without a chat template, and the reason."""
    form = "plain text" if tokenizer.template.source == PLAIN else "ChatML"
    return f"{form}, since the model comes without a chat template"


def open_policy(recipe: Recipe, checkpoint: Path | None) -> ModelFolder:
    """The folder whose weights `load_policy` loads, checked. ModelError, RecipeError: it cannot be used."""
    if checkpoint is None or recipe.adapters.rank == 0:
        return open_model(checkpoint or recipe.model, recipe.revision)
    # A checkpoint holds adapters merged and rounded; to resume bit for bit they are put on the base again.
    try:
        folder = open_model(recipe.model, recipe.revision)
    except ModelError as error:
        raise RecipeError(
            f"{checkpoint}: its adapters need the model they were trained over: {error}"
        ) from None
    check_base(recipe, load_state(checkpoint), checkpoint)
    return folder


def load_policy(
    recipe: Recipe, checkpoint: Path | None, device: torch.device, folder: ModelFolder | None = None
) -> tuple[Qwen3, Tokenizer]:
    """The model as `checkpoint` has it, or before any training, with adapters; `folder`: of `open_policy`."""
    folder = folder or open_policy(recipe, checkpoint)
    model = load_weights(folder, device, pick_dtype(recipe, device))
    if recipe.adapters.rank > 0:
        add_adapters(model, recipe.adapters.rank, recipe.adapters.alpha, recipe.adapters.int8, recipe.seed)
        if checkpoint is not None:
            load_adapters(model, checkpoint)
    model.model.checkpoint_activations = recipe.optimizer.activation_checkpointing
    return model, folder.tokenizer


def stage_start_model(model: Qwen3, recipe: Recipe, run: RunFolder, state: TrainState) -> Qwen3:
    """The reference of the KL penalty: a frozen copy of the policy as it was when the stage began.

    RecipeError: the weights of that moment are not there any more, or they have changed.
    """
    if state.stage == 0:
        start = None  # the model before any training
        check_base(recipe, state, run.path)
    else:
        step = state.step - state.stage_step
        start = run.path / "checkpoints" / f"step_{step:04d}"
        fault = damage(start)
        if fault is not None:
            raise RecipeError(f"{start}: the KL penalty needs it, and {fault}; put it back")
    reference, _ = load_policy(recipe, start, model.device)
    return reference.requires_grad_(False)

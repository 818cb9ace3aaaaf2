"""A run: the stages of a recipe one after the other, with evaluations, metrics and checkpoints on the way."""

import contextlib
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from data import DataError
from data.load import endless_problems
from data.task import Problem
from data.traces import Trace, curate, load_traces, save_traces
from lab.checkpoint import (
    TrainState,
    checkpoints,
    load_adapters,
    load_optimizer,
    load_state,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from lab.device import peak_memory, pick_device, pick_dtype
from lab.evaluate import EVALUATION_SEED, evaluate
from lab.memory_plan import check_plan, gb, plan_memory, work_of
from lab.optimizer_state import state_tensors
from lab.plots import paper_points, write_curve
from lab.processes import processes, restarted
from lab.recipe import Recipe, RecipeError, problems_of, to_dict
from lab.report import write_report
from lab.runfolder import RunFolder
from lab.screen import Screen, describe_run, final_line, pick_screen
from lab.sharding import full_model, round_to_saved, shard, sharding_of
from lab.signals import RolloutsDropped, Stop, Stopped, stoppable
from lab.trackers import WandB
from model import Qwen3, Tokenizer, add_adapters, load_model, prompt_ids
from model.memory import free_memory, held_memory, return_freed_blocks
from rl.batch import Sample
from rl.distributed import all_values, any_rank, broadcast, is_main, share, world_size
from rl.grpo import GRPOStage, grpo_step
from rl.metrics import rollout_metrics
from rl.optimizer import Optimizer
from rl.sft import SFTStage, sft_schedule, sft_step

MAX_SKIPPED_UPDATES = 5  # in a row, then the run ends


def train(
    recipe: Recipe, resume: bool = False, quiet: bool = False, plain: bool = False, wandb: bool = False
) -> None:
    """Run `recipe` into its run folder, from the start or from the last checkpoint there.

    Args:
        quiet: show nothing but errors.
        plain: show a line a step on a terminal too.
        wandb: log to Weights & Biases.

    Raises:
        ModelError, DataError, RecipeError: something that the user named cannot be used.
        Stopped: a signal has ended the run.
    """
    # 1. Set up: the run's folder and screen, its model and problems, and where it stands.
    run = RunFolder(recipe.out)
    with processes(), contextlib.ExitStack() as stack:
        if is_main():
            stack.enter_context(run.locked())
        resume = broadcast(resume or (restarted() and run.holds_run))
        screen = stack.enter_context(pick_screen(recipe, quiet or not is_main(), plain))
        state, checkpoint = where_it_stands(recipe, run, resume, screen)
        problems, held_out = problems_of(recipe)
        model, tokenizer, micro_batch_tokens = load_policy(
            recipe, checkpoint, problems, held_out, state, screen
        )
        if resume and is_main():
            run.rewind(state.step if checkpoint else -1)
        screen.history(run.metrics())
        if wandb and is_main():
            run.trackers.append(WandB(run.path, to_dict(recipe)))
        evaluation = partial(evaluation_metrics, model, tokenizer, recipe, held_out, screen)
        final_evaluation = partial(final_metrics, model, tokenizer, recipe, held_out, screen)

        # 2. Accuracy before any step. The folder holds a run only from here on: one that failed earlier is
        # not in the way.
        if not broadcast(resume and bool(run.metrics())):
            kind = recipe.stages[0].kind if recipe.stages else "baseline"
            row = {"stage": 0, "kind": kind, "step": 0, "grpo_steps": 0} | evaluation()
            row |= {} if recipe.stages else final_evaluation()
            if is_main() and not resume:
                run.create(recipe)
            record(run, screen, recipe, row, 0, 0)

        # 3. The stages, each with a new optimizer.
        stop = stack.enter_context(stoppable(is_main()))
        while state.stage < len(recipe.stages):
            stage = recipe.stages[state.stage]
            round_to_saved(model)
            optimizer = Optimizer(model, recipe.optimizer, micro_batch_tokens)
            if checkpoint is not None and state.stage_step > 0:
                load_optimizer(checkpoint, optimizer)
            checkpoint = None
            save = partial(save_now, run, model, tokenizer, recipe, state)
            if stage.kind == "grpo":
                steps = stage.steps
                reference = stage_start_model(model, recipe, run, state) if stage.kl_coef else None
                take_step = partial(
                    take_grpo_step,
                    model,
                    tokenizer,
                    optimizer,
                    recipe,
                    run,
                    screen,
                    stop,
                    state,
                    problems,
                    reference,
                )
            else:
                schedule = sft_batches(tokenizer, recipe, run, screen, state, held_out)
                steps = len(schedule)
                take_step = partial(take_sft_step, model, optimizer, stage, state, schedule)
            while state.stage_step < steps:
                if any_rank(stop.requested):
                    save(optimizer if state.stage_step else None)
                    number = next(filter(None, all_values(stop.number)))
                    raise Stopped(
                        f"Saved after step {state.step}; go on with the same command and --resume.", number
                    )
                try:
                    metrics = take_step()
                except RolloutsDropped:
                    continue
                row = {"stage": state.stage, "kind": stage.kind, "step": state.step + 1} | metrics
                state.step += 1
                state.stage_step += 1
                state.grpo_steps += stage.kind == "grpo"
                row |= {"grpo_steps": state.grpo_steps, "peak_memory_bytes": peak_memory(model.device)}
                last = state.stage_step == steps
                if last or state.stage_step % recipe.evaluation.every == 0:
                    row |= evaluation()
                if last and state.stage == len(recipe.stages) - 1:
                    row |= final_evaluation()
                record(run, screen, recipe, row, state.stage_step, steps)
                check_skipped(optimizer)
                if not last and state.stage_step % recipe.checkpoint_every == 0:
                    save(optimizer)
            micro_batch_tokens = optimizer.micro_batch_tokens
            state.stage += 1
            state.stage_step = 0
            save(None)

        # 4. What a finished run is looked at by.
        if is_main():
            write_curve(run, paper_points(recipe))
            last_row = run.metrics()[-1]
            if "final_accuracy" in last_row:
                screen.say(final_line(last_row, recipe.evaluation.final_problems))
            report = write_report((run.path,))
            screen.say(f"done: {run.path}/curve.md and curve.png; to look into it, open {report}")


def where_it_stands(
    recipe: Recipe, run: RunFolder, resume: bool, screen: Screen
) -> tuple[TrainState, Path | None]:
    """The state of a run, and the checkpoint to resume from, if there is one.

    Raises:
        RecipeError: the run cannot start or resume here, or an SFT stage has nothing to learn from.
    """
    for number, stage in enumerate(recipe.stages):
        if (
            stage.kind == "sft"
            and stage.traces is None
            and (number == 0 or recipe.stages[number - 1].kind != "grpo")
        ):
            raise RecipeError(
                f"stages.{number}: an sft stage needs a grpo stage right before it, or a file in traces"
            )
    if not resume:
        if is_main():
            run.check_free()
        return TrainState(), None
    run.check_recipe(recipe)
    checkpoint = broadcast(newest_checkpoint(run.path, screen.say) if is_main() else None)
    return load_state(checkpoint) if checkpoint else TrainState(), checkpoint


def load_policy(
    recipe: Recipe,
    checkpoint: Path | None,
    problems: list[Problem],
    held_out: list[Problem],
    state: TrainState,
    screen,
) -> tuple[Qwen3, Tokenizer, int]:
    """The model to train, its tokenizer, and the micro-batch that fits into memory; says what the run will
    hold.

    Raises:
        ModelError: the model cannot be loaded, or the run does not fit into memory.
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
    thinking = recipe.sampling.thinking
    longest = max(len(prompt_ids(tokenizer, recipe.task.prompt(problem), thinking)) for problem in held_out)
    work = work_of(recipe, longest, world_size())
    plan = plan_memory(model, recipe.optimizer, work, free, process)
    check_plan(plan, model, recipe.optimizer, work, free)
    if sharding := sharding_of(model):
        full = {"auto": plan.whole_copy > 0, "whole": True, "layers": False}[recipe.parallel.sampling]
        model.sharding = replace(sharding, full_to_sample=not any_rank(not full))
    screen.say(describe_run(recipe, model, problems, held_out, state.step if checkpoint else None))
    screen.say(f"memory    {gb(plan.peak - process)} of {gb(free)} free: {plan}")
    return model, tokenizer, plan.micro_batch_tokens


def take_grpo_step(
    model: Qwen3,
    tokenizer: Tokenizer,
    optimizer: Optimizer,
    recipe: Recipe,
    run: RunFolder,
    screen: Screen,
    stop: Stop,
    state: TrainState,
    problems: list[Problem],
    reference: Qwen3 | None,
) -> dict:
    """The next problems, a GRPO step on them, and their rollouts on the screen and in the run's folder."""
    stage = recipe.stages[state.stage]
    count = stage.prompts_per_step
    chosen = endless_problems(problems, recipe.seed, state.problems_seen, count)
    with screen.sampling("rollout", len(share(chosen)) * stage.samples_per_prompt) as show:

        def on_progress(done: int, tokens: int) -> None:
            # A step of which nothing but rollouts exists can be dropped; the ranks of several would wait for
            # it.
            if stop.requested and world_size() == 1:
                raise RolloutsDropped
            if show:
                show(done, tokens)

        groups, advantages, metrics = grpo_step(
            model,
            tokenizer,
            optimizer,
            recipe.task,
            chosen,
            settings=stage,
            sampling=recipe.sampling,
            reward=recipe.reward,
            learning_rate=learning_rate_at(stage, state.stage_step),
            seed=1000 * recipe.seed + state.step,
            reference=reference,
            on_progress=on_progress,
        )
    state.problems_seen += count
    screen.rollouts(groups)
    if is_main():
        run.save_rollouts(state.step + 1, state.stage, groups, advantages)
    metrics |= rollout_metrics(groups) | {"micro_batch_tokens": optimizer.micro_batch_tokens}
    if optimizer.updated_fraction is not None:
        metrics["weights_moved"] = optimizer.updated_fraction
    return metrics | {"tokens_per_second": metrics["tokens"] / metrics["rollout_seconds"]}


def learning_rate_at(stage: GRPOStage, step: int) -> float:
    """The learning rate of step 0, 1, ... of a stage: a linear rise, and a linear fall over the whole stage.
    """
    rise = min(1.0, (step + 1) / max(1, stage.warmup_steps))
    fall = 1 - (1 - stage.end_rate) * step / max(1, stage.steps - 1)
    return stage.learning_rate * rise * fall


def take_sft_step(
    model: Qwen3, optimizer: Optimizer, stage: SFTStage, state: TrainState, schedule: list[list[Sample]]
) -> dict:
    """One step of the schedule, at a learning rate that falls linearly to zero."""
    start = time.perf_counter()
    learning_rate = stage.learning_rate * (1 - state.stage_step / len(schedule))
    metrics = sft_step(model, optimizer, schedule[state.stage_step], learning_rate)
    return metrics | {"lr": learning_rate, "update_seconds": time.perf_counter() - start}


def sft_batches(
    tokenizer: Tokenizer,
    recipe: Recipe,
    run: RunFolder,
    screen: Screen,
    state: TrainState,
    held_out: list[Problem],
) -> list[list[Sample]]:
    """The samples of each step of an SFT stage; none where no rollout was correct."""
    stage = recipe.stages[state.stage]
    traces = broadcast(traces_for(recipe, run, state, held_out) if is_main() else None)
    if not traces:
        screen.say("no correct rollouts to imitate: the sft stage is skipped")
        return []
    samples = []
    for trace in traces:
        prompt = prompt_ids(tokenizer, recipe.task.prompt(trace.problem), recipe.sampling.thinking)
        samples.append(Sample(prompt, tokenizer.encode(trace.completion) + [tokenizer.end_of_turn_id]))
    source = stage.traces or run.path / "traces.jsonl"
    solved = len({trace.problem.key for trace in traces})
    screen.say(f"sft on {len(traces)} curated traces of {solved} problems ({source})")
    return sft_schedule(samples, stage.batch_size, stage.epochs, recipe.seed)


def traces_for(recipe: Recipe, run: RunFolder, state: TrainState, held_out: list[Problem]) -> list[Trace]:
    """What an SFT stage imitates: a file that the recipe names, or what it curates, and saves, from the
    stage before.
    """
    stage, task, thinking = recipe.stages[state.stage], recipe.task, recipe.sampling.thinking
    source = stage.traces or run.path / "traces.jsonl"
    if stage.traces is None:
        correct = run.correct_traces(state.stage - 1, task)
        curated = curate(correct, stage.traces_per_problem, stage.max_traces)
        save_traces(source, curated)
        if not curated:
            return []
    traces = load_traces(
        source, task.problem, lambda text, p: task.score(text, p, thinking).outcome == "correct"
    )
    held_out_keys = {problem.key for problem in held_out}
    traces = [trace for trace in traces if trace.problem.key not in held_out_keys]
    if not traces:
        raise DataError(f"{source}: all traces are of held-out problems; use others")
    return traces


def stage_start_model(model: Qwen3, recipe: Recipe, run: RunFolder, state: TrainState) -> Qwen3:
    """The reference of the KL penalty: a frozen copy of the policy as it was when the stage began."""
    source = recipe.model
    for folder in checkpoints(run.path):
        saved = load_state(folder)
        if (saved.stage, saved.stage_step) == (state.stage, 0):
            source = folder
    sharded = sharding_of(model) is not None
    reference, _ = load_model(source, "cpu" if sharded else model.device, model.dtype, recipe.revision)
    reference.requires_grad_(False)
    return shard(reference, model.device) if sharded else reference


def evaluation_metrics(
    model: Qwen3, tokenizer: Tokenizer, recipe: Recipe, held_out: list[Problem], screen: Screen
) -> dict[str, float]:
    """Accuracy on the first `evaluation.problems` held-out problems, sampled as in training."""
    start = time.perf_counter()
    problems = held_out[: recipe.evaluation.problems]
    metrics = accuracy_metrics("eval", model, tokenizer, recipe, problems, screen)
    return metrics | {"eval_seconds": time.perf_counter() - start}


def final_metrics(
    model: Qwen3, tokenizer: Tokenizer, recipe: Recipe, held_out: list[Problem], screen: Screen
) -> dict[str, float]:
    """Accuracy at the end of a run on `evaluation.final_problems`: sampled as in training, and greedy."""
    problems = held_out[: recipe.evaluation.final_problems]
    if not problems:
        return {}
    greedy = replace(recipe, sampling=replace(recipe.sampling, temperature=0.0))
    metrics = accuracy_metrics("final", model, tokenizer, recipe, problems, screen)
    metrics |= accuracy_metrics("final_greedy", model, tokenizer, greedy, problems, screen)
    return {name: value for name, value in metrics.items() if not name.endswith("_length")}


def accuracy_metrics(
    name: str, model: Qwen3, tokenizer: Tokenizer, recipe: Recipe, problems: list[Problem], screen: Screen
) -> dict[str, float]:
    options = {"sampling": recipe.sampling, "num_samples": 1, "seed": EVALUATION_SEED}
    with screen.sampling("evaluation", len(share(problems))) as show:
        result = evaluate(model, tokenizer, recipe.task, problems, **options, on_progress=show)
    return {
        f"{name}_accuracy": result.accuracy,
        f"{name}_low": result.low,
        f"{name}_high": result.high,
        f"{name}_completion_length": result.completion_length,
    }


def record(run: RunFolder, screen: Screen, recipe: Recipe, row: dict, done: int, steps: int) -> None:
    """Log and show the metrics of a step, number `done` of the `steps` of its stage."""
    if is_main():
        run.log(row)
        screen.step(row, len(recipe.stages), done, steps)
        if "eval_accuracy" in row:
            write_curve(run, paper_points(recipe))


def check_skipped(optimizer: Optimizer) -> None:
    if optimizer.skipped_in_a_row >= MAX_SKIPPED_UPDATES:
        raise RecipeError(
            f"{optimizer.skipped_in_a_row} updates in a row had no finite loss and gradient: lower the learning "
            "rate, or try --dtype float32, in a new run; the weights are as they were before"
        )


def save_now(
    run: RunFolder,
    model: Qwen3,
    tokenizer: Tokenizer,
    recipe: Recipe,
    state: TrainState,
    optimizer: Optimizer | None,
) -> None:
    """Save a checkpoint. Rank 0 writes; the others wait, and give their part of a sharded model."""
    full = full_model(model, keep=is_main())
    if is_main():
        folder = run.path / "checkpoints" / f"step_{state.step:04d}"
        save_checkpoint(folder, full, tokenizer, optimizer, state, recipe)
        accuracies = {row["step"]: row["eval_accuracy"] for row in run.metrics() if "eval_accuracy" in row}
        prune_checkpoints(run.path, recipe.keep_checkpoints, accuracies)
    elif sharding_of(model) and optimizer:
        for _ in state_tensors(optimizer, model.dtype):  # collective: rank 0 saves them
            pass
    broadcast(None)

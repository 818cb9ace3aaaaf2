"""A run: the recipe's stages one after the other, with evaluations, metrics and checkpoints on the way."""

import contextlib
import time
from dataclasses import replace

from rl.checkpoint import Progress, load_optimizer, prune_checkpoints, save_checkpoint
from rl.console import final_line
from rl.device import peak_memory
from rl.evaluate import EVALUATION_SEED, Evaluation, evaluate
from rl.interruption import RolloutsDropped, Stopped, stoppable
from rl.lab import Lab, set_up
from rl.learner import Learner
from rl.optimizer import Optimizer
from rl.plots import paper_points, write_curve
from rl.recipe import Recipe, RecipeError, SamplingSettings
from rl.recipe_file import to_dict
from rl.report import write_report
from rl.runfolder import RunFolder
from rl.sharding import round_to_saved, sharding_of, whole_model
from rl.steps import grpo_stage, sft_stage
from rl.trackers import WandB
from rl.view import pick_view
from rl.workers import begun_again, workers_of_torchrun


def train(recipe: Recipe, resume: bool = False, quiet: bool = False, plain: bool = False, wandb: bool = False) -> None:
    """Run `recipe` into its run folder, from the start or from the last checkpoint there.

    `quiet` shows nothing but errors, `plain` a line a step on a terminal too; `wandb` logs to Weights & Biases.

    Raises:
        ModelError, DataError, RecipeError: something the user named cannot be used.
    """
    for number, stage in enumerate(recipe.stages):
        if stage.kind == "sft" and stage.traces is None and (number == 0 or recipe.stages[number - 1].kind != "grpo"):
            raise RecipeError(f"stages.{number}: an sft stage needs a grpo stage right before it, or a file in traces")
    run = RunFolder(recipe.out)
    with workers_of_torchrun() as workers, contextlib.ExitStack() as around:
        if workers.leads:
            around.enter_context(run.locked())
        resume = workers.lead(resume or (begun_again() and run.holds_run))
        view = around.enter_context(pick_view(recipe, quiet or not workers.leads, plain))
        lab, progress, checkpoint = set_up(recipe, run, resume, view, workers)
        if wandb and workers.leads:
            run.trackers.append(WandB(run.path, to_dict(recipe)))
        if not workers.lead(resume and bool(run.metrics())):
            first_evaluation(lab, resume)
        with stoppable(workers.leads) as lab.stop:
            while progress.stage < len(recipe.stages):
                run_stage(lab, progress, checkpoint)
                checkpoint = None
        if workers.leads:
            conclude(lab)


def conclude(lab: Lab) -> None:
    """Write what a finished run is looked at by, and say where it is."""
    run = lab.run
    write_curve(run, paper_points(lab.recipe))
    last = run.metrics()[-1]
    if "final_accuracy" in last:
        lab.view.say(final_line(last, lab.recipe.evaluation.final_problems))
    lab.view.say(f"done: {run.path}/curve.md and curve.png; to look into it, open {write_report((run.path,))}")


def first_evaluation(lab: Lab, resume: bool) -> None:
    """Accuracy before any step, the run's first line of metrics."""
    recipe = lab.recipe
    row = {"stage": 0, "kind": recipe.stages[0].kind if recipe.stages else "baseline", "step": 0, "grpo_steps": 0}
    row |= evaluation_metrics(lab)
    if not recipe.stages:
        row |= final_metrics(lab)
    if not resume and lab.workers.leads:
        lab.run.create(recipe)  # only now: a run refused before its first metrics is not in the corrected one's way
    record(lab, row, 0, 0)


def record(lab: Lab, row: dict, done: int, steps: int) -> None:
    """Log a row of metrics, of step `done` of `steps` in its stage, and show it."""
    if lab.workers.leads:
        lab.run.log(row)
        lab.view.step(row, len(lab.recipe.stages), done, steps)
        if "eval_accuracy" in row:
            write_curve(lab.run, paper_points(lab.recipe))


def run_stage(lab: Lab, progress: Progress, checkpoint=None) -> None:
    """Take the steps of one stage that are still to be taken; `checkpoint` is where the run is resumed from."""
    recipe, stage = lab.recipe, lab.recipe.stages[progress.stage]
    settings = recipe.optimizer
    round_to_saved(lab.model)
    optimizer = Optimizer(lab.model, settings.kind, settings.weight_decay, settings.rounding)
    if checkpoint is not None and progress.stage_step > 0:
        load_optimizer(checkpoint, optimizer)
    learner = Learner(lab.model, optimizer, recipe, lab.micro_batch_tokens, lab.workers)
    make = {"grpo": grpo_stage, "sft": sft_stage}[stage.kind]
    take_step, steps = make(lab, stage, learner, progress)
    while progress.stage_step < steps:
        end_if_asked(lab, optimizer, progress)
        row = {"stage": progress.stage, "kind": stage.kind, "step": progress.step + 1}
        try:
            row |= take_step(progress)
        except RolloutsDropped:
            continue
        progress.step += 1
        progress.stage_step += 1
        progress.grpo_steps += stage.kind == "grpo"
        row |= {"grpo_steps": progress.grpo_steps, "peak_memory_bytes": peak_memory(lab.model.device)}
        last = progress.stage_step == steps
        if last or progress.stage_step % recipe.evaluation.every == 0:
            row |= evaluation_metrics(lab)
        if last and progress.stage == len(recipe.stages) - 1:
            row |= final_metrics(lab)
        record(lab, row, progress.stage_step, steps)
        look_at_faults(lab, learner, progress.step)
        if not last and progress.stage_step % recipe.checkpoint_every == 0:
            checkpoint_now(lab, optimizer, progress)
    lab.micro_batch_tokens = learner.micro_batch_tokens
    progress.stage += 1
    progress.stage_step = 0
    checkpoint_now(lab, None, progress)


def end_if_asked(lab: Lab, optimizer: Optimizer, progress: Progress) -> None:
    """Save and end the run between two steps, if Ctrl-C or SIGTERM came.

    Raises:
        Stopped: it did.
    """
    if lab.workers.any(lab.stop.requested):
        checkpoint_now(lab, optimizer if progress.stage_step else None, progress)
        number = next(filter(None, lab.workers.gather(lab.stop.number)))
        raise Stopped(f"Saved after step {progress.step}; go on with the same command and --resume.", number)


def look_at_faults(lab: Lab, learner: Learner, step: int) -> None:
    """Keep the samples of updates that were left out; raise RecipeError with advice if there were too many in a row."""
    if not learner.faulty:
        return
    path = lab.run.save_faults(step, learner.faulty, lab.tokenizer) if lab.workers.leads else None
    learner.faulty = []
    if learner.skipped_in_a_row >= lab.recipe.optimizer.max_skipped_updates:
        raise RecipeError(
            f"{learner.skipped_in_a_row} updates in a row had no finite loss and gradient (their samples: {path}): lower the "
            "learning rate, or try --dtype float32, in a new run; the weights are as they were before"
        )


def checkpoint_now(lab: Lab, optimizer: Optimizer | None, progress: Progress) -> None:
    """Save where the run stands; the leading process writes, the others wait, and give their part of a divided model."""
    model = whole_model(lab.model, keep=lab.workers.leads)
    if lab.workers.leads:
        folder = lab.run.path / "checkpoints" / f"step_{progress.step:04d}"
        save_checkpoint(folder, model, lab.tokenizer, optimizer, progress, lab.recipe)
        accuracies = {row["step"]: row["eval_accuracy"] for row in lab.run.metrics() if "eval_accuracy" in row}
        prune_checkpoints(lab.run.path, lab.recipe.keep_checkpoints, accuracies)
    elif sharding_of(lab.model) and optimizer:
        for _ in optimizer.state_tensors():  # as the leading process does in saving them
            pass
    lab.workers.gather(None)


def evaluation_metrics(lab: Lab) -> dict[str, float]:
    start = time.perf_counter()
    result, metrics = evaluated(lab, "eval", lab.recipe.evaluation.problems, lab.recipe.sampling)
    return metrics | {"eval_completion_length": result.completion_length, "eval_seconds": time.perf_counter() - start}


def final_metrics(lab: Lab) -> dict[str, float]:
    """Accuracy at the end of a run on all of its held-out problems: as it samples, and taking the likeliest token."""
    sampling, count = lab.recipe.sampling, lab.recipe.evaluation.final_problems
    if count == 0:
        return {}
    greedy = replace(sampling, temperature=0.0)
    return evaluated(lab, "final", count, sampling)[1] | evaluated(lab, "final_greedy", count, greedy)[1]


def evaluated(lab: Lab, name: str, count: int, sampling: SamplingSettings) -> tuple[Evaluation, dict[str, float]]:
    """An evaluation on the first `count` held-out problems, and its accuracy and interval as metrics."""
    problems, actor = lab.held_out[:count], replace(lab.actor, sampling=sampling)
    with lab.view.sampling("evaluation", len(lab.workers.share(problems))) as progress:
        result = evaluate(actor, problems, 1, EVALUATION_SEED, progress, lab.workers)
    return result, {f"{name}_accuracy": result.accuracy, f"{name}_low": result.low, f"{name}_high": result.high}

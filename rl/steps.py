"""What one step of a stage does: sample a rollout batch and learn from it, or imitate a batch of traces."""

import time
from collections.abc import Callable
from functools import partial

from data import DataError
from data.traces import Trace, curate, load_traces, save_traces
from model import Qwen3, load_model
from rl.batch import Sample
from rl.checkpoint import Progress, checkpoints, load_progress
from rl.grpo import group_samples, grpo_update
from rl.interruption import RolloutsDropped
from rl.lab import Lab
from rl.learner import Learner
from rl.problems import endless_problems
from rl.recipe import GRPOStage, SFTStage
from rl.rollout import collect_rollouts, paid, rollout_metrics
from rl.sft import sft_schedule, sft_step
from rl.sharding import shard, sharding_of
from rl.view import Report

Step = Callable[[Progress], dict]  # takes a step, and gives its metrics


def grpo_stage(lab: Lab, stage: GRPOStage, learner: Learner, progress: Progress) -> tuple[Step, int]:
    """The step function of a GRPO stage, and how many steps it takes."""
    recipe = lab.recipe
    learner.reference = stage_start_model(lab, progress) if stage.kl_coef else None

    def take_step(progress: Progress) -> dict:
        start = time.perf_counter()
        problems = endless_problems(lab.train, recipe.seed, progress.problems_seen, stage.prompts_per_step)
        seed = 1000 * recipe.seed + progress.step
        size = stage.samples_per_prompt
        with lab.view.sampling("rollout", len(lab.workers.share(problems)) * size) as shown:
            watched = partial(report_or_drop, lab, shown)
            groups = collect_rollouts(lab.actor, problems, size, seed, watched, lab.workers)
        progress.problems_seen += stage.prompts_per_step
        groups = paid(groups, recipe.reward)
        lab.view.rollouts(groups)
        sampled = time.perf_counter()
        rate = learning_rate(stage, progress.stage_step)
        samples = group_samples(groups, stage.scale_by_std)
        metrics = rollout_metrics(groups) | grpo_update(learner, samples, stage, rate)
        if lab.workers.leads:
            lab.run.save_rollouts(progress.step + 1, progress.stage, groups, samples)
        rollout_seconds, update_seconds = sampled - start, time.perf_counter() - sampled
        return metrics | {
            "rollout_seconds": rollout_seconds,
            "update_seconds": update_seconds,
            "tokens_per_second": metrics["tokens"] / rollout_seconds,
        }

    return take_step, stage.steps


def report_or_drop(lab: Lab, report: Report | None, done: int, tokens: int) -> None:
    """What `generate` calls now and then: pass it on, or break off a step of which nothing but rollouts exists yet.

    Several processes finish the step first: the others count on this one's part of it.
    """
    if lab.stop.requested and lab.workers.size == 1:
        raise RolloutsDropped
    if report:
        report(done, tokens)


def learning_rate(stage: GRPOStage, step: int) -> float:
    """The learning rate of a GRPO stage's steps 0, 1, ...: a linear rise, and a linear fall over the whole stage."""
    rise = min(1.0, (step + 1) / max(1, stage.warmup_steps))
    fall = 1 - (1 - stage.end_rate) * step / max(1, stage.steps - 1)
    return stage.learning_rate * rise * fall


def sft_stage(lab: Lab, stage: SFTStage, learner: Learner, progress: Progress) -> tuple[Step, int]:
    """The step function of an SFT stage, and how many steps its traces make."""
    tokenizer = lab.tokenizer
    traces = lab.workers.lead(traces_of(lab, stage, progress) if lab.workers.leads else None)
    if not traces:
        lab.view.say("no correct rollouts to imitate: the sft stage is skipped")
        return lambda progress: {}, 0
    samples = [
        Sample(
            lab.actor.prompt_ids(trace.problem),
            tokenizer.encode(trace.completion) + [tokenizer.end_of_turn_id],
        )
        for trace in traces
    ]
    schedule = sft_schedule(samples, stage.batch_size, stage.epochs, lab.recipe.seed)
    source = stage.traces or lab.run.path / "traces.jsonl"
    lab.view.say(f"sft on {len(traces)} curated traces of {len({t.problem.key for t in traces})} problems ({source})")

    def take_step(progress: Progress) -> dict:
        start = time.perf_counter()
        rate = stage.learning_rate * (1 - progress.stage_step / len(schedule))
        metrics = sft_step(learner, schedule[progress.stage_step], rate)
        return metrics | {"lr": rate, "update_seconds": time.perf_counter() - start}

    return take_step, len(schedule)


def traces_of(lab: Lab, stage: SFTStage, progress: Progress) -> list[Trace]:
    """What an SFT stage imitates: a file of the user's, or what is curated, and kept, of the stage before."""
    task, thinking = lab.recipe.task, lab.recipe.sampling.thinking
    source = stage.traces or lab.run.path / "traces.jsonl"
    if stage.traces is None:
        curated = curate(lab.run.correct_traces(progress.stage - 1, task), stage.traces_per_problem, stage.max_traces)
        save_traces(source, curated)
        if not curated:
            return []
    held_out = {problem.key for problem in lab.held_out}
    traces = load_traces(source, task.problem, lambda text, problem: task.score(text, problem, thinking).outcome == "correct")
    traces = [trace for trace in traces if trace.problem.key not in held_out]
    if not traces:
        raise DataError(f"{source}: all traces are of held-out problems; use others")
    return traces


def stage_start_model(lab: Lab, progress: Progress) -> Qwen3:
    """A frozen copy of the policy as it was when the stage began: the reference of the KL penalty."""
    source = lab.recipe.model
    for folder in checkpoints(lab.run.path):
        saved = load_progress(folder)
        if (saved.stage, saved.stage_step) == (progress.stage, 0):
            source = folder
    device = "cpu" if sharding_of(lab.model) else lab.model.device
    reference, _ = load_model(source, device, lab.model.dtype, lab.recipe.revision)
    reference.requires_grad_(False)
    return shard(reference, lab.workers, lab.model.device) if sharding_of(lab.model) else reference

"""`train` runs the stages of a recipe. A stage has a number of steps, and `take_step`."""

import contextlib
import re
import time
from dataclasses import asdict, replace
from pathlib import Path

from data import DataError
from data.load import endless_problems
from data.traces import Trace, curate, save_traces, worked_traces
from lab.checkpoint import load_optimizer
from lab.device import processes, restarted
from lab.errors import stoppable
from lab.metrics import rollout_metrics
from lab.recipe import Recipe
from lab.run import Run
from lab.runfolder import RunFolder
from lab.screen import pick_screen
from lab.setup import read_traces, stage_start_model
from model.sampler import Cancelled
from rl.batch import Sample
from rl.distributed import broadcast, is_main, own_part
from rl.grpo import GRPOStage, grpo_step
from rl.optimizer import Optimizer
from rl.rollout import prompt_for
from rl.sft import WORKED, SFTStage, sft_schedule, sft_step
from rl.trainer import Trainer


def train(recipe: Recipe, resume=False, quiet=False, plain=False, wandb=False) -> None:
    """Run `recipe` into its run folder, from the start or, with `resume`, from the last checkpoint there.

    The options are those of train.py. ModelError, DataError, RecipeError: something that the user named
    cannot be used. Stopped: a signal has ended the run.
    """
    with processes(), contextlib.ExitStack() as stack:
        folder = RunFolder(recipe.out)
        if is_main():
            stack.enter_context(folder.locked())
        resume = broadcast(resume or (restarted() and folder.holds_run))
        screen = stack.enter_context(pick_screen(recipe, quiet or not is_main(), plain))
        run = Run(recipe, folder, screen, resume)
        if wandb and is_main():
            run.boards.start_wandb(asdict(recipe))
        run.evaluate_first()
        run.stop = stack.enter_context(stoppable(is_main()))
        while run.state.stage < len(recipe.stages):
            train_stage(run)
        run.finish()


def train_stage(run: Run) -> None:
    """The steps of one stage that are left. When it returns, the memory of its optimizer is free again."""
    run.stage = begin_stage(run)
    run.complete_evaluation()
    while run.state.stage_step < run.stage.steps:
        run.stop_if_asked()
        try:
            metrics = run.stage.take_step()
        except Cancelled:  # by a signal, before the step has changed anything
            continue
        run.finish_step(metrics)
    run.end_stage()


def begin_stage(run: Run) -> "GRPOTraining | SFTTraining":
    """The stage that `run` is in, with a new optimizer or, within a resumed stage, the saved one."""
    settings = run.recipe.stages[run.state.stage]
    trainer = Trainer(run.model, Optimizer(run.model, run.recipe.optimizer), run.micro_batch_tokens)
    if run.checkpoint is not None and run.state.stage_step > 0:
        load_optimizer(trainer.optimizer, run.checkpoint)
    run.checkpoint = None
    kind = GRPOTraining if settings.kind == "grpo" else SFTTraining
    return kind(run, settings, trainer)


class GRPOTraining:
    """A GRPO stage of a run."""

    kind = "grpo"

    def __init__(self, run: Run, settings: GRPOStage, trainer: Trainer):
        self.run = run
        self.settings = settings
        self.trainer = trainer
        self.steps = settings.steps
        self.evaluate_every = run.recipe.evaluation.every
        self.reference = None
        if settings.kl_coef:
            self.reference = stage_start_model(run.model, run.recipe, run.folder, run.state)

    def take_step(self) -> dict:
        """A GRPO step on the next problems. Its rollouts go to the screen and into the run's folder."""
        run, settings, state = self.run, self.settings, self.run.state
        count = settings.prompts_per_step
        problems = endless_problems(run.problems, run.recipe.seed, state.problems_seen, count)
        completions = len(own_part(problems)) * settings.samples_per_prompt
        with run.screen.sampling("rollout", completions) as on_progress:
            groups, advantages, metrics = grpo_step(
                self.trainer,
                run.tokenizer,
                run.recipe.task,
                problems,
                settings=settings,
                sampling=run.recipe.sampling,
                reward=run.recipe.reward,
                learning_rate=learning_rate_at(settings, state.stage_step, self.trainer.optimizer.updates),
                seed=1000 * run.recipe.seed + state.step,
                reference=self.reference,
                on_progress=on_progress,
                cancel=run.stop.requested,
            )
        state.problems_seen += count
        state.see(problems)
        run.screen.rollouts(groups)
        if is_main():
            run.folder.save_rollouts(state.step + 1, state.stage, groups, advantages)
        metrics |= rollout_metrics(groups)
        metrics["micro_batch_tokens"] = self.trainer.micro_batch_tokens
        metrics["tokens_per_second"] = metrics["tokens"] / metrics["rollout_seconds"]
        return metrics


class SFTTraining:
    """An SFT stage of a run."""

    kind = "sft"

    def __init__(self, run: Run, settings: SFTStage, trainer: Trainer):
        self.run = run
        self.settings = settings
        self.trainer = trainer
        self.batches = self.make_batches()
        self.steps = len(self.batches)
        self.evaluate_every = max(run.recipe.evaluation.every, -(-self.steps // 4))  # its steps are short

    def make_batches(self) -> list[list[Sample]]:
        """The samples of each step; none where no rollout was correct."""
        run, settings = self.run, self.settings
        traces = broadcast(traces_for(run) if is_main() else None)
        if not traces:
            run.screen.say("no correct rollouts to imitate: the sft stage is skipped")
            return []
        samples = []
        for trace in traces:
            prompt = prompt_for(run.tokenizer, run.recipe.task, trace.problem, run.recipe.sampling)
            completion = run.tokenizer.encode_answer(trace.completion)
            run.model.config.check_positions(len(prompt), len(completion), run.recipe.model)
            samples.append(Sample(prompt, completion))
        run.state.see(trace.problem for trace in traces)
        solved = len({trace.problem.key for trace in traces})
        source = trace_file(settings, run.folder)
        origin = "worked solutions" if settings.traces == WORKED else "traces"
        run.screen.say(f"sft on {len(traces)} {origin} of {solved} problems ({source})")
        return sft_schedule(samples, settings.batch_size, settings.epochs, run.recipe.seed)

    def take_step(self) -> dict:
        """One step of the schedule, at a learning rate that falls linearly to zero."""
        start = time.perf_counter()
        number = self.run.state.stage_step
        learning_rate = self.settings.learning_rate * (1 - number / self.steps)
        metrics = sft_step(self.trainer, self.batches[number], learning_rate, cancel=self.run.stop.requested)
        return metrics | {"lr": learning_rate, "update_seconds": time.perf_counter() - start}


def learning_rate_at(stage: GRPOStage, step: int, updates: int) -> float:
    """The learning rate of step 0, 1, ... of a stage; it falls linearly, and rises over the first updates."""
    rise = min(1.0, (updates / stage.updates_per_step + 1) / max(1, stage.warmup_steps))
    fall = 1 - (1 - stage.end_rate) * step / max(1, stage.steps - 1)
    return stage.learning_rate * rise * fall


def trace_file(stage: SFTStage, folder: RunFolder) -> Path:
    """The file that an SFT stage learns from: the user's own, or one that the run writes."""
    if stage.traces == WORKED:
        return folder.path / "worked.jsonl"
    return Path(stage.traces) if stage.traces else folder.path / "traces.jsonl"


def traces_for(run: Run) -> list[Trace]:
    """The traces of an SFT stage: the user's file, worked solutions, or the rollouts before it, curated.

    A stage that goes on takes the file that it began with. DataError: a trace cannot be used.
    RecipeError: rollouts of the stage before are missing.
    """
    recipe, state = run.recipe, run.state
    stage, task, thinking = recipe.stages[state.stage], recipe.task, recipe.sampling.thinking
    source = trace_file(stage, run.folder)
    goes_on = state.stage_step > 0 and source.exists()
    if stage.traces == WORKED and not goes_on:
        save_traces(source, worked_traces(task, run.problems, stage.max_traces, thinking, recipe.seed))
    elif stage.traces is None and not goes_on:
        correct = run.folder.correct_traces(state.stage - 1, task)
        curated = curate(correct, stage.traces_per_problem, stage.max_traces)
        save_traces(source, curated)
        if not curated:
            return []

    traces = []
    kept_back = {problem.key for problem in (*run.held_out, *task.examples(recipe.sampling.examples))}
    for trace in read_traces(recipe, source):
        if trace.problem.key not in kept_back:
            completion = trace.completion
            if thinking:  # the prompt has opened the tag
                completion = re.sub(r"\A\s*<think>", "", completion)
            traces.append(replace(trace, completion=completion))
    if not traces:
        raise DataError(f"{source}: all traces are of held-out problems; use others")
    return traces

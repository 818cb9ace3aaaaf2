"""A run: the stages of a recipe one after the other, with evaluations, metrics and checkpoints on the way."""

import contextlib
import re
import time
from dataclasses import asdict, replace
from pathlib import Path

from data import DataError
from data.load import endless_problems
from data.task import Problem
from data.traces import Trace, curate, save_traces, worked_traces
from lab.checkpoint import TrainState, load_into, prune_checkpoints, save_checkpoint
from lab.device import peak_memory, processes, restarted
from lab.errors import Stopped, stoppable
from lab.evaluate import EVALUATION_SEED, evaluate
from lab.plots import paper_points, write_curve
from lab.recipe import Recipe, RecipeError
from lab.report import write_report
from lab.runfolder import RunFolder
from lab.screen import describe_run, final_line, pick_screen, planned_time, silence, stuck, time_left
from lab.setup import find_state, read_traces, set_up, stage_start_model
from model.sampler import Cancelled
from model.weights import is_embedded
from rl.batch import Sample
from rl.distributed import all_values, any_rank, broadcast, is_main, share, world_size
from rl.grpo import GRPOStage, grpo_step
from rl.metrics import rollout_metrics
from rl.optimizer import Optimizer
from rl.rollout import prompt_of
from rl.sft import WORKED, SFTStage, sft_schedule, sft_step

MAX_SKIPPED_UPDATES = 5  # in a row, then the run ends


def train(recipe: Recipe, resume=False, quiet=False, plain=False, wandb=False) -> None:
    """Run `recipe` into its run folder, from the start or, with `resume`, from the last checkpoint there.

    The options are those of train.py. ModelError, DataError, RecipeError: something that the user named
    cannot be used. Stopped: a signal has ended the run.
    """
    # 1. Set up: the run's folder and screen, its model and problems, and where it stands.
    started = time.perf_counter()
    saving = last_save = 0.0  # seconds
    run = RunFolder(recipe.out)
    with processes(), contextlib.ExitStack() as stack:
        if is_main():
            stack.enter_context(run.locked())
        resume = broadcast(resume or (restarted() and run.holds_run))
        screen = stack.enter_context(pick_screen(recipe, quiet or not is_main(), plain))
        state, checkpoint = find_state(recipe, run, resume, screen)
        model, tokenizer, problems, held_out, micro_batch_tokens, fitness = set_up(recipe, checkpoint, state)
        screen.say(describe_run(recipe, model, problems, held_out, state.step if resume else None))
        screen.say(fitness)
        if resume and is_main():
            run.check_problems(state.problems)
            run.rewind(state.step if checkpoint else -1)
        screen.history(run.metrics())
        if wandb and is_main():
            run.start_wandb(asdict(recipe))

        def evaluation(last: bool) -> dict[str, float]:
            """Accuracy on held-out problems, sampled as in training; if `last`, on more, and greedy too."""
            start = time.perf_counter()
            settings = recipe.evaluation
            evaluations = [("eval", settings.problems, recipe.sampling)]
            if last and settings.final_problems:
                greedy = replace(recipe.sampling, temperature=0.0)
                evaluations.append(("final", settings.final_problems, recipe.sampling))
                evaluations.append(("final_greedy", settings.final_problems, greedy))
            metrics = {}
            for name, count, sampling in evaluations:
                options = {"sampling": sampling, "num_samples": 1, "seed": EVALUATION_SEED}
                with screen.sampling("evaluation", len(share(held_out[:count]))) as options["on_progress"]:
                    result = evaluate(model, tokenizer, recipe.task, held_out[:count], **options)
                metrics |= {f"{name}_{part}": getattr(result, part) for part in ("accuracy", "low", "high")}
                if name == "eval":
                    metrics["eval_completion_length"] = result.completion_length
                    metrics["eval_truncated_fraction"] = result.truncated_fraction
                    metrics["eval_format_rate"] = 1 - result.counts["malformed"] / sum(result.counts.values())
                    metrics["eval_seconds"] = time.perf_counter() - start
            return metrics

        def record(row: dict, steps: int) -> None:
            """Log and show the metrics of a step, one of the `steps` of its stage."""
            if is_main():
                run.log(row)
                screen.step(row, len(recipe.stages), state.stage_step, steps)
                if row["kind"] == "grpo" and state.stage_step == 3:
                    screen.say(f"at this speed, {time_left(row, recipe)} of GRPO left, without evaluations")
                if "eval_accuracy" in row:
                    write_curve(run, paper_points(recipe))
                    for words in (silence(row, recipe), stuck(row, recipe)):
                        if words:
                            screen.say(words)

        def save(optimizer: Optimizer | None) -> None:
            """Save a checkpoint. Rank 0 writes; the others wait."""
            nonlocal last_save, saving
            start = time.perf_counter()
            if is_main():
                folder = run.path / "checkpoints" / f"step_{state.step:04d}"
                save_checkpoint(folder, model, tokenizer, optimizer, state, recipe)
                rows = [row for row in run.metrics() if "eval_accuracy" in row]
                accuracies = {row["step"]: row["eval_accuracy"] for row in rows}
                prune_checkpoints(run.path, recipe.keep_checkpoints, accuracies)
            broadcast(None)
            last_save = time.perf_counter() - start
            saving += last_save

        def can_save() -> bool:
            """Whether one more checkpoint keeps all of them within their share of the time."""
            elapsed = time.perf_counter() - started
            return broadcast(saving + last_save <= recipe.checkpoint_share * elapsed)

        def take_grpo_step() -> dict:
            """A GRPO step on the next problems; its rollouts go to the screen and into the run's folder."""
            count = stage.prompts_per_step
            chosen = endless_problems(problems, recipe.seed, state.problems_seen, count)
            options = {"settings": stage, "sampling": recipe.sampling, "reward": recipe.reward}
            options |= {"learning_rate": learning_rate_at(stage, state.stage_step, optimizer.steps)}
            options["reference"] = reference
            # A step that has only sampled can be dropped, unless other ranks would wait for this one.
            options["cancel"] = stop.requested if world_size() == 1 else None
            options["seed"] = 1000 * recipe.seed + state.step
            with screen.sampling("rollout", len(share(chosen)) * stage.samples_per_prompt) as show:
                step = (model, tokenizer, optimizer, recipe.task, chosen)
                groups, advantages, metrics = grpo_step(*step, **options, on_progress=show)
            state.problems_seen += count
            state.see(chosen)
            screen.rollouts(groups)
            if is_main():
                run.save_rollouts(state.step + 1, state.stage, groups, advantages)
            metrics |= rollout_metrics(groups) | {"micro_batch_tokens": optimizer.micro_batch_tokens}
            return metrics | {"tokens_per_second": metrics["tokens"] / metrics["rollout_seconds"]}

        def sft_batches() -> list[list[Sample]]:
            """The samples of each step of an SFT stage; none where no rollout was correct."""
            traces = broadcast(traces_for(recipe, run, state, problems, held_out) if is_main() else None)
            if not traces:
                screen.say("no correct rollouts to imitate: the sft stage is skipped")
                return []
            samples = []
            for trace in traces:
                prompt = prompt_of(tokenizer, recipe.task, trace.problem, recipe.sampling)
                completion = tokenizer.encode_answer(trace.completion)
                model.config.check_positions(len(prompt), len(completion), recipe.model)
                samples.append(Sample(prompt, completion))
            state.see(trace.problem for trace in traces)
            solved = len({trace.problem.key for trace in traces})
            what = "worked solutions" if stage.traces == WORKED else "curated traces"
            screen.say(f"sft on {len(traces)} {what} of {solved} problems ({trace_file(stage, run)})")
            return sft_schedule(samples, stage.batch_size, stage.epochs, recipe.seed)

        def take_sft_step() -> dict:
            """One step of the schedule, at a learning rate that falls linearly to zero."""
            start = time.perf_counter()
            learning_rate = stage.learning_rate * (1 - state.stage_step / len(schedule))
            metrics = sft_step(model, optimizer, schedule[state.stage_step], learning_rate)
            return metrics | {"lr": learning_rate, "update_seconds": time.perf_counter() - start}

        # 2. Accuracy before any step. The folder holds a run only now, so a failed start can be repeated.
        if not broadcast(resume and bool(run.metrics())):
            kind = recipe.stages[0].kind if recipe.stages else "baseline"
            row = {"stage": 0, "kind": kind, "step": 0, "grpo_steps": 0} | evaluation(not recipe.stages)
            if is_main() and not resume:
                run.create(recipe, state.problems)
            record(row, 0)
            if recipe.stages and model.device.type == "cpu" and not is_embedded(recipe.model):
                prompt = prompt_of(tokenizer, recipe.task, held_out[0], recipe.sampling)
                screen.say(planned_time(row, recipe, len(prompt)))

        # 3. The stages, each with a new optimizer. A signal drops unfinished rollouts or waits for an update.
        stop = stack.enter_context(stoppable(is_main()))
        while state.stage < len(recipe.stages):
            stage = recipe.stages[state.stage]
            is_last = state.stage == len(recipe.stages) - 1
            optimizer = Optimizer(model, recipe.optimizer, micro_batch_tokens)
            if checkpoint is not None and state.stage_step > 0:
                load_into(optimizer, checkpoint)
            checkpoint = reference = None
            if stage.kind == "grpo":
                steps, every, take_step = stage.steps, recipe.evaluation.every, take_grpo_step
                if stage.kl_coef:
                    reference = stage_start_model(model, recipe, run, state)
            else:
                schedule = sft_batches()
                steps, take_step = len(schedule), take_sft_step
                every = max(recipe.evaluation.every, -(-steps // 4))  # its steps are short
            while state.stage_step < steps:
                if any_rank(stop.requested.is_set()):
                    save(optimizer if state.stage_step else None)
                    number = next(filter(None, all_values(stop.number)))
                    advice = "go on with the same command and --resume."
                    raise Stopped(f"Saved after step {state.step}; {advice}", number)
                try:
                    metrics = take_step()
                except Cancelled:
                    continue
                state.step += 1
                state.stage_step += 1
                state.grpo_steps += stage.kind == "grpo"
                row = {"stage": state.stage, "kind": stage.kind, "step": state.step} | metrics
                row |= {"grpo_steps": state.grpo_steps, "peak_memory_bytes": peak_memory(model.device)}
                row["checkpoint_seconds"] = saving
                ends = state.stage_step == steps
                if ends or state.stage_step % every == 0:
                    row |= evaluation(ends and is_last)
                record(row, steps)
                if optimizer.skipped_in_a_row >= MAX_SKIPPED_UPDATES:
                    skipped = f"{optimizer.skipped_in_a_row} updates in a row had no finite loss and gradient"
                    advice = "lower the learning rate, or try --dtype float32, in a new run"
                    raise RecipeError(f"{skipped}, and changed nothing: {advice}")
                if not ends and state.stage_step % recipe.checkpoint_every == 0 and can_save():
                    save(optimizer)
            if not steps and is_last:  # an SFT stage without traces: no step has evaluated
                position = {"stage": state.stage, "kind": stage.kind, "step": state.step}
                row = position | {"grpo_steps": state.grpo_steps} | evaluation(True)
                if is_main():
                    run.log(row)
            micro_batch_tokens = optimizer.micro_batch_tokens
            del optimizer, reference  # frees their memory before the next stage takes its own
            state.stage += 1
            state.stage_step = 0
            save(None)

        # 4. The curve and the report, to look at.
        if is_main():
            write_curve(run, paper_points(recipe))
            row = run.metrics()[-1]
            if "final_accuracy" in row:
                screen.say(final_line(row, recipe.evaluation.final_problems))
            report = write_report((run.path,))
            screen.say(f"done: {run.path}/curve.md and curve.png; to look into it, open {report}")


def learning_rate_at(stage: GRPOStage, step: int, updates: int) -> float:
    """The learning rate of step 0, 1, ... of a stage; it falls linearly, and rises over the first updates."""
    rise = min(1.0, (updates / stage.updates_per_step + 1) / max(1, stage.warmup_steps))
    fall = 1 - (1 - stage.end_rate) * step / max(1, stage.steps - 1)
    return stage.learning_rate * rise * fall


def trace_file(stage: SFTStage, run: RunFolder) -> Path:
    """The file that an SFT stage learns from, which but for the user's own is written by the run."""
    if stage.traces == WORKED:
        return run.path / "worked.jsonl"
    return Path(stage.traces) if stage.traces else run.path / "traces.jsonl"


def traces_for(
    recipe: Recipe, run: RunFolder, state: TrainState, problems: list[Problem], held_out: list[Problem]
) -> list[Trace]:
    """What an SFT stage imitates: the user's file, worked solutions, or the rollouts before it, curated."""
    stage, task, thinking = recipe.stages[state.stage], recipe.task, recipe.sampling.thinking
    source = trace_file(stage, run)
    if stage.traces == WORKED:
        save_traces(source, worked_traces(task, problems, stage.max_traces, thinking, recipe.seed))
    elif stage.traces is None:
        correct = run.correct_traces(state.stage - 1, task)
        curated = curate(correct, stage.traces_per_problem, stage.max_traces)
        save_traces(source, curated)
        if not curated:
            return []

    traces = read_traces(recipe, source)
    kept_back = {problem.key for problem in (*held_out, *task.examples(recipe.sampling.examples))}
    traces = [trace for trace in traces if trace.problem.key not in kept_back]
    if not traces:
        raise DataError(f"{source}: all traces are of held-out problems; use others")
    if thinking:  # the prompt has opened the tag
        texts = [re.sub(r"\A\s*<think>", "", trace.completion) for trace in traces]
        traces = [replace(trace, completion=text) for trace, text in zip(traces, texts, strict=True)]
    return traces

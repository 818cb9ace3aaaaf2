"""A run in progress: it evaluates, logs, saves and stops around the steps of its stages."""

import time
from dataclasses import replace

from lab.boards import Boards
from lab.checkpoint import prune_checkpoints, save_checkpoint
from lab.device import peak_memory
from lab.errors import Stop, Stopped
from lab.evaluate import EVALUATION_SEED, evaluate
from lab.plots import write_curve
from lab.recipe import Recipe, RecipeError
from lab.report import write_report
from lab.runfolder import RunFolder
from lab.screen import (
    Screen,
    advice_on_equal_rewards,
    advice_on_exploration,
    describe_run,
    final_line,
    planned_time,
    time_left,
)
from lab.setup import find_state, set_up
from model.sampler import Cancelled
from model.weights import is_bundled
from rl.distributed import all_values, any_rank, broadcast, is_main, own_part
from rl.rollout import SamplingSettings, prompt_for

MAX_SKIPPED_UPDATES = 5  # in a row, then the run ends


class Run:
    """The model of a run, its problems and progress, and the folder and screen it writes to."""

    def __init__(self, recipe: Recipe, folder: RunFolder, screen: Screen, resume: bool):
        """Load everything. ModelError, DataError, RecipeError: the run cannot start, or go on, like this."""
        self.recipe = recipe
        self.folder = folder
        self.screen = screen
        self.resumed = resume
        self.boards = Boards(folder.path)
        self.stage = None  # of `lab.stages`, while it lasts
        self.stop = Stop()  # one that no signal reaches, until `train` puts the real one here
        self.started = time.perf_counter()
        self.saving = 0.0  # seconds, of all checkpoints
        self.last_save = 0.0
        self.state, self.checkpoint = find_state(recipe, folder, resume, screen)
        loaded = set_up(recipe, self.checkpoint, self.state)
        self.model, self.tokenizer, self.problems, self.held_out, self.micro_batch_tokens, fitness = loaded
        resumed_at = self.state.step if resume else None
        screen.say(describe_run(recipe, self.model, self.problems, self.held_out, resumed_at))
        screen.say(fitness)
        if resume and is_main():
            folder.check_problems(self.state.problems)
            folder.rewind(self.state.step if self.checkpoint else -1)
        screen.history(folder.metrics())

    def evaluate_first(self) -> None:
        """Measure accuracy before any step.

        Only then does the folder hold a run, so that a failed start can be repeated.
        """
        if broadcast(self.resumed and bool(self.folder.metrics())):
            return
        recipe = self.recipe
        stages = recipe.stages
        row = {"stage": 0, "kind": stages[0].kind if stages else "baseline", "step": 0, "grpo_steps": 0}
        row |= self.evaluation(last=not stages)
        if is_main():
            if not self.resumed:
                self.folder.create(recipe, self.state.problems)
            self.folder.log(row)
        self.show(row)
        if stages and self.model.device.type == "cpu" and not is_bundled(recipe.model):
            prompt = prompt_for(self.tokenizer, recipe.task, self.held_out[0], recipe.sampling)
            self.screen.say(planned_time(row, recipe, len(prompt)))

    def finish_step(self, metrics: dict) -> None:
        """Count and log a step of the stage, and evaluate and save where it is time to."""
        state, stage = self.state, self.stage
        state.step += 1
        state.stage_step += 1
        state.grpo_steps += stage.kind == "grpo"
        row = {"stage": state.stage, "kind": stage.kind, "step": state.step} | metrics
        row["grpo_steps"] = state.grpo_steps
        row["peak_memory_bytes"] = peak_memory(self.model.device)
        row["checkpoint_seconds"] = self.saving
        if is_main():
            self.folder.log(row)
        self.evaluate_and_show(row)
        skipped = stage.trainer.optimizer.skipped_in_a_row
        if skipped >= MAX_SKIPPED_UPDATES:
            advice = "lower the learning rate, or try --dtype float32, in a new run"
            raise RecipeError(
                f"{skipped} updates in a row had no finite loss and gradient, and changed nothing: {advice}"
            )
        ends = state.stage_step == stage.steps
        if not ends and state.stage_step % self.recipe.checkpoint_every == 0 and self.may_save():
            self.save()

    def complete_evaluation(self) -> None:
        """Evaluate after the last step, if a signal had cut that off, or if an empty stage ends the run."""
        row = broadcast(self.folder.metrics()[-1] if is_main() else None)
        needs_final = self.ends_run() and self.recipe.evaluation.final_problems > 0
        needed = "final_accuracy" if needs_final else "eval_accuracy"
        if self.evaluation_due() and needed not in row:
            self.evaluate_and_show(row)

    def evaluate_and_show(self, row: dict) -> None:
        """Evaluate after the step of the logged `row` if it is time to, add that to the row, and show it."""
        if self.evaluation_due():
            row |= self.evaluation(last=self.ends_run())
            if is_main():
                self.folder.write_metrics([*self.folder.metrics()[:-1], row])
        self.show(row)

    def evaluation_due(self) -> bool:
        """Whether the step that was taken last is one after which the run evaluates."""
        done = self.state.stage_step
        return done == self.stage.steps or (done > 0 and done % self.stage.evaluate_every == 0)

    def ends_run(self) -> bool:
        is_last = self.state.stage == len(self.recipe.stages) - 1
        return is_last and self.state.stage_step == self.stage.steps

    def end_stage(self) -> None:
        """Save a checkpoint, and go on to the next stage."""
        self.micro_batch_tokens = self.stage.trainer.micro_batch_tokens
        self.stage = None
        self.state.stage += 1
        self.state.stage_step = 0
        self.save()

    def finish(self) -> None:
        """Write the report, and say where everything is."""
        if not is_main():
            return
        path = self.folder.path
        row = self.folder.metrics()[-1]
        if "final_accuracy" in row:
            self.screen.say(final_line(row, self.recipe.evaluation.final_problems))
        report = write_report((path,))
        self.screen.say(f"done: {path}/curve.md and curve.png; to look into it, open {report}")

    def evaluation(self, last: bool) -> dict[str, float]:
        """Accuracy on held-out problems, sampled as in training; if `last`, on more, and greedy too.

        If a signal cuts it off, the run saves and ends.
        """
        start = time.perf_counter()
        settings, sampling = self.recipe.evaluation, self.recipe.sampling
        try:
            result = self.evaluate(settings.problems, sampling)
            metrics = accuracy_metrics("eval", result)
            metrics["eval_completion_length"] = result.completion_length
            metrics["eval_truncated_fraction"] = result.truncated_fraction
            metrics["eval_format_rate"] = 1 - result.counts["malformed"] / sum(result.counts.values())
            metrics["eval_seconds"] = time.perf_counter() - start
            if last and settings.final_problems:
                result = self.evaluate(settings.final_problems, sampling)
                metrics |= accuracy_metrics("final", result)
                result = self.evaluate(settings.final_problems, replace(sampling, temperature=0.0))
                metrics |= accuracy_metrics("final_greedy", result)
        except Cancelled:
            self.stop_if_asked()
            raise  # not reached: a signal has cut the evaluation off, and so the run stops
        return metrics

    def evaluate(self, count: int, sampling: SamplingSettings):
        """The `Evaluation` of one completion of each of the first `count` held-out problems."""
        problems = self.held_out[:count]
        with self.screen.sampling("evaluation", len(own_part(problems))) as on_progress:
            return evaluate(
                self.model,
                self.tokenizer,
                self.recipe.task,
                problems,
                sampling=sampling,
                num_samples=1,
                seed=EVALUATION_SEED,
                on_progress=on_progress,
                cancel=self.stop.requested,
            )

    def show(self, row: dict) -> None:
        """Show the metrics of a step on the screen, the boards and the curve."""
        if not is_main():
            return
        recipe, screen = self.recipe, self.screen
        self.boards.log(row)
        steps = self.stage.steps if self.stage else 0
        screen.step(row, len(recipe.stages), self.state.stage_step, steps)
        if row["kind"] == "grpo" and self.state.stage_step == 3:
            screen.say(f"at this speed, {time_left(row, recipe)} of GRPO left, without evaluations")
        if "eval_accuracy" in row:
            write_curve(self.folder, recipe)
            for words in (advice_on_equal_rewards(row, recipe), advice_on_exploration(row, recipe)):
                if words:
                    screen.say(words)

    def save(self) -> None:
        """Save a checkpoint, within a stage with the optimizer. Rank 0 writes; the others wait."""
        start = time.perf_counter()
        optimizer = self.stage.trainer.optimizer if self.state.stage_step else None
        if is_main():
            self.folder.sync()
            folder = self.folder.path / "checkpoints" / f"step_{self.state.step:04d}"
            save_checkpoint(folder, self.model, self.tokenizer, optimizer, self.state, self.recipe)
            rows = [row for row in self.folder.metrics() if "eval_accuracy" in row]
            accuracies = {row["step"]: row["eval_accuracy"] for row in rows}
            prune_checkpoints(self.folder.path, self.recipe.keep_checkpoints, accuracies)
        broadcast(None)
        self.last_save = time.perf_counter() - start
        self.saving += self.last_save

    def may_save(self) -> bool:
        """Whether one more checkpoint keeps all of them within their share of the time."""
        elapsed = time.perf_counter() - self.started
        return broadcast(self.saving + self.last_save <= self.recipe.checkpoint_share * elapsed)

    def stop_if_asked(self) -> None:
        """Where a signal has asked the run to end: save, and raise Stopped, which says how to go on."""
        if not any_rank(self.stop.requested.is_set()):
            return
        self.save()
        number = next(filter(None, all_values(self.stop.number)))
        advice = "go on with the same command and --resume."
        raise Stopped(f"Saved after step {self.state.step}; {advice}", number)


def accuracy_metrics(name: str, result) -> dict[str, float]:
    """The accuracy of an `Evaluation` and its 95 % interval, under names that begin with `name`."""
    return {f"{name}_accuracy": result.accuracy, f"{name}_low": result.low, f"{name}_high": result.high}

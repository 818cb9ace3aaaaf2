"""Measured on this machine: a GRPO step of random weights by one or more processes, and an exchange between
them.

`benchmarks/scaling.py` compares the results with its predictions.
"""

import multiprocessing
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch
from costs import Setting, recipe_of, state_bytes
from memory import RandomTask, held_memory, random_model

from lab.device import peak_memory, processes, return_freed_blocks
from lab.memory_plan import plan_memory, work_of
from model.memory import free_memory
from rl.distributed import all_values, is_main, sum_gradients, world_size
from rl.grpo import grpo_step
from rl.optimizer import Optimizer
from rl.trainer import Trainer

CPU = torch.device("cpu")
EXCHANGED = (2**10, 2**24)  # float32 numbers that are added up to measure latency and rate
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(work: Callable, clock: str) -> float:
    """Seconds of `work` on the slowest process."""
    all_values(None)  # start together
    start = CLOCKS[clock]()
    work()
    return max(all_values(CLOCKS[clock]() - start))


def in_processes(count: int, measure: Callable[..., dict], *arguments) -> dict:
    """What `measure(*arguments)` returns on rank 0 of `count` processes with one thread each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["several"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    receiver, sender = context.Pipe(duplex=False)
    ranks = []
    for rank in range(count):
        ranks.append(context.Process(target=run_rank, args=(rank, count, port, sender, measure, arguments)))
        ranks[-1].start()
    sender.close()
    for process in ranks:
        process.join()
    if any(process.exitcode for process in ranks):
        sys.exit("error: a measuring process failed, see above")
    return receiver.recv()


def run_rank(
    rank: int, count: int, port: int, sender, measure: Callable[..., dict], arguments: tuple
) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    with processes():
        result = measure(*arguments)
        if is_main():
            sender.send(result)


def step_measured(setting: Setting, repeats: int, clock: str) -> dict:
    """Median seconds of rollout, update and one optimizer step alone; peak and planned memory of a
    process."""
    return_freed_blocks()
    step, recipe = setting.step, recipe_of(setting)
    free, process = free_memory(CPU), held_memory(CPU)
    model = random_model(setting.config, setting.dtype, "cpu")
    work = work_of(recipe, step.prompt_length, world_size())
    plan = plan_memory(model, setting.optimizer, work, free)
    trainer = Trainer(model, Optimizer(model, setting.optimizer), plan.micro_batch_tokens)
    times = [one_step(setting, trainer, seed, clock) for seed in range(repeats + 1)]
    rollout, update, alone = map(statistics.median, zip(*times[1:], strict=True))
    return {
        "rollout": rollout,
        "update": update,
        "optimizer": alone,
        "planned": process + plan.peak,
        "peak": peak_memory(CPU),
        "state": state_bytes(plan),
    }


def one_step(setting: Setting, trainer: Trainer, seed: int, clock: str) -> tuple:
    """Seconds of a rollout, of an update, and of one more optimizer step alone, on the slowest process."""
    step, recipe = setting.step, recipe_of(setting)
    task = RandomTask(setting.config.vocab_size, step.prompts, step.prompt_length)
    if (
        step.mean
    ):  # with random weights each id is about equally likely: so many stop ids give this mean length
        task.stop_token_ids = range(round(setting.config.vocab_size / step.mean))
    options = {"settings": recipe.stages[0], "sampling": recipe.sampling, "learning_rate": 1e-6, "seed": seed}
    all_values(None)
    with mock.patch.object(time, "perf_counter", CLOCKS[clock]):  # the clock that grpo_step reads
        *_, metrics = grpo_step(trainer, task, task, list(range(step.prompts)), **options)
    seconds = (max(all_values(metrics[f"{part}_seconds"])) for part in ("rollout", "update"))
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return *seconds, timed(lambda: trainer.optimizer.step(1e-6), clock)


def exchange_measured(repeats: int, clock: str) -> dict:
    """Median seconds of adding up few and many gradients."""
    medians = {}
    for count in EXCHANGED:
        parameter = torch.nn.Parameter(torch.zeros(count))
        parameter.grad = torch.ones(count)
        times = [timed(lambda p=parameter: sum_gradients([p]), clock) for _ in range(2 * repeats + 1)]
        medians[str(count)] = statistics.median(times[1:])
    return medians
